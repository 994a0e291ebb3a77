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
        return str(LocalFileSystem._strip_protocol(path.removeprefix("plain://")))

    def _open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        return File(path, mode, fs=self)


fsspec.register_implementation("plain", Plain, clobber=True)
