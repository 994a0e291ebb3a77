"""Runs that somebody else has made: forged records and checkpoints, all with right check sums."""

import hashlib
import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightship.checkpoint import record


def records(run: Path) -> list[Path]:
    """The records of a run's checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-0*.commit.json"))


def forge_record(path: Path, **changes: Any) -> None:
    """Change fields of a record; its own check sum is right again."""
    fields = json.loads(path.read_text()) | changes
    write_record(path, fields)


def write_record(path: Path, fields: dict[str, Any]) -> None:
    """Write a record of any content with a right check sum."""
    fields.pop("check", None)
    # As the reader will have them: NaN and numbers beyond a double are JSON for Python.
    fields = json.loads(json.dumps(fields))
    path.write_text(json.dumps({**fields, "check": record._check(fields)}))


def forge_payload(path: Path, payload: bytes) -> None:
    """Put any bytes in the place of the payload of a record, which vouches for them."""
    (path.parent / json.loads(path.read_text())["file"]).write_bytes(payload)
    forge_record(path, sha256=hashlib.sha256(payload).hexdigest(), size_bytes=len(payload))


def forge_checkpoint(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the content of a record's checkpoint in place."""
    payload = (path.parent / json.loads(path.read_text())["file"]).read_bytes()
    content = torch.load(io.BytesIO(payload), weights_only=True)
    change(content)
    out = io.BytesIO()
    torch.save(content, out)
    forge_payload(path, out.getvalue())


def archive_of(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip as torch.load takes it, with these entries below `a/`."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in {"version": b"3\n", "byteorder": b"little", **entries}.items():
            archive.writestr(f"a/{name}", data)
    return out.getvalue()


def pickle_of_tensor(numel: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """`{"w": tensor}` as torch.save pickles it: a view of a float32 storage of `numel`."""

    def number(value: int) -> bytes:
        data = pickle.encode_long(value)
        return b"\x8a" + bytes([len(data)]) + data

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    sizes = b"(" + b"".join(map(number, size)) + b"t" + b"(" + b"".join(map(number, stride)) + b"t"
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
        + number(numel) + b"tQK\x00" + sizes + b"\x89" + hooks + b"tRs."
    )  # fmt: skip


def saved(content: Any) -> bytes:
    """What `torch.save` writes."""
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _doubled(times: int) -> list[Any]:
    value: list[Any] = [0]
    for _ in range(times):
        value = [value, value]
    return value


def _within_itself() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


def _shadowed() -> OrderedDict[str, Any]:
    value: OrderedDict[str, Any] = OrderedDict(a=1)
    value.keys = 5  # type: ignore[method-assign, assignment]
    return value


def _overlapping() -> bytes:
    """Two entries of the directory that are the same bytes of the file."""
    data = archive_of({"data.pkl": b"\x80\x02}.", "data/0": bytes(2**20)})
    place = data.rindex(b"PK\x01\x02")
    entry = data[place : data.index(b"PK\x05\x06", place)]
    renamed = entry.replace(b"a/data/0", b"a/data/1")
    end = bytearray(data[place + len(entry) :])
    for at in (8, 10):
        end[at : at + 2] = (int.from_bytes(end[at : at + 2], "little") + 1).to_bytes(2, "little")
    size = int.from_bytes(end[12:16], "little") + len(entry)
    end[12:16] = size.to_bytes(4, "little")
    return data[: place + len(entry)] + renamed + bytes(end)


BOMBS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "no archive": lambda: b"PK" + bytes(1000),
    "compressed": lambda: archive_of(
        {"data.pkl": pickle_of_tensor(3 * 2**26, (3 * 2**26,), (1,)), "data/0": bytes(3 * 2**28)},
        zipfile.ZIP_DEFLATED,
    ),
    "overlapping entries": _overlapping,
    "a comment behind the archive": lambda: saved({"a": 1})[:-2] + b"\x05\x00hello",
    "a storage of 10^12": lambda: archive_of(
        {"data.pkl": pickle_of_tensor(10**12, (10**12,), (1,)), "data/0": bytes(40)}
    ),
    "a view of 10^12": lambda: archive_of(
        {"data.pkl": pickle_of_tensor(10, (10**6, 10**6), (0, 0)), "data/0": bytes(40)}
    ),
    "a storage shared 1,000 times": lambda: saved(
        {str(i): one for one in [torch.ones(10_000)] for i in range(1000)}
    ),
    "doubled 60 times": lambda: saved({"a": _doubled(60)}),
    "within itself": lambda: saved(_within_itself()),
    "nested deeply": lambda: saved({"a": _nested(300)}),
    "nested more deeply": lambda: archive_of(
        {"data.pkl": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."}
    ),
    "a hundred thousand sets": lambda: archive_of(
        {"data.pkl": b"\x80\x02](" + b"\x8f" * 100_000 + b"e."}
    ),
    "sparse": lambda: saved({"a": torch.ones(3).to_sparse()}),
    "on no device": lambda: saved({"a": torch.ones(3, device="meta")}),
    "an encoder called": lambda: saved({"a": b"bytes"}),
    "a bytearray of 10^10": lambda: archive_of(
        {"data.pkl": b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\xe4\x0bT\x02\x85R."}
    ),
    "a dictionary's method": lambda: saved({"state_dict": _shadowed()}),
    "a memo of 2^32": lambda: archive_of({"data.pkl": b"\x80\x02Nr\xff\xff\xff\xff."}),
    "old, of many objects": lambda: b"\x80\x02](" + b"}" * 1_100_000 + b"e.",
}
"""Small files that ask for much, none of which may be loaded."""
