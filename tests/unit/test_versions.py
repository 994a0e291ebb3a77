"""Files of other versions: what they lack means what it meant, and newer ones are refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightship import cli, config, versions
from lightship.config import Config, bounded, plain_root
from lightship.errors import ConfigError
from lightship.models.classifier import ImageClassifier
from lightship.models.hyper_parameters import complete
from lightship.run import config_file as kept
from lightship.run.folder import RunFolder
from tests.support.little_fit import classifier


@pytest.fixture
def a_new_setting(monkeypatch: pytest.MonkeyPatch) -> str:
    """As if this code had a setting more than what wrote the files: `optim.new_part`, 0.5."""

    @dataclasses.dataclass
    class Optim(config.OptimConfig):
        new_part: float = bounded(0.5, 0, 1)

    @dataclasses.dataclass
    class Settings(Config):
        optim: Optim = dataclasses.field(default_factory=Optim)

    monkeypatch.setattr(versions, "Config", Settings)
    monkeypatch.setattr(kept, "Config", Settings)
    return "optim.new_part"


HASHES = [
    (["--data.root=digits"], "6aea3c05"),
    (["--data.root=images"], "7ed7e1c4"),
    (
        [
            "--data.root=s3://bucket/images", "--model.net=resnet18", "--model.weights=default",
            "--optim.lr=0.5", "--data.flip=true", "--trainer.precision=bf16-mixed",
        ],
        "b4d5e5d0",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "digits"), HASHES)
def test_a_run_has_the_name_that_0_1_0_gave_it(flags: list[str], digits: str) -> None:
    command = cli.parse(["fit", *flags])
    assert command is not None
    assert command.config.run.output.endswith(f"-{digits}")


def test_a_new_setting_is_part_of_the_name_only_where_it_does_something(a_new_setting) -> None:
    settings = versions.Config()
    assert versions.identity_hash(settings) == versions.identity_hash(Config())
    settings.optim.new_part = 0.25
    assert versions.identity_hash(settings) != versions.identity_hash(Config())


def test_what_an_older_config_lacks_means_what_it_meant(
    tmp_path: Path, a_new_setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.write(str(tmp_path), Config())
    assert kept.read(str(tmp_path))["optim"]["new_part"] == 0.5
    monkeypatch.setitem(versions.MEANT, a_new_setting, 0.0)
    assert kept.read(str(tmp_path))["optim"]["new_part"] == 0.0


def test_a_run_of_an_older_version_is_the_same_run(
    tmp_path: Path, a_new_setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.write(str(tmp_path), Config())
    settings = versions.Config()
    settings.run.output = str(tmp_path)
    RunFolder(settings).refuse_another_run("a run")
    settings.optim.new_part = 0.25
    with pytest.raises(ConfigError, match=r"optim.new_part was 0.5, now 0.25"):
        RunFolder(settings).refuse_another_run("a run")


def config_file(tmp_path: Path, change: Any) -> Path:
    kept.write(str(tmp_path), Config())
    path = tmp_path / "config.yaml"
    text = path.read_text()
    path.write_bytes(change(text) if callable(change) else change)
    return path


def with_key(section: str | None, **more: Any) -> Any:
    def change(text: str) -> bytes:
        content = yaml.safe_load(text)
        (content[section] if section else content).update(more)
        return yaml.safe_dump(content).encode()

    return change


WRONG_FILES = {
    "newer": (with_key(None, version=99), "has version 99 .* upgrade lightship"),
    "a key of a newer version": (with_key("optim", sgd_x=1), "optim.sgd_x, .* upgrade lightship"),
    "a section of a newer version": (with_key(None, loss={"a": 1}), "key loss, .* upgrade"),
    "empty": (b"", "holds no settings; restore the file"),
    "bytes": (b"\x80run: \x00", "is not YAML"),
    "text": (b"hello", "holds no settings"),
    "deep": (b"[" * 30_000, "is nested too deeply"),
    "cut": (lambda text: text[: text.index("optim:")].encode(), "is damaged: it lacks optim"),
    "cut in a line": (lambda text: text[: text.index("momentum")].encode(), "is damaged"),
    "text for a number": (
        with_key("trainer", max_epochs="many"),
        "trainer.max_epochs is 'many'; it must be a whole",
    ),
    "null for a number": (with_key("trainer", max_epochs=None), "trainer.max_epochs is null"),
    "NaN for a count": (with_key("trainer", max_steps=math.nan), "trainer.max_steps is nan"),
    "no metric": (with_key("trainer", monitor=3), "trainer.monitor is 3; it must be"),
    "a list for a count": (
        with_key("trainer", early_stopping_patience=[1]),
        r"early_stopping_patience is \[1\]; ",
    ),
    "out of its range": (with_key("data", val_fraction=2), "data.val_fraction is 2; it must be"),
    "a count of 10,000 digits": (
        lambda text: text.replace("max_steps: -1", f"max_steps: 0x{'f' * 9000}").encode(),
        "trainer.max_steps does not fit",
    ),
    "no fields": (lambda text: b"run: 3\ndata: {}\n", "run must hold fields"),
}


@pytest.mark.parametrize("what", WRONG_FILES)
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, capsys, what: str) -> None:
    change, text = WRONG_FILES[what]
    path = config_file(tmp_path, change)
    with pytest.raises(ConfigError, match=text) as error:
        kept.read(str(tmp_path))
    assert str(error.value).startswith(str(path))
    assert cli.main(["test", f"--run.output={tmp_path}"]) == 78
    assert str(path) in capsys.readouterr().err


def test_a_config_with_its_version_is_a_config_to_start_from(tmp_path: Path, capsys) -> None:
    path = config_file(tmp_path, lambda text: text.encode())
    command = cli.parse(["fit", "--config", str(path), "--run.output=x"])
    assert command is not None
    path.write_text("version: 99\ndata: {flip: true}")
    assert cli.main(["fit", "--config", str(path)]) == 78
    assert "upgrade lightship" in capsys.readouterr().err


def checkpoint() -> dict[str, Any]:
    model = classifier()
    return {"hyper_parameters": dict(model.hparams), "state_dict": model.state_dict()}


@pytest.mark.parametrize("lacks", ["test_shift", "label_smoothing", "optim"])
def test_hyper_parameters_that_an_older_version_lacks(lacks: str) -> None:
    older = checkpoint()
    del older["hyper_parameters"][lacks]
    model = ImageClassifier.from_checkpoint(older)
    assert not model.test_shift
    classifier(**{"optim": {}} if lacks == "optim" else {}).on_load_checkpoint(older)


def test_an_optimizer_setting_that_an_older_version_lacks() -> None:
    older = checkpoint()
    older["hyper_parameters"]["optim"] = {"name": "adam", "lr": 1e-3}
    full = dataclasses.asdict(config.OptimConfig(name="adam", lr=1e-3))
    classifier(optim=full).on_load_checkpoint(older)
    with pytest.raises(ConfigError, match=r"optim was .*, is"):
        classifier(optim={**full, "momentum": 0.5}).on_load_checkpoint(older)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"stem_path": 0.1}, "stem_path, .* upgrade lightship"),
        ({"optim": {"name": "adam", "polyak": 1}}, "optim.polyak, .* upgrade lightship"),
        ({"class_names": None}, "lack class_names"),
        ({"loss": "hinge"}, "hyper-parameter loss is 'hinge'"),
        ({"focal_gamma": -1.0}, "hyper-parameter focal_gamma is -1.0"),
        ({"class_weights": [1.0]}, "has 1 class_weights for . classes"),
        ({"class_weights": [-1.0]}, r"hyper-parameter class_weights is \[-1.0\]"),
        ({"class_weights": [0.5, math.nan]}, r"hyper-parameter class_weights is \[0.5, nan\]"),
        ({"class_weights": []}, r"hyper-parameter class_weights is \[\]"),
        ({"optim": [1]}, "not those of a lightship model"),
    ],
)
def test_hyper_parameters_that_cannot_be_understood(change: dict[str, Any], text: str) -> None:
    newer = checkpoint()
    newer["hyper_parameters"] |= change
    if change.get("class_names", "") is None:
        del newer["hyper_parameters"]["class_names"]
    with pytest.raises(ConfigError, match=text):
        ImageClassifier.from_checkpoint(newer)
    with pytest.raises(ConfigError, match=text):
        classifier().on_load_checkpoint(newer)


def test_weights_that_do_not_fit_the_net_are_named() -> None:
    changes: list[tuple[Any, str]] = [
        (lambda state: state.pop("net.0.bias"), r"it lacks net.0.bias"),
        (lambda state: state.update(extra=state["net.0.bias"]), "it has extra"),
        (lambda state: state.update({"net.0.bias": state["net.0.bias"][:3]}), r"is \[3\], the net"),
    ]
    for change, text in changes:
        other = checkpoint()
        other["state_dict"] = dict(other["state_dict"])
        change(other["state_dict"])
        with pytest.raises(ConfigError, match=text):
            ImageClassifier.from_checkpoint(other)
        with pytest.raises(ConfigError, match=text):
            classifier().on_load_checkpoint(other)


def test_complete_gives_every_argument() -> None:
    found = complete(ImageClassifier, checkpoint()["hyper_parameters"])
    assert set(found["optim"]) == {item.name for item in dataclasses.fields(config.OptimConfig)}
    ImageClassifier(**found)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("set/", "set"), ("./set", "set"), ("././set//", "set"), ("a//b/", "a/b"), ("/", "/"),
        ("/a/b/", "/a/b"), (".", "."), ("./", "."), ("../set/", "../set"), ("digits", "digits"),
        ("./digits", "./digits"), ("digits/", "./digits"), ("s3://bucket/set/", "s3://bucket/set"),
        ("s3://bucket/", "s3://bucket"), ("zip://a/::x.zip", "zip://a/::x.zip"),
        ("https://host/set/?key=a/", "https://host/set/?key=a/"), ("", ""), ("file:///", "file:///"),
    ],
)  # fmt: skip
def test_one_root_however_it_is_spelt(given: str, meant: str) -> None:
    assert plain_root(given) == meant
    assert plain_root(meant) == meant


def test_another_spelling_of_the_root_is_the_same_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Config()
    settings.data.root, settings.run.output = "set", "run"
    kept.write("run", settings)
    for spelling in ("set/", "./set", f"{tmp_path}/set", f"{tmp_path}/set/"):
        settings.data.root = spelling
        RunFolder(settings).refuse_another_run("a run")
    settings.data.root = f"{tmp_path}/other"
    with pytest.raises(ConfigError, match=f"data.root was 'set', now '{tmp_path}/other'"):
        RunFolder(settings).refuse_another_run("a run")


def test_a_run_that_0_1_0_named_with_a_slash_is_gone_on_with(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def output() -> str:
        command = cli.parse(["fit", "--data.root=set/"])
        assert command is not None
        return command.config.run.output

    named = output()
    older = f"runs/run-{versions.identity_hash(Config(), 'set/')}"
    assert named != older
    kept.write(older, Config())
    assert output() == older


def test_versions_are_plain_numbers_in_what_is_written(tmp_path: Path) -> None:
    kept.write(str(tmp_path), Config())
    written = (tmp_path / "config.yaml").read_text()
    assert json.loads(json.dumps(yaml.safe_load(written)))["version"] == 1
    assert written.endswith("version: 1\n"), "last: a file that was cut off lacks it"
