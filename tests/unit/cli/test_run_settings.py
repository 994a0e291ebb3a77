"""Which run a command is on, and with what settings, however that was given."""

from pathlib import Path

import pytest
import yaml

from lightship import cli
from lightship.config import Config
from lightship.run import config_file


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, `one` and `two`, of val_fraction 0.3 and 0.2."""
    monkeypatch.chdir(tmp_path)
    for name, fraction in (("one", 0.3), ("two", 0.2)):
        settings = Config()
        settings.run.output, settings.data.root = name, "set"
        settings.data.val_fraction = fraction
        config_file.write(name, settings)
        (tmp_path / f"{name}.yaml").write_text(f"run: {{output: {name}}}")
    return tmp_path


WAYS = {
    "flag": ["--run.output=two"],
    "flag and value": ["--run.output", "two"],
    "slash": ["--run.output=two/"],
    "YAML": ["--config=two.yaml"],
    "YAML, the later": ["--config=one.yaml", "--config", "two.yaml"],
    "flags, the later": ["--run.output=one", "--run.output", "two"],
    "flag before YAML": ["--run.output=two", "--config=one.yaml"],
    "section": ['--run={"output": "two"}'],
    "section after a flag": ["--run.output=one", "--run", '{"output": "two"}'],
    "its own config": ["--config=two/config.yaml"],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["test", "validate", "predict", "export"])
def test_the_settings_are_those_of_the_run(runs: Path, name: str, way: str) -> None:
    command = cli.parse([name, *WAYS[way]])
    assert command is not None
    settings = command.config
    assert (settings.run.output.rstrip("/"), settings.data.val_fraction) == ("two", 0.2)
    assert settings.data.root == "set"
    assert command.is_on_its_data


def test_other_configs_and_flags_win_over_the_run(runs: Path) -> None:
    (runs / "more.yaml").write_text("data: {cache_gib: 1, eval_batch_size: 3}")
    flags = ["--run.output=one", "--config=more.yaml", "--data.eval_batch_size=7"]
    settings = cli.parse(["test", *flags]).config
    assert (settings.data.cache_gib, settings.data.eval_batch_size) == (1, 7)
    command = cli.parse(["test", *flags, "--data.root=other"])
    assert not command.is_on_its_data


@pytest.mark.parametrize("flags", [["--run.output="], ["--config=empty.yaml"]])
@pytest.mark.parametrize("name", ["fit", "test"])
def test_an_empty_output_is_refused(runs: Path, capsys, name: str, flags: list[str]) -> None:
    (runs / "empty.yaml").write_text("run: {output: ''}")
    assert cli.main([name, *flags]) == 2
    assert "--run.output is empty" in capsys.readouterr().err


def test_images_that_were_trained_on_are_not_validated_on(runs: Path, capsys) -> None:
    for root in ([], ["--data.root=./set/"], [f"--data.root={runs}/set"]):
        flags = ["validate", "--run.output=one", "--data.val_fraction=0.5", *root]
        assert cli.main(flags) == 78
        error = capsys.readouterr().err
        assert "--data.val_fraction is 0.5, and the run held out 0.3" in error
    other = cli.parse(
        ["validate", "--run.output=one", "--data.val_fraction=0.5", "--data.root=new"]
    )
    assert other.config.data.val_fraction == 0.5
    same = cli.parse(["validate", "--run.output=one", "--data.val_fraction=0.3"])
    assert same.config.data.val_fraction == 0.3


TWICE = [
    ("data: {flip: true}\noptim: {lr: 1}\ndata: {root: x}\n", "has 'data' twice, in lines 1 and 3"),
    ("data:\n  root: x\n  flip: true\n  root: y\n", "has 'root' twice, in lines 2 and 4"),
    ("data: {root: x, root: y}", "has 'root' twice, in lines 1 and 1"),
    ("optim:\n  lr: {a: {b: 1, b: 2}}\n", "has 'b' twice, in lines 2 and 2"),
]


@pytest.mark.parametrize(("text", "line"), TWICE)
def test_a_key_written_twice_is_refused(runs: Path, capsys, text: str, line: str) -> None:
    (runs / "twice.yaml").write_text(text)
    assert cli.main(["fit", "--config=twice.yaml"]) == 2
    assert f"--config twice.yaml {line}: keep one" in capsys.readouterr().err


def test_a_merged_key_may_be_written_over(runs: Path) -> None:
    text = "data: &base {flip: true, cutout_px: 2}\noptim: {lr: 0.5}\n"
    (runs / "merged.yaml").write_text(text + "trainer: {max_epochs: 2}\n")
    assert cli.parse(["fit", "--config=merged.yaml"]).config.data.cutout_px == 2
    from lightship import strict_yaml

    merged = strict_yaml.load("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\nc: {<<: *a}\n")
    assert merged == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize("deep", ["[" * 20_000, "a: " + "{a: " * 20_000])
def test_deeply_nested_settings_are_refused(runs: Path, capsys, deep: str) -> None:
    (runs / "deep.yaml").write_text(deep)
    assert cli.main(["fit", "--config=deep.yaml"]) == 2
    assert "--config deep.yaml is nested too deeply" in capsys.readouterr().err
    assert cli.main(["fit", f"--data.root={'[' * 20_000}"]) in (2, 65, 78)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fit", "doctor"])
def test_printed_settings_hold_no_credentials(runs: Path, capsys, name: str) -> None:
    flags = [
        "--data.root=s3://key:hidden-one@host/set",
        "--model.weights=https://host/w.pth?X-Amz-Signature=hidden-two",
        "--run.output=https://user:hidden-three@host/run",
    ]
    assert cli.main([name, *flags, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "hidden" not in printed
    assert yaml.safe_load(printed)["data"]["root"] == "s3://***@host/set"


@pytest.mark.parametrize("name", ["predict", "export"])
def test_without_a_run_the_flag_that_is_needed_is_named(runs: Path, capsys, name: str) -> None:
    assert cli.main([name, "--ckpt_path=x.ckpt"]) == 2
    error = capsys.readouterr().err
    flag = {"predict": "--predictions", "export": "--export"}[name]
    assert f"lightship {name} without a run needs {flag}" in error
    assert "--run.output" not in error
    assert cli.parse([name, "--ckpt_path=x.ckpt", f"{flag}=out.csv"]) is not None


def test_what_describes_the_machine_is_not_taken_from_the_run(runs: Path) -> None:
    """A run's folder may come from anywhere: it may not raise limits, nor choose devices or W&B."""
    settings = Config()
    settings.run.output, settings.run.tracking, settings.run.log_format = "one", "offline", "json"
    settings.data.max_image_pixels, settings.data.prefetch_gib = 10**12, 1e6
    settings.data.eval_batch_size, settings.data.on_error = 2**20, "skip"
    settings.data.cache_gib, settings.data.decode_threads = 1e6, 1024
    settings.trainer.devices, settings.trainer.monitor = "999", "val/acc"
    settings.model.label_smoothing = 0.25
    config_file.write("one", settings)
    path = runs / "one" / "config.yaml"
    path.write_text(path.read_text().replace("net: litcnn", "net: litcnn\n  trust: true"))
    command = cli.parse(["test", "--run.output=one"])
    assert command is not None
    expected = Config()
    expected.run.output = "one"
    expected.data.on_error, expected.trainer.monitor = "skip", "val/acc"
    expected.model.label_smoothing = 0.25
    assert command.config == expected


