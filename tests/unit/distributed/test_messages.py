"""What ranks send each other: every value as it was, and nothing that runs code."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lightship
from lightship.checkpoint.record import Commit
from lightship.data.manifest import Manifest
from lightship.distributed import messages
from lightship.run.folder import Start
from lightship.storage.file_list import FileList


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "value",
    [
        None, b"", b"a\0b", True, 3, 2**63, 0.1, float("inf"), "a\udcffé\n", [], ["a", "b"],
        [1, "a", None], (1, (2, 3)), {1, 2}, {"ab"}, set(), {}, {"array": 1},
        {"dict": [[1, 2]]}, {3: "x"},
        {("a", 1): {"b": (1.5,)}}, Start("s3://b/c", 3, 1),
        Commit("a.ckpt", 1, 2, "ff", "00001-abc", score=0.5, monitor="val/loss", mode="min"),
        (None, ("data", "no such file")),
    ],
    ids=repr,
)  # fmt: skip
def test_a_value_comes_as_it_was(value: Any) -> None:
    came = messages.decode(messages.encode(value))
    assert came == value
    assert type(came) is type(value)


def test_arrays_come_as_they_were() -> None:
    arrays = [
        np.arange(6, dtype=np.int32).reshape(2, 3).T,
        np.array(1.5, dtype=np.float32),
        np.zeros((0, 4), dtype=np.uint8),
        np.array([True, False]),
        np.array([1, 2], dtype=">i8"),
    ]
    for array, came in zip(arrays, messages.decode(messages.encode(arrays)), strict=True):
        assert came.shape == array.shape
        assert came.dtype == array.dtype.newbyteorder("=")
        assert (came == array).all()
        came.setflags(write=True)
    assert messages.decode(messages.encode([np.float32(0.5), np.int64(3)])) == [0.5, 3]


def test_a_manifest() -> None:
    column = np.arange(3)
    table = Manifest(
        "r", FileList.of(["a", "\udcff"]), column.astype(np.int32), column, column,
        column, column, ["x"], "bytes", "image", ["m", "n", "o"],
    )  # fmt: skip
    came = messages.decode(messages.encode({"train": table}))["train"]
    assert isinstance(came, Manifest)
    assert came.fingerprint() == table.fingerprint()
    assert (came.members, came.root, came.not_read) == (table.members, "r", "")


@pytest.mark.parametrize("value", [bytearray(b"x"), object(), print, Path("a"), np.array(["a"])])
def test_other_values_are_not_sent(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent"):
        messages.encode(value)


def forged(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode()


@pytest.mark.parametrize(
    "header",
    [
        '{"object": ["os", "system", {"dict": [["command", "touch MARK"]]}]}',
        '{"object": ["lightship.cli", "main", {"dict": [["argv", ["x"]]]}]}',
        '{"object": ["lightship.run.folder", "RunFolder", {"dict": [["config", 1]]}]}',
        '{"object": ["lightship.distributed.comm", "Thread", {"dict": []}]}',
        '{"object": ["lightship.run.folder", "Start", {"dict": [["nothing", 1]]}]}',
        '{"array": ["O", 8, [1], 0]}', '{"array": ["f", 8, [1000000000000], 0]}',
        '{"array": ["f", 8, [1], 99]}', '{"array": ["u", 3, [], 0]}',
        '{"dict": [[[], 1]]}', '{"set": [[]]}', '{"type": []}', "{}", '{"a": 1, "b": 2}',
        "[" * 100_000, "nonsense", "",
    ],
)  # fmt: skip
def test_forged_messages_are_refused(header: str) -> None:
    with pytest.raises(ValueError, match="what no rank sends"):
        messages.decode(forged(header))


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    bomb, mark = pickle.dumps(Bomb(tmp_path / "mark")), tmp_path / "mark"
    for data in (bomb, len(bomb).to_bytes(8, "little") + bomb, forged('"a"') + bomb, b""):
        try:
            assert messages.decode(data) == "a"
        except ValueError:
            continue
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists(), "the bomb works"


def test_only_the_agents_own_state_and_the_data_worker_are_unpickled() -> None:
    """Torch's calls for objects unpickle what another process has sent."""
    pattern = re.compile(
        r"pickle\.loads?\b|Unpickler|_object\(|_object_list\(|allow_pickle=True|weights_only=False"
    )
    root = Path(lightship.__file__).parent
    found = {
        path.relative_to(root).as_posix(): len(pattern.findall(path.read_text()))
        for path in (root / "distributed").rglob("*.py")
    }
    assert {path: n for path, n in found.items() if n} == {"distributed/rendezvous_state.py": 1}
