"""What released versions have left goes on with the code of today: see tests/data/README.md."""

import csv
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightship import cli
from lightship.commands import fit

KEPT = Path(__file__).parents[1] / "data"
VERSIONS = sorted(folder.name for folder in KEPT.iterdir() if folder.is_dir())
NET = "--model.net=frozen_net:net"
FIT = [
    "fit", "--data.root=set", NET, "--data.global_batch_size=6",
    "--data.val_fraction=0.25", "--data.flip=true", "--data.crop_padding_px=1",
    "--model.ema_decay=0.5", "--optim.name=adamw", "--optim.lr=0.02", "--optim.schedule=cosine",
    "--trainer.max_epochs=4", "--trainer.log_every_n_steps=2",
    "--trainer.early_stopping_patience=3", "--run.log_images=2", "--run.tracking=none",
    "--trainer.accelerator=cpu",
]  # fmt: skip
"""The command that the runs were made with, less run.output."""


def bitmap(seed: int, brightness: int) -> bytes:
    """An image of 8 x 8 pixels; the same bytes whatever Pillow's version."""
    size = (54 + 192).to_bytes(4, "little")
    side = (8).to_bytes(4, "little")
    head = b"BM" + size + bytes(4) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    head += side + side + b"\x01\x00\x18\x00" + bytes(24)
    return head + bytes(brightness + (seed * 31 + i * i * 7 + i * 13) % 90 for i in range(192))


def write_set(root: Path) -> None:
    """The images that the kept files are of."""
    number = 0
    for split, per_class in (("train", 8), ("test", 4)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                (root / split / name / f"{i}.bmp").write_bytes(bitmap(number, 60 * label))
                number += 1


@pytest.fixture(params=VERSIONS)
def kept(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A copy of what a version has left, as the working folder."""
    folder = tmp_path / "kept"
    shutil.copytree(KEPT / request.param, folder)
    write_set(folder / "set")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(fit, "write_report", lambda *_: None)  # drawing it takes the most time
    yield folder
    sys.modules.pop("frozen_net", None)


def numbers(path: Path) -> dict[str, float]:
    found = json.loads(path.read_text())
    return {name: value for name, value in found.items() if isinstance(value, float)}


def order_version(run: Path) -> int:
    """That of the newest checkpoint."""
    newest = max((run / "checkpoints").glob("step-*.ckpt"))
    return torch.load(newest, weights_only=True)["ImageData"]["order"]


def test_an_interrupted_run_goes_on_to_the_same_end(kept: Path, capsys) -> None:
    assert cli.main([*FIT, "--run.output=interrupted"]) == 0
    assert ", from step 7;" in capsys.readouterr().err
    was, now = numbers(kept / "finished" / "DONE"), numbers(kept / "interrupted" / "DONE")
    assert {name: now[name] for name in was} == pytest.approx(was, abs=1e-4)
    assert order_version(kept / "interrupted") == 1, "goes on with the order it began with"
    # Its files are those of today now; they go on too.
    (kept / "interrupted" / "DONE").unlink()
    assert cli.main([*FIT, "--run.output=interrupted"]) == 0
    assert ", from step 12;" in capsys.readouterr().err
    assert numbers(kept / "interrupted" / "DONE") == now
    assert order_version(kept / "interrupted") == 1


def test_a_finished_run_is_complete(kept: Path) -> None:
    before = sorted((kept / "finished").rglob("*"))
    assert cli.main([*FIT, "--run.output=finished"]) == 0
    assert sorted((kept / "finished").rglob("*")) == before


@pytest.mark.parametrize("ckpt_path", ["best", "last", "url"])
def test_a_checkpoint_is_measured(kept: Path, ckpt_path: str) -> None:
    [url] = (kept / "finished" / "checkpoints").glob("step-00000012-*.ckpt")
    chosen = str(url) if ckpt_path == "url" else ckpt_path
    assert cli.main(["test", "--run.output=finished", NET, f"--ckpt_path={chosen}"]) == 0
    found = numbers(kept / "finished" / "report" / "test.json")
    was = numbers(kept / "finished" / "DONE")
    assert found["test/loss"] == pytest.approx(was["test/loss"], abs=1e-4)
    assert cli.main(["validate", "--run.output=finished", NET, f"--ckpt_path={chosen}"]) == 0
    found = numbers(kept / "finished" / "report" / "val.json")
    assert found["val/loss"] == pytest.approx(was["val/loss"], abs=1e-4)


def test_parts_that_do_not_say_of_which_root_they_are_begin_anew(kept: Path, capsys) -> None:
    """As those of 0.1.0: images of another root may have the same names and sizes."""
    predict = ["predict", "--run.output=finished", NET, "--data.root=set/test"]
    assert cli.main([*predict, "--predictions=table.csv"]) == 0
    said = capsys.readouterr().err
    assert "are of another table (" in said
    assert "data.root" in said
    assert not list(kept.glob("table.csv.parts"))
    assert cli.main([*predict, "--predictions=anew.csv"]) == 0
    tables = [
        [(row["path"], row["class"]) for row in csv.DictReader((kept / name).open())]
        for name in ("table.csv", "anew.csv")
    ]
    assert len(tables[0]) == 12
    assert tables[0] == tables[1]


def test_packed_images_are_trained_on(kept: Path) -> None:
    flags = [flag for flag in FIT if not flag.startswith("--data.root")]
    assert (
        cli.main([*flags, "--data.root=packed", "--run.output=new", "--trainer.max_epochs=1"]) == 0
    )
    assert numbers(kept / "new" / "DONE")["test/num_samples"] == 12
    assert order_version(kept / "new") == 2


@pytest.mark.parametrize("monitor", ["val/acc", "val/f1"])
def test_another_metric_neither_picks_nor_deletes_the_best_by_the_old_one(
    kept: Path, monitor: str
) -> None:
    """The loss of 0.1.0's scores is lower at step 3 than at step 6; as an accuracy it is worse.

    It did not measure F1.
    """
    by_acc = f"--trainer.monitor={monitor}"
    folder = kept / "interrupted" / "checkpoints"
    before = sorted(folder.iterdir())
    assert cli.main(["test", "--run.output=interrupted", NET, by_acc]) == 0
    by_other = numbers(kept / "interrupted" / "report" / "test.json")
    assert sorted(folder.iterdir()) == before
    [best] = folder.glob("step-00000003-*.ckpt")
    assert cli.main(["test", "--run.output=interrupted", NET, f"--ckpt_path={best}"]) == 0
    assert numbers(kept / "interrupted" / "report" / "test.json") == by_other

    assert cli.main([*FIT, "--run.output=interrupted", by_acc]) == 0
    assert best.exists(), "the best by the loss"
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    scores = {(r["step"], r["monitor"], r["mode"]) for r in records if r["score"] is not None}
    assert {(3, "val/loss", "min"), (12, monitor, "max")} <= scores
