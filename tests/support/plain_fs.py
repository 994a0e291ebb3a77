"""`plain://`: a file system of fsspec that writes in place, as those of sftp and hdfs do."""

from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem


class File(LocalFileOpener):
    """A file whose `write` a test may change."""

    def write(self, data: bytes) -> int:
        return self.f.write(data)


class Plain(LocalFileSystem):
    """Paths of this machine."""

    protocol = "plain"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(LocalFileSystem._strip_protocol(path.removeprefix(f"{cls.protocol}://")))

    def _open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        return File(path, mode, fs=self)


class Refusing(Plain):
    """Does not rename over a file, as that of smb."""

    protocol = "refusing"

    def mv(self, path1: str, path2: str, **how: Any) -> None:
        if self.exists(path2):
            raise FileExistsError(path2)
        super().mv(path1, path2, **how)


class Silent(Plain):
    """Does not rename over a file and does not say so, as that of webhdfs."""

    protocol = "silent"

    def mv(self, path1: str, path2: str, **how: Any) -> None:
        if not self.exists(path2):
            super().mv(path1, path2, **how)


for kind in (Plain, Refusing, Silent):
    fsspec.register_implementation(kind.protocol, kind, clobber=True)