@pytest.mark.parametrize("named", [[], ["--data.root=set"], ["--predictions=here.csv"]])
def test_a_remote_run_does_not_choose_the_local_images_that_it_is_told_of(
    runs: Path, capsys, named: list[str]
) -> None:
    settings = Config()
    settings.run.output, settings.data.root = "memory://elsewhere/run", "set"
    config_file.write(settings.run.output, settings)
    flags = ["predict", f"--run.output={settings.run.output}", *named]
    if named:
        assert cli.parse(flags) is not None
    else:
        assert cli.main(flags) == 78
        assert "add --data.root set" in capsys.readouterr().err


def test_a_recipe_is_the_packages_whatever_lies_in_the_working_directory(runs: Path) -> None:
    (runs / "digits").write_text("model: {net: 'os:system'}")
    (runs / "digits.yaml").write_text("model: {net: 'os:system'}")
    assert cli.parse(["fit", "--config", "digits"]).config.model.net == "litcnn"
    assert cli.parse(["fit"]).config.model.net == "litcnn"


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The checksum of `set.tar.gz`: in `md5.yaml`, in `both.yaml` with its root, and in a run."""
    monkeypatch.chdir(tmp_path)
    md5 = "0123456789abcdef" * 2
    Path("md5.yaml").write_text(f"data: {{root_md5: {md5}}}")
    Path("both.yaml").write_text(f"data: {{root: set.tar.gz, root_md5: {md5}}}")
    Path("other.yaml").write_text("data: {root: other.tar.gz}")
    settings = Config()
    settings.data.root, settings.data.root_md5 = "https://host/set.tar.gz?X-Amz-Signature=1", md5
    config_file.write("run", settings)
    return md5


@pytest.mark.parametrize(
    ("arguments", "is_kept"),
    [
        ("fit --config=md5.yaml --data.root=set.tar.gz", True),
        ("fit --config=md5.yaml --config=other.yaml", True),
        ("fit --config=both.yaml --data.root=./set.tar.gz", True),
        ("fit --config=both.yaml --config=other.yaml --data.root=set.tar.gz", True),
        ("fit --config=both.yaml --data.root=other.tar.gz", False),
        ("fit --config=both.yaml --config=other.yaml", False),
        ("test --run.output=run --data.root=https://host/set.tar.gz?X-Amz-Signature=2", True),
        ("test --run.output=run --data.root=https://host/new.tar.gz", False),
        ("test --run.output=run --config=other.yaml", False),
        ("test --run.output=run --config=both.yaml", True),
    ],
)
def test_a_checksum_is_kept_for_its_root(archive: str, arguments: str, is_kept: bool) -> None:
    command = cli.parse(arguments.split())
    assert command is not None
    assert command.config.data.root_md5 == (archive if is_kept else None)


COMMANDS_ON_A_MODEL = ["test", "validate", "predict", "export"]


@pytest.mark.parametrize("name", COMMANDS_ON_A_MODEL)
def test_settings_of_training_are_not_ignored(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Config()
    settings.model.net, settings.model.weights, settings.data.root = "resnet18", "w.pth", "set"
    config_file.write("run", settings)
    run = [name, "--run.output=run"]
    for other in ("--model.weights=best.ckpt", "--config=other.yaml"):
        Path("other.yaml").write_text("model: {weights: best.ckpt}")
        assert cli.main([*run, other]) == 78
        error = capsys.readouterr().err
        assert "--model.weights is best.ckpt" in error
        assert "another checkpoint: --ckpt_path" in error
    assert cli.main([*run, "--model.compile=default"]) == 78
    assert (
        f"--model.compile is default; lightship {name} does not compile" in capsys.readouterr().err
    )
    same = cli.parse([*run, "--model.weights=w.pth", "--model.compile=none"])
    assert same is not None
    files = {"predict": ["--predictions=t.csv"], "export": ["--export=m.pt2"]}
    if name in files:
        alone = [name, "--ckpt_path=a.ckpt", *files[name]]
        assert cli.parse([*alone, "--config=other.yaml"]) is not None
        assert cli.main([*alone, "--model.weights=best.ckpt"]) == 78


@pytest.mark.parametrize("name", ["test", "validate", "predict"])
@pytest.mark.parametrize(
    ("key", "value"), [("crop_min_area", 0.35), ("sizes_px", [16, 32])], ids=str
)
def test_a_run_on_random_crops_is_evaluated_resident(
    name: str, key: str, value: object, tmp_path: Path, capsys
) -> None:
    settings = Config()
    settings.data.root, settings.data.image_size_px = "set", 32
    setattr(settings.data, key, value)
    output = str(tmp_path / "run")
    config_file.write(output, settings)
    flags = ["--data.mode=resident", f"--run.output={output}"]
    command = cli.parse([name, *flags])
    assert command is not None
    assert command.config.data.mode == "resident"
    flag = f"--data.{key}={value}".replace(" ", "")
    assert cli.main(["fit", "--data.image_size_px=32", flag, *flags]) == 78
    assert "--data.mode resident does not keep" in capsys.readouterr().err


def test_a_number_of_devices_in_a_file(tmp_path: Path, capsys) -> None:
    for text, devices in (("2", "2"), ("'2'", "2"), ("auto", "auto")):
        (tmp_path / "a.yaml").write_text(f"trainer: {{devices: {text}}}")
        command = cli.parse(["fit", f"--config={tmp_path}/a.yaml"])
        assert command is not None
        assert command.config.trainer.devices == devices
    (tmp_path / "a.yaml").write_text("trainer: {devices: 0}")
    assert cli.main(["fit", f"--config={tmp_path}/a.yaml"]) == 78
    assert "it must be 'auto' or a number of at least 1" in capsys.readouterr().err
