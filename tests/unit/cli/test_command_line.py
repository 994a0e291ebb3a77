"""The command line: what it understands, and the line and exit code for what it does not."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightship import cli
from lightship.cli import parse, parser
from lightship.cli.command_line import read_config
from lightship.config import Config, PackConfig, TrainerConfig, identity
from lightship.errors import ConfigError, LightshipError
from lightship.run import config_file
from lightship.versions import identity_hash


def lightship(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightship", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def settings(*arguments: str) -> Config:
    command = parse(["fit", *arguments])
    assert command is not None
    return command.config


WRONG = [
    (["fti"], 2, "unknown command 'fti'; did you mean fit?"),
    (["fit", "--data.rooot", "x"], 2, "unknown flag --data.rooot; did you mean --data.root?"),
    (["fit", "--lr", "1"], 2, "unknown flag --lr"),
    (["fit", "--data.global_batch_size", "many"], 2,
     "--data.global_batch_size is 'many'; it must be a whole number"),
    (["fit", "--optim.lr", "fast"], 2, "--optim.lr is 'fast'; it must be a number"),
    (["fit", "--data.flip", "maybe"], 2, "--data.flip is 'maybe'; it must be true or false"),
    (["fit", "--run.resume", "perhaps"], 2,
     "--run.resume is 'perhaps'; it must be one of auto, never, must"),
    (["fit", "--trainer.limit_val_batches", "x"], 2, "it must be a whole number or null"),
    (["fit", "--config"], 2, "--config needs a recipe, path or URL"),
    (["fit", "--data.flip"], 2, "--data.flip needs a value: true or false"),
    (["fit", "--data.mean", "--data.flip", "true"], 2,
     "--data.mean needs a value: a list of numbers or null"),
    (["test", "--ckpt_path"], 2, "--ckpt_path needs a value\n"),
    (["pack", "a", "b", "--quality"], 2, "--quality needs a value: a whole number or null"),
    (["fit", "--model", "resnet50"], 2, "--model is a section; did you mean --model.net?"),
    (["fit", "--data=images"], 2, "--data is a section; did you mean --data.root?"),
    (["fit", "--trainer", "5"], 2, "did you mean --trainer.max_epochs?"),
    (["fit", "--optim"], 2, "--optim is a section; did you mean --optim.name?"),
    (["test"], 2, "lightship test needs --run.output"),
    (["fit", "--config", "cifra10"], 78, "no such recipe; did you mean cifar10"),
    (["fit", "--config", "no/such.yaml"], 78, "--config no/such.yaml: no such file"),
    (["fit", "--data.global_batch_size", "0"], 78,
     "--data.global_batch_size is 0; it must be at least 1 and at most 1048576 images"),
    (["fit", "--data.val_fraction", "1.5"], 78, "--data.val_fraction is 1.5; it must be"),
    (["fit", "--trainer.max_epochs=-1"], 78, "would never end"),
    (["fit", "--trainer.devices", "some"], 78, "it must be 'auto' or a number"),
    (["fit", "--trainer.devices", "0"], 78, "'0'; it must be 'auto' or a number of at least 1"),
    (["fit", "--trainer.devices", "-1"], 78, "'-1'; it must be 'auto' or a number of at least 1"),
    (["fit", "--trainer.accumulate_grad_batches", "7"], 78, "is not divisible by"),
    (
        ["fit", "--model.grad_checkpointing=true", "--model.compile=default"], 78,
        "--model.grad_checkpointing true does not work with --model.compile default",
    ),
    (["fit", "--trainer.max_epochs=0"], 78, "--trainer.max_epochs is 0, which trains nothing"),
    (["fit", "--trainer.max_steps=0"], 78, "--trainer.max_steps is 0, which trains nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "line"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_wrong_input_is_told_in_a_line(capsys, arguments, code, line) -> None:
    assert cli.main(arguments) == code
    printed = capsys.readouterr()
    assert line in printed.err
    assert len(printed.err.splitlines()) <= 2
    assert printed.out == ""


def test_the_process_exits_with_the_code() -> None:
    result = lightship("fit", "--data.rooot", "x")
    assert result.returncode == 2
    assert "did you mean --data.root?" in result.stderr


def test_help_is_quick_and_names_every_command() -> None:
    """In CPU seconds of the child, which other load on the machine does not stretch."""
    code = (
        "import resource, subprocess, sys\n"
        "out = subprocess.run([sys.executable, '-m', 'lightship', '--help'], capture_output=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime); print(out.stdout.decode())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    seconds, _, text = result.stdout.partition("\n")
    assert float(seconds) < 1.5
    for command in parser.COMMANDS:
        assert f"  {command} " in text


@pytest.mark.parametrize("command", [name for name in parser.COMMANDS if name != "pack"])
def test_help_of_each_command_explains_every_field(capsys, command: str) -> None:
    assert cli.main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for key in identity(Config()):
        assert f"--{key}" in text
    assert "[at least 1 and at most 1048576 images]" in text
    assert "Images per optimizer step" in text
    assert "SUPPRESS" not in text


@pytest.mark.parametrize("name", parser.FROM_THE_START)
def test_help_has_the_defaults_of_the_settings_not_of_the_recipe_it_would_run(capsys, name) -> None:
    assert settings().trainer.max_epochs != TrainerConfig.max_epochs, "the recipe has another"
    assert cli.main([name, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Without --config and --data.root: the recipe digits" in text
    told = re.search(r"--trainer.max_epochs MAX_EPOCHS .*?default: (\S+)\)", text)
    assert told is not None
    assert told[1] == str(TrainerConfig.max_epochs)


@pytest.mark.parametrize("section", parser.SECTIONS)
def test_the_example_of_a_section_is_a_setting(section: str) -> None:
    field, value = parser.EXAMPLES[section]
    assert str(getattr(getattr(settings(f"--{section}.{field}={value}"), section), field)) == value


def test_help_of_pack_explains_every_field(capsys) -> None:
    assert cli.main(["pack", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(PackConfig):
        assert f"--{field.name}" in text
    for word in ("SRC", "DST", "[at least 0.001 and at most 65536 MiB]", "Shard size."):
        assert word in text


@pytest.mark.parametrize("arguments", [["fit", "--print_config"], ["pack", "--help"]])
def test_parsing_does_not_import_torch(arguments: list[str]) -> None:
    code = f"import sys; from lightship.cli import main; main({arguments}); " \
           "sys.exit('torch' in sys.modules)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_flags_win_over_files_wherever_they_stand(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("data: {global_batch_size: 16, flip: true}\noptim: {lr: 0.5}")
    second.write_text("data: {global_batch_size: 32}")
    got = settings("--optim.lr=1", "--config", str(first), f"--config={second}")
    assert (got.data.global_batch_size, got.data.flip, got.optim.lr) == (32, True, 1.0)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("data: {rooot: x}", "unknown key data.rooot; did you mean --data.root?"),
        (
            "dta: {root: x}",
            "unknown section 'dta'; did you mean data?; the sections are run, data, model, optim, "
            "trainer",
        ),
        ("data: x", "data must hold fields, such as data: {root: images}"),
        ("[1, 2]", "must hold the sections run, data, model, optim, trainer"),
        ("data: {root: [", "is not YAML"),
        ("data: {global_batch_size: many}", "--data.global_batch_size is 'many'"),
        ("data: {global_batch_size: }", "--data.global_batch_size is null; give it a value"),
        ("model: {net: null}", "--model.net is null; give it a value"),
    ],
)
def test_wrong_config_files(tmp_path: Path, capsys, text: str, line: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert cli.main(["fit", "--config", str(path)]) == 2
    assert line in capsys.readouterr().err


def test_config_from_a_url(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://configs/one.yaml", "w") as file:
        file.write("optim: {lr: 0.25}")
    assert settings("--config", "memory://configs/one.yaml").optim.lr == 0.25


def test_every_recipe_is_sound_and_says_what_it_is() -> None:
    for name in parser.recipe_names():
        text = read_config(name)
        assert text.startswith("# ")
        assert f"lightship fit --config {name}" in text
        assert settings("--config", name).run.output.startswith(f"runs/{name}-")


def test_print_config_reads_back_as_the_same_config(tmp_path: Path, capsys) -> None:
    given = ["--config", "digits", "--optim.lr", "0.003", "--data.flip", "true"]
    assert cli.main(["fit", *given, "--print_config"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert settings("--config", str(path)) == settings(*given)
    assert yaml.safe_load(path.read_text())["optim"]["lr"] == 0.003


@pytest.mark.parametrize("is_fine_tuning", [False, True])
def test_print_config_is_yaml_where_lines_are_json(tmp_path: Path, is_fine_tuning: bool) -> None:
    tuned = ["--model.net=resnet18", "--model.weights=gone.pth", "--data.root=gone"]
    given = [*(tuned if is_fine_tuning else []), "--optim.lr=0.003"]
    command = [sys.executable, "-m", "lightship", "fit", *given, "--run.log_format=json"]
    done = subprocess.run([*command, "--print_config"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["optim"]["lr"] == 0.003
    assert ("# not complete: " in done.stdout) == is_fine_tuning


@pytest.mark.parametrize(
    ("end", "code"), [("> /dev/full", 78), ("2>&-", 0), (">&- 2>&-", 0), ("| head -c 1", 0)]
)
def test_the_command_writes_to_any_standard_stream(end: str, code: int) -> None:
    """A full disk, no descriptor at all, a reader that has seen enough: never a traceback."""
    command = f"exec {sys.executable} -m lightship fit --print_config {end}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_output_is_named_after_what_is_learned() -> None:
    plain = settings()
    assert plain.run.output == f"runs/digits-{identity_hash(plain)}"
    assert settings("--trainer.max_epochs", "99").run.output == plain.run.output
    assert settings("--optim.lr", "0.5").run.output != plain.run.output


def test_identity_covers_what_changes_learning_and_nothing_else() -> None:
    keys = set(identity(Config()))
    assert {"run.seed", "data.root", "data.global_batch_size", "model.net", "optim.lr"} <= keys
    assert not keys & {"run.output", "trainer.max_epochs", "data.resident_gib", "run.tracking"}


def test_errors_carry_the_codes_of_the_contract() -> None:
    assert issubclass(ConfigError, LightshipError)
    assert ConfigError("x").exit_code == 78


def test_a_checksum_goes_with_the_root_it_was_given_with(tmp_path: Path) -> None:
    md5, first, second = "0" * 32, tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(f"data: {{root: a.tar.gz, root_md5: '{md5}'}}")
    second.write_text("data: {root: b.tar.gz}")
    configs = ["--config", str(first), "--config", str(second)]

    def data(*flags: str):
        return parse(["fit", *flags]).config.data

    assert data(*configs[:2]).root_md5 == md5
    assert data(*configs).root_md5 is None
    assert data(*configs[:2], "--data.root=c.tar.gz").root_md5 is None
    assert data(*configs[:2], "--data.root", "c.tar.gz").root_md5 is None
    both = data("--data.root=c.tar.gz", f"--data.root_md5={md5}")
    assert (both.root, both.root_md5) == ("c.tar.gz", md5)
    output = tmp_path / "run"
    config_file.write(str(output), settings(*configs[:2]))
    again = parse(["predict", f"--run.output={output}", "--data.root=new"]).config.data
    assert (again.root, again.root_md5) == ("new", None)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--data.image_size", "--data.image_size_px"),
        ("--trainer.max_epoch", "--trainer.max_epochs"),
        ("--epochs", "--trainer.max_epochs"),
        ("--trainer.lr", "--optim.lr"),
        ("--batch-size", "--data.global_batch_size or --data.eval_batch_size"),
        ("--patience", "--trainer.early_stopping_patience"),
    ],
)
def test_a_flag_of_another_tool_or_cut_short_is_refused_with_the_one_meant(flag, meant) -> None:
    with pytest.raises(LightshipError, match=f"unknown flag {flag}; did you mean {meant}\\?"):
        parse(["fit", flag, "3"])


def test_an_error_is_json_where_the_log_is(capsys, tmp_path: Path) -> None:
    flags = ["fit", f"--data.root={tmp_path}/none", f"--run.output={tmp_path}/run"]
    assert cli.main([*flags, "--run.log_format=json"]) == 65
    error = yaml.safe_load(capsys.readouterr().err.splitlines()[-1])
    assert (error["event"], error["exit_code"]) == ("error", 65)
    assert f"--data.root {tmp_path}/none: nothing is there" in error["text"]


@pytest.mark.parametrize(
    "arguments", [["fit", "--data.root", "caf\udce9"], ["pack", "caf\udce9", "packed"]]
)
def test_a_path_that_is_not_utf8_is_refused_in_a_line(arguments):
    with pytest.raises(ConfigError, match=r"^caf\\xe9 is not UTF-8; rename it$"):
        parse(arguments)


def test_a_call_that_was_given_up_does_not_abort_the_process() -> None:
    """A thread that Python ends within native code calls std::terminate."""
    code = """
import sys, threading
from torch._subclasses.fake_tensor import FakeTensorMode
import torch
from lightship import cli
from lightship.commands import dispatch
from lightship.storage.parallel import in_daemon

runs = threading.Event()

def endless():
    with FakeTensorMode():
        while True:
            torch.ones(3) + 1
            runs.set()

def run(command, arguments):
    in_daemon(endless)
    runs.wait()

dispatch.run = run
sys.argv = ["lightship", "doctor"]
raise SystemExit(cli.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "code"), [(["fit", "--print_config"], 0), (["fit", "--nonsense"], 2)]
)
def test_the_process_ends_without_freeing_what_it_imported(arguments: list[str], code: int) -> None:
    """But not before its threads have ended and what others registered for its exit was called."""
    script = f"""
import atexit, sys, threading
from lightship.cli import command_line, main

class Module:
    def __del__(self):
        print("freed")

def parse(arguments):
    atexit.register(print, "handler")
    threading.Thread(target=lambda: (threading.main_thread().join(), print("thread"))).start()
    return command_line.parse(arguments)

module = Module()
main.__globals__["parse"] = parse
sys.argv = ["lightship", *{arguments}]
raise SystemExit(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout.splitlines()[-2:] == ["thread", "handler"]
