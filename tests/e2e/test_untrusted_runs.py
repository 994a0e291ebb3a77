"""Attacks by a run folder or a checkpoint that somebody else has made, on the real commands."""

import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightship import cli
from tests.support.forged import BOMBS, forge_checkpoint, forge_payload, forge_record, records
from tests.support.images import little_set, put

COMMANDS = ("test", "validate", "predict", "export")
TRAP = """
import pathlib
from tests.support.own_nets import pooled_linear
pathlib.Path(__file__).with_name("fired").touch()
def build(num_classes):
    return pooled_linear(num_classes)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("images")
    return put(str(root), little_set(("train", "val", "test"), per_class=8))


@pytest.fixture(scope="module")
def flags(images: str) -> list[str]:
    """Of a fit of two epochs."""
    return [
        f"--data.root={images}", "--run.tracking=none", "--data.image_size_px=16",
        "--data.global_batch_size=6", "--trainer.max_epochs=2", "--run.log_images=0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main(["fit", *flags, f"--run.output={run}"]) == 0
    return run


@pytest.fixture
def desk(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of the run, to be forged, in `run`, and a module `trap`."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "trap.py").write_text(TRAP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("trap", None)
    return tmp_path


@pytest.fixture
def resume(flags: list[str]) -> list[str]:
    """A fit that resumes the run, saves often and so deletes old checkpoints."""
    more = ["--run.output=run", "--trainer.max_epochs=4", "--run.checkpoint_every_steps=2"]
    return ["fit", *flags, *more]


def ends(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 78) -> str:
    """The error line of a command that must end with `code`, without a traceback."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == code
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed.splitlines()[-1] if printed else ""


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- what a run deletes ------------------------------------------------------------------------

FILES: dict[str, Callable[[Path], str]] = {
    "above": lambda desk: "../../victim.txt",
    "absolute": lambda desk: str(desk / "victim.txt"),
    "URL": lambda desk: f"file://{desk}/victim.txt",
    "chain": lambda desk: f"zip://x::{desk}/victim.txt",
    "NUL": lambda desk: "../../victim.txt\0.ckpt",
    "of the user": lambda desk: "notes.ckpt",
    "in a folder": lambda desk: "mine/step-00000001-00001-abcdef-1.ckpt",
    "another checkpoint": lambda desk: sorted((desk / "run/checkpoints").glob("*.ckpt"))[-1].name,
    "the pattern and a line": lambda desk: "step-00000001-00001-abcdef-1.ckpt\n",
    "a list": lambda desk: ["../../victim.txt"],  # type: ignore[return-value, dict-item]
}


@pytest.mark.parametrize("name", FILES)
def test_a_record_that_names_another_file_deletes_nothing(
    desk: Path, resume: list[str], name: str
) -> None:
    mine = desk / "run" / "checkpoints"
    kept = [
        desk / "victim.txt", mine / "notes.ckpt", mine / "step-by-step.txt",
        mine / "mine" / "step-00000001-00001-abcdef-1.ckpt", mine / "notes.commit.json",
    ]  # fmt: skip
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    good = records(desk / "run")[-1]
    payload = good.with_name(good.name.replace(".commit.json", ".ckpt")).read_bytes()
    forge_record(records(desk / "run")[0], file=FILES[name](desk))
    assert cli.main(resume) == 0
    assert [path.read_text() for path in kept] == ["precious"] * len(kept)
    left = [path for path in mine.glob("step-0*.ckpt") if path.read_bytes() == payload]
    assert [path.name for path in left] == [good.name.replace(".commit.json", ".ckpt")]


# ---- the net -----------------------------------------------------------------------------------


NAMED = [(command, "trap:build") for command in COMMANDS]
NAMED += [("test", "os:_exit"), ("predict", "pydoc:browse")]


@pytest.mark.parametrize(("command", "net"), NAMED)
def test_a_checkpoint_names_no_code_to_run(desk: Path, command: str, net: str, capsys) -> None:
    for path in records(desk / "run"):
        forge_checkpoint(path, lambda content: content["hyper_parameters"].update(net=net))
    config = desk / "run" / "config.yaml"
    text = config.read_text().replace("net: litcnn", f"net: {net}\n  trust: true")
    config.write_text(text)
    line = ends(capsys, command, "--run.output=run")
    assert f"--model.net {net} or --model.trust true" in line
    assert not (desk / "fired").exists()
    line = ends(capsys, command, "--run.output=run", "--model.net=math:floor")
    assert "and --model.net is math:floor" in line
    [url] = [str(path) for path in (desk / "run" / "checkpoints").glob("step-00000008*.ckpt")]
    table = ["--predictions=t.csv"] if command == "predict" else []
    line = ends(capsys, command, "--run.output=run", f"--ckpt_path={url}", *table)
    assert f"--model.net {net}" in line
    assert not (desk / "fired").exists()


