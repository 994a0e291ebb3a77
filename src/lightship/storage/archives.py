"""Archives: the names of a zip's entries as relative paths with '/'."""

import re
import zipfile

_DOS = 0
_DRIVE = re.compile(r"^[A-Za-z]:/")


def plain_names(archive: zipfile.ZipFile) -> None:
    r"""Rename the entries of an open zip: `/a/b`, `./a/b`, `a\b` and `C:\a\b` become `a/b`.

    A backslash separates where the zip was made on Windows, or where no name has a slash. Reading
    goes on by the new names, because zipfile compares an entry's header with `orig_filename`.
    """
    entries = archive.infolist()
    has_slashes = any("/" in entry.filename for entry in entries)
    for entry in entries:
        name = entry.filename
        if "\\" in name and (entry.create_system == _DOS or not has_slashes):
            name = name.replace("\\", "/")
        folder = "/" if name.endswith("/") else ""
        parts = _DRIVE.sub("", name).split("/")
        entry.filename = "/".join(part for part in parts if part not in ("", ".", "..")) + folder
    archive.NameToInfo = {entry.filename: entry for entry in entries}
