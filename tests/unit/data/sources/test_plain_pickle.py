"""Pickles as CIFAR archives have them, and those that attack an unpickler."""

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightship.data.sample_decoder import decode_all
from lightship.data.sources import layouts, plain_pickle
from lightship.errors import DataError
from tests.support import images
from tests.support.bounded_child import call_bounded, refusals
from tests.support.images import put

PIXELS = images.cifar_pixels(6)
ROWS = PIXELS.reshape(6, -1)
BATCH = {"batch_label": "testing batch 1 of 1", "fine_labels": [0, 1, 2, 0, 1, 2], "data": ROWS,
         "filenames": [f"bos_{i}.png" for i in range(300)], "weight": 0.5, "none": None,
         "flags": (True, False), "large": [-1, 255, 256, 65_536, -(2**31), 2**62],
         "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]}  # fmt: skip


def archive(folder: Path, batch: bytes, meta: bytes | None = None) -> str:
    files = images.cifar100(PIXELS, PIXELS)
    files["cifar-100-python/train"] = batch
    if meta is not None:
        files["cifar-100-python/meta"] = meta
    return put(str(folder / "set"), files)


def test_real_pickles_are_read(tmp_path):
    for protocol in range(3, 6):
        root = archive(tmp_path / str(protocol), pickle.dumps(BATCH, protocol))
        manifest = layouts.scan(root)["train"]
        np.testing.assert_array_equal(decode_all(manifest)[0], PIXELS.transpose(0, 2, 3, 1))
        assert manifest.label.tolist() == BATCH["fine_labels"]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("key", [str, str.encode])
def test_plain_values_of_every_protocol(tmp_path, protocol, key):
    plain = {key(name): value for name, value in BATCH.items() if name != "data"}
    plain[key("bytes")] = b"\x00\xff'\n" * 99
    assert plain_pickle.load(pickle.dumps(plain, protocol)) == plain
    meta = pickle.dumps({key("fine_label_names"): [key(name) for name in images.CLASSES]}, protocol)
    assert layouts.scan(archive(tmp_path, pickle.dumps(BATCH, 4), meta))["train"].class_names == [
        *images.CLASSES
    ]


@pytest.mark.parametrize("core", ["core", "_core"])
def test_either_name_of_numpys_core(tmp_path, core):
    data = pickle.dumps(BATCH, 3)
    assert b"numpy._core.multiarray" in data
    root = archive(tmp_path, data.replace(b"numpy._core.", f"numpy.{core}.".encode()))
    assert len(layouts.scan(root)["train"]) == 6


def test_text_of_python_2_without_a_binary_protocol():
    """As `pickle.dump(x, file)` of Python 2 wrote by default; put together by hand."""
    data = b"(dp0\nS'label_names'\np1\n(lp2\nS'a\\'b'\np3\naS\"c\"\naS'\\xe9'\nas"
    data += b"S'n'\nL5L\nsS'b'\nI01\ns."
    assert plain_pickle.load(data) == {
        b"label_names": [b"a'b", b"c", b"\xe9"], b"n": 5, b"b": True,
    }  # fmt: skip


def test_escaped_rows_are_refused_with_what_to_do(tmp_path):
    for protocol in range(3):
        with pytest.raises(DataError, match=r"not lie in one piece.*protocol 3"):
            layouts.scan(archive(tmp_path / str(protocol), pickle.dumps(BATCH, protocol)))


# ---- attacks -----------------------------------------------------------------------------------


class Forged:
    """Calls `callable(*args)` and then sets `state`, as only a forged pickle does."""

    def __init__(self, called: Any, args: tuple, state: Any):
        self.reduced = called, args, state

    def __reduce__(self) -> tuple:
        return self.reduced


def forged_dtype(kind: str = "O8", flags: int = 0) -> bytes:
    """An array of objects, but for the flag that says so: bytes of the file become pointers."""
    dtype = Forged(np.dtype, (kind, False, True), (3, "|", None, None, None, -1, -1, flags))
    rows = Forged(np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"),
                  (1, (1, 3072), dtype, False, b"A" * 3072 * 8))  # fmt: skip
    return pickle.dumps({"fine_labels": [0], "data": rows}, 2)


def dumped(**changed: Any) -> bytes:
    return pickle.dumps({**BATCH, **changed}, 4)


def state(
    shape: Any = (6, 3072),
    fortran: bool = False,
    data: bytes = ROWS.tobytes(),
    kind: tuple[str, tuple] = ("u1", (3, "|", None, None, None, -1, -1, 0)),
) -> bytes:
    dtype = Forged(np.dtype, (kind[0], False, True), kind[1])
    rows = Forged(np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"),
                  (1, shape, dtype, fortran, data))  # fmt: skip
    return dumped(data=rows)


TEXT = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20
ENCODED = b"\x80\x02c_codecs\nencode\nq\x00" + TEXT + b"q\x01X\x06\0\0\0latin1q\x02\x86q\x03R"
ATTACKS: dict[str, bytes] = {
    "dtype of objects": forged_dtype(),
    "dtype of objects, flagged": forged_dtype(flags=63),
    "dtype that changes its size": forged_dtype("u1"),
    "dtype of fields": state(kind=("V8", (3, "|", None, ("a",), {"a": ("O", 0)}, 8, 1, 0))),
    "array of objects": dumped(data=np.array([[b"x"] * 3072] * 6, dtype=object)),
    "array of floats": dumped(data=ROWS.astype("f8")),
    "structured array": dumped(data=np.zeros((6, 3072), dtype=[("a", "u1")])),
    "fortran order": dumped(data=np.asfortranarray(ROWS)),
    "shape beyond the bytes": state(shape=(10**9, 3072)),
    "shape of 10^18": state(shape=(10**9, 10**9)),
    "negative shape": state(shape=(-6, -3072)),
    "shape of many sides": state(shape=(2**28,) * 100_000),
    "shape of fractions": state(shape=(6.0, 3072)),
    "fewer bytes than the shape": state(data=b"x"),
    "fortran by its state": state(fortran=True),
    "memo index of 2^31": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "bytes of 2^40": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
    "bytes of 2^64 - 1": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
    "bytearray of 2^40": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "text of 2^32 - 1": b"\x80\x02X\xff\xff\xff\xff.",
    "negative text": b"\x80\x02T\xff\xff\xff\xff.",
    "frame of 2^62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "number of 2^31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "number of 10^7 digits": b"L" + b"9" * 10**7 + b"L\n.",
    "text without end": b"S'" + b"a" * 10**7,
    "a list in a list, 10^6 deep": b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".",
    "class names nested": pickle.dumps({"fine_label_names": 1}, 2)[:-1] + b"." ,
    "one text encoded 100,000 times": ENCODED + b"0h\x00h\x03R"[1:] * 100_000 + b".",
    "10^8 marks": b"\x80\x02" + b"(" * 10**8,
    "10^8 lists": b"\x80\x02" + b"]" * 10**8,
    "the stack is empty": b"\x80\x02R.",
    "build on a list": b"\x80\x02](K\x01tb.",
    "an own key": b"\x80\x02}(]K\x01u.",
    "odd number of items": b"\x80\x02}(K\x01K\x02K\x03u.",
    "persistent id": b"\x80\x02Pmodule\n.",
    "an instance": b"(ios\nsystem\n.",
    "an object": b"\x80\x02(cos\nsystem\no.",
    "newobj": b"\x80\x02cnumpy\ndtype\nU\x01O\x85\x81.",
    "extension": b"\x80\x02\x82\x01.",
    "next buffer": b"\x80\x05\x97.",
    "empty": b"",
    "no end": b"\x80\x04N",
}  # fmt: skip


def scan_batch(folder: str, name: str) -> None:
    layouts.scan(archive(Path(folder, name), ATTACKS[name]))


def test_attacks_end_in_a_line_and_little_memory(tmp_path):
    said = refusals(scan_batch, {name: (str(tmp_path), name) for name in ATTACKS}, max_mib=900)
    assert all(str(tmp_path) in text for text in said.values())


def scan_meta(folder: str) -> None:
    nested = b"]" * 10**6 + b"a" * (10**6 - 1)
    meta = b"\x80\x02}X\x10\0\0\0fine_label_names](" + nested + b"es."
    layouts.scan(archive(Path(folder), pickle.dumps(BATCH, 4), meta))


def test_class_names_that_are_nested_lists(tmp_path):
    (text,) = refusals(scan_meta, {"nested": (str(tmp_path),)}).values()
    assert "it must be text" in text


def test_a_forged_pickle_harms_pickles_own_unpickler(tmp_path):
    """The attack is real: NumPy alone, as `find_class` allowed it, takes bytes for pointers."""
    with pytest.raises(AssertionError, match="the child died: SIG"):
        call_bounded(unpickle_forged)


def unpickle_forged() -> None:
    repr(pickle.loads(forged_dtype())["data"])