def test_ones_own_net_is_run_where_it_is_named(desk: Path, flags: list[str], capsys) -> None:
    own = ["fit", *flags, "--run.output=own", "--model.net=trap:build"]
    assert cli.main([*own, "--trainer.max_epochs=1"]) == 0
    assert cli.main(own) == 0, "the same net resumes it"
    line = ends(capsys, "test", "--run.output=own")
    assert "add --model.net trap:build or --model.trust true" in line
    (desk / "own.yaml").write_text("model: {net: 'trap:build'}")
    for named in ("--model.net=trap:build", "--model.trust=true", "--config=own.yaml"):
        assert cli.main(["test", "--run.output=own", named]) == 0


# ---- links -------------------------------------------------------------------------------------

OWN_NAME = "step-00000001-00001-abcdef-1.ckpt"
OWN_FEATURES = f"{'c' * 32}-00000.npz"


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """All that lies below a folder: the bytes of files, and where links lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture
def victim(desk: Path) -> Path:
    """A folder outside the run whose files are named as lightship names its own."""
    folder = desk / "victim"
    for name in (
        OWN_NAME, OWN_NAME.replace(".ckpt", ".commit.json"), "attempt", "parts.json",
        f"000000-{'a' * 12}.jsonl", f".{'b' * 32}.lightship-tmp", "report.html", "test.json",
        "metrics.csv", "model.pt2", "wandb/settings", "DONE",
    ):  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    return folder


@pytest.mark.parametrize(
    "folder",
    ["checkpoints", "data", "export", "features/train", "logs", "logs/wandb", "report"],
)
def test_a_folder_that_is_a_link_is_not_written_through(
    desk: Path, victim: Path, resume: list[str], capsys, folder: str
) -> None:
    link = desk / "run" / folder
    if link.exists():
        shutil.copytree(link, victim, dirs_exist_ok=True)
        shutil.rmtree(link)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(victim, target_is_directory=True)
    before = snapshot(victim)
    for arguments in (resume, ["test", "--run.output=run"], ["export", "--run.output=run"]):
        assert f"{folder} is a link" in ends(capsys, *arguments)
    assert snapshot(victim) == before


def test_links_to_files_are_replaced_not_followed(
    desk: Path, victim: Path, resume: list[str]
) -> None:
    """Of soft and hard links alike: what they lead to stays as it is."""
    run, before = desk / "run", {}
    written = [
        "config.yaml", "DONE", "checkpoints/attempt", "logs/metrics.csv", "logs/starts.json",
        "report/report.html", "report/report.json", "report/test.json", "predictions.csv",
        "export/model.pt2", "logs/tracking_id", *(f"checkpoints/{p.name}" for p in records(run)),
        *(f"checkpoints/{p.name}" for p in (run / "checkpoints").glob("*.ckpt")),
    ]  # fmt: skip
    for number, name in enumerate(written):
        path, to = run / name, victim / f"{number}"
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            shutil.move(path, to)
        else:
            to.write_text("precious")
        os.link(to, path) if number % 2 else path.symlink_to(to)
    before = snapshot(victim)
    assert cli.main(resume) == 0
    for name in COMMANDS:
        assert cli.main([name, "--run.output=run"]) == 0
    assert snapshot(victim) == before
    assert not [name for name in written if "step-" not in name and (run / name).is_symlink()]


def test_what_is_set_aside_is_not_copied_from_elsewhere(
    desk: Path, victim: Path, resume: list[str]
) -> None:
    """A copy of a secret would lie in a folder that is given back."""
    for name in ("DONE", "logs/starts.json", "logs/metrics.csv", "logs/tracking_id"):
        (desk / "run" / name).unlink(missing_ok=True)
        (desk / "run" / name).symlink_to(victim / "DONE")
    assert cli.main(resume) == 0
    left = [path for path in (desk / "run").rglob("*") if path.is_file() and not path.is_symlink()]
    assert not [path for path in left if b"precious" in path.read_bytes()]


@pytest.mark.parametrize("kind", ["pipe", "zeros"])
@pytest.mark.parametrize(
    "name", ["config.yaml", "DONE", "checkpoints/attempt", "record", "payload", "logs/starts.json"]
)
def test_what_is_no_file_is_not_waited_for(
    desk: Path, resume: list[str], capsys, kind: str, name: str
) -> None:
    newest = records(desk / "run")[-1]
    payload = newest.name.replace(".commit.json", ".ckpt")
    places = {"record": newest, "payload": newest.with_name(payload)}
    path = places.get(name, desk / "run" / name)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    began_s = time.monotonic()
    code = cli.main(resume)
    printed = capsys.readouterr().err
    assert code in (0, 78)
    assert "Traceback" not in printed
    assert time.monotonic() - began_s < 90, "a bound against hanging: storage waits for 120 s"


# ---- what is the user's ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "DONE", "report/report.html", "logs/metrics.csv", "logs/tracking_id"],
)
def test_an_output_with_files_that_are_not_a_runs_is_refused(
    desk: Path, flags: list[str], capsys, name: str
) -> None:
    path = desk / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("model: {net: litcnn}\n")
    (desk / "mine" / "notes.txt").write_text("precious")
    before = snapshot(desk / "mine")
    assert "config.yaml" in ends(capsys, "fit", *flags, "--run.output=mine")
    assert snapshot(desk / "mine") == before


def test_other_files_in_an_output_stay(desk: Path, flags: list[str]) -> None:
    mine = {
        "notes.txt", "checkpoints/step-by-step.txt", "checkpoints/old.ckpt", "data/a.png",
        "checkpoints/best/step-00000001-00001-abcdef-1.ckpt", "logs/run.log", ".a.lightship-tmp",
        f"code/.{'a' * 32}.lightship-tmp", "report/figure.png", "predictions.csv.parts/notes.txt",
        "features/notes.txt", "features/train/notes.txt", "features/mine/" + OWN_FEATURES,
        "predictions.csv.parts/000000-aaaa.jsonl", f"predictions.csv.parts/old/0-{'a' * 12}.jsonl",
    }  # fmt: skip
    for name in mine:
        path = desk / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    before = snapshot(desk / "mine")
    (desk / "elsewhere").mkdir()
    (desk / "elsewhere" / OWN_FEATURES).write_text("precious")
    for link in ("features/old", "features/train/old"):
        (desk / "mine" / link).symlink_to(desk / "elsewhere", target_is_directory=True)
    for arguments in (["fit", *flags], ["test"], ["predict"], ["export"]):
        assert cli.main([*arguments, "--run.output=mine"]) == 0
    after = snapshot(desk / "mine")
    assert {name: after.get(name) for name in mine} == before
    assert (desk / "elsewhere" / OWN_FEATURES).read_text() == "precious"


# ---- what a run's files ask for ----------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["compressed", "a view of 10^12", "doubled 60 times", "nested more deeply", "sparse"]
)
def test_a_checkpoint_that_asks_for_more_than_it_holds_ends_in_a_line(
    desk: Path, resume: list[str], capsys, name: str
) -> None:
    payload = BOMBS[name]()
    for path in records(desk / "run"):
        forge_payload(path, payload)
    before = snapshot(desk / "run" / "checkpoints")
    for arguments in (resume, ["test", "--run.output=run"]):
        assert "step-00000" in ends(capsys, *arguments)
    assert snapshot(desk / "run" / "checkpoints") == before


def _set(*keys: str, to: object) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for key in keys[:-1]:
            content = content[int(key)] if isinstance(content, list) else content[key]
        content[keys[-1]] = to

    return change


HYPER = "hyper_parameters"
EVALUATED: dict[str, Callable[[dict], None]] = {
    "a net of 10^9 classes": _set(HYPER, "class_names", to=[f"class {i}" for i in range(5000)]),
    "images of 4,096 px": _set(HYPER, "image_size_px", to=4096),
    "images of 10^9 px": _set(HYPER, "image_size_px", to=10**9),
    "a net that is a tensor": _set(HYPER, "net", to=torch.ones(3)),
    "a net with a line break": _set(HYPER, "net", to="litcnn\nlightship: done"),
    "class names that are numbers": _set(HYPER, "class_names", to=[1, 2, 3]),
    "no class names": _set(HYPER, "class_names", to=[]),
    "a mean of NaN": _set(HYPER, "mean", to=[float("nan")] * 3),
    "a mean of one": _set(HYPER, "mean", to=[0.5]),
    "hyper-parameters that are none": _set(HYPER, to=[1]),
    "weights that are a list": _set("state_dict", to=[torch.ones(3)]),
    "a weight that is a text": _set("state_dict", "net.0.bias", to="0"),
    "a weight of complex numbers": _set("state_dict", "net.0.bias", to=torch.ones(32) * 1j),
    "a weight of another shape": _set("state_dict", "net.0.bias", to=torch.ones(31)),
}
RESUMED: dict[str, Callable[[dict], None]] = {
    "a moment of another shape": _set(
        "optimizer_states",
        "0",
        "state",
        0,
        "exp_avg",
        to=torch.ones(7),  # type: ignore[arg-type]
    ),
    "no optimizer states": _set("optimizer_states", to=[]),
    "an optimizer state of text": _set("optimizer_states", to="x"),
    "other parameters": _set("optimizer_states", to=[{"state": {}, "param_groups": []}]),
    "a step below 0": _set("global_step", to=-5),
    "a step of text": _set("global_step", to="8"),
    "an epoch of 10^30": _set("epoch", to=10**30),
    "no loops": _set("loops", to={}),
    "loops of text": _set("loops", to="x"),
    "counters of text": _set("loops", "fit_loop", "epoch_progress", "current", "ready", to="2"),
    "no counters": _set("loops", "fit_loop", "epoch_progress", to={}),
    "schedulers of text": _set("lr_schedulers", to=["x"]),
    "a scheduler of NaN": _set("lr_schedulers", to=[{"last_epoch": float("nan")}]),
    "metrics of text": _set("lightship", "metrics", to="x"),
    "metrics without steps": _set("lightship", "metrics", to=[{"val/acc": 1.0}]),
    "sums of another shape": _set("train_sums", to=torch.ones(5)),
    "no facts": _set("lightship", to=[]),
}


@pytest.mark.parametrize("name", EVALUATED)
def test_a_checkpoint_of_wrong_values_is_not_evaluated(desk: Path, capsys, name: str) -> None:
    for path in records(desk / "run"):
        forge_checkpoint(path, EVALUATED[name])
    before = peak_mib()
    ends(capsys, "test", "--run.output=run")
    assert peak_mib() - before < 1024


@pytest.mark.parametrize("name", ["a net that is a tensor", "no class names", *RESUMED])
def test_a_checkpoint_of_wrong_values_is_not_resumed_from(
    desk: Path, resume: list[str], capsys, name: str
) -> None:
    for path in records(desk / "run"):
        forge_checkpoint(path, {**EVALUATED, **RESUMED}[name])
    ends(capsys, *resume)


RECORDS: dict[str, object] = {
    "not a number": {"score": float("nan")},
    "too large a number": {"score": 10**400},
    "text for a number": {"step": "8"},
    "a step below 0": {"step": -1},
    "a step of 10^30": {"step": 10**30},
    "true for a number": {"save": True},
    "a size of 10^18": {"size_bytes": 10**18},
    "an attempt of 5,000 digits": {"attempt": "9" * 5000 + "-abcdef"},
    "an attempt of another alphabet": {"attempt": chr(0x661) * 5 + "-abcdef"},
    "a mode of its own": {"mode": ["min"]},
    "a metric with a line break": {"monitor": "val/loss\nlightship: done"},
    "a sum of text": {"sha256": ["x"]},
    "nested deeply": {"more": [[[[[[[[[]]]]]]]]]},
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_wrong_values_is_passed_over(
    desk: Path, resume: list[str], capsys, name: str
) -> None:
    newest = records(desk / "run")[-1]
    (desk / "run" / "DONE").unlink()
    forge_record(newest, **RECORDS[name])  # type: ignore[arg-type]
    assert cli.main(resume) == 0
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    if name != "nested deeply":  # which is a field of another version
        assert f"{newest.name} is corrupt; using the previous checkpoint" in printed


SETTINGS: dict[str, Callable[[], bytes]] = {
    "a billion laughs": lambda: (
        b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + b"".join(
            b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10))
            for i in range(9)
        )
    ),
    "merged many times": lambda: (
        b"a: &a {x: 1}\n"
        + b"".join(
            b"%c: &%c {<<: [%s]}\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10))
            for i in range(9)
        )
    ),
    "within itself": lambda: b"a: &a [*a]\n",
    "nested deeply": lambda: b"[" * 100_000,
    "a function of Python": lambda: b"a: !!python/object/apply:os.system ['touch fired']\n",
    "a module of Python": lambda: b"a: !!python/module:trap\n",
    "a megabyte": lambda: b"a: 1\n#" + b"x" * 2**20,
    "a number of 10^5 digits": lambda: b"run: {seed: " + b"9" * 100_000 + b"}\n",
    "hexadecimal digits": lambda: b"run: {seed: 0x" + b"f" * 9_000 + b"}\n",
    "sixties": lambda: b"run: {seed: 1" + b":59" * 3_000 + b"}\n",
    "bytes": lambda: bytes(range(256)),
    "a text for a section": lambda: b"run: [1]\nversion: 1\n",
    "NaN": lambda: b"data: {val_fraction: .nan}\nversion: 1\n",
    "a list for a root": lambda: b"data: {root: [1, 2]}\nversion: 1\n",
    "another version": lambda: b"version: .inf\n",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_config_that_asks_for_too_much_is_refused(desk: Path, capsys, name: str) -> None:
    (desk / "run" / "config.yaml").write_bytes(SETTINGS[name]())
    before = peak_mib()
    ends(capsys, "test", "--run.output=run")
    assert peak_mib() - before < 200
    assert not (desk / "fired").exists()
