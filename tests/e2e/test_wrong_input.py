"""Wrong data, model, output: a clear line and its exit code before any training."""

import io
from pathlib import Path

import pytest
from PIL import Image

from lightship import cli
from tests.support.images import little_set, put, webdataset


def fit(capsys, *flags: str) -> tuple[int, str]:
    """Exit code and error lines of a fit that must not get as far as training."""
    code = cli.main(["fit", "--run.tracking=none", "--trainer.max_epochs=1", *flags])
    printed = capsys.readouterr().err
    assert "epoch" not in printed, "it trained"
    errors = [line for line in printed.splitlines() if line.startswith("lightship: ")]
    assert len(errors) == 1
    assert "Traceback" not in printed
    return code, errors[0]


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    return [
        "--data.global_batch_size=4", "--data.image_size_px=32", f"--run.output={tmp_path}/run",
    ]  # fmt: skip


def folder(tmp_path: Path, files: dict[str, bytes]) -> str:
    return put(str(tmp_path / "images"), files)


def test_missing_root(tmp_path: Path, capsys, flags) -> None:
    code, line = fit(capsys, *flags, f"--data.root={tmp_path}/nowhere")
    assert code == 65
    assert f"{tmp_path}/nowhere" in line
    assert "--data.root" in line


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--model.net=resnt18", "did you mean resnet18"),
        ("--model.net=timm:resnt18", "timm:resnt18"),
        ("--model.net=no_such_module:build", "no module 'no_such_module'"),
        ("--trainer.precision=bf17-mixed", "--trainer.precision bf17-mixed"),
        ("--trainer.accelerator=gpuu", "--trainer.accelerator gpuu"),
    ],
)
def test_misspelled_names_are_found_before_anything_is_read(
    tmp_path: Path, capsys, flags, flag: str, told: str
) -> None:
    code, line = fit(capsys, *flags, flag, f"--data.root={tmp_path}/nowhere")
    assert code == 78
    assert told in line
    assert not (tmp_path / "run").exists()


def test_no_images(tmp_path: Path, capsys, flags) -> None:
    root = folder(tmp_path, {"train/a/notes.txt": b"x", "train/b/more.txt": b"y"})
    code, line = fit(capsys, *flags, f"--data.root={root}")
    assert code == 65
    assert "found 2 .txt files; looked for class folders" in line


def test_class_folders_that_differ(tmp_path: Path, capsys, flags) -> None:
    files = little_set(("train", "test"))
    files["test/dog/000.png"] = files["test/cat/000.png"]
    code, line = fit(capsys, *flags, f"--data.root={folder(tmp_path, files)}")
    assert code == 65
    assert "dog" in line
    assert "test" in line


def test_an_image_that_cannot_be_decoded(tmp_path: Path, capsys, flags) -> None:
    files = little_set(("train", "test"))
    files["train/bee/001.png"] = files["train/bee/001.png"][:40]
    root = folder(tmp_path, files)
    code, line = fit(capsys, *flags, f"--data.root={root}")
    assert code == 65
    assert "train/bee/001.png" in line
    assert "--data.on_error" in line


def test_too_many_bad_images(tmp_path: Path, capsys, flags) -> None:
    files = little_set(("train", "test"), per_class=10)
    for index in range(3):
        files[f"train/bee/00{index}.png"] = b""
    root = folder(tmp_path, files)
    skip = ["--data.on_error=skip", "--data.val_fraction=0"]
    code, line = fit(capsys, *flags, *skip, f"--data.root={root}", "--data.max_bad_fraction=0.05")
    assert code == 65
    assert "3" in line
    assert "--data.max_bad_fraction" in line


def test_images_of_several_sizes_need_one(tmp_path: Path, capsys) -> None:
    files = little_set(("train", "test"))
    picture = io.BytesIO()
    Image.new("RGB", (9, 7)).save(picture, "png")
    files["train/bee/001.png"] = picture.getvalue()
    root = folder(tmp_path, files)
    output = f"--run.output={tmp_path}/run"
    code, line = fit(capsys, output, "--data.global_batch_size=4", f"--data.root={root}")
    assert code == 65
    assert "--data.image_size_px" in line


def test_unknown_net(capsys, flags) -> None:
    code, line = fit(capsys, *flags, "--model.net=resnet81")
    assert code == 78
    assert "resnet81" in line
    assert "did you mean" in line


def test_own_net_that_is_not_there(capsys, flags) -> None:
    code, line = fit(capsys, *flags, "--model.net=no_such_pkg.nets:build")
    assert code == 78
    assert "no_such_pkg" in line


def test_own_net_with_the_wrong_output(capsys, flags) -> None:
    code, line = fit(capsys, *flags, "--model.net=tests.support.own_nets:wrong_width")
    assert code == 78
    assert "10" in line


def test_one_class(tmp_path: Path, capsys, flags) -> None:
    root = folder(tmp_path, little_set(("train", "test"), classes=("ant",)))
    code, line = fit(capsys, *flags, f"--data.root={root}")
    assert code == 65
    assert "only one class, 'ant' (3 train images)" in line
    assert line.endswith(f"each class is a folder of images directly below {root}/train")


def test_one_class_in_shards(tmp_path: Path, capsys, flags) -> None:
    shards = webdataset(little_set(("train", "test"), classes=("ant",)), labels="text")
    code, line = fit(capsys, *flags, f"--data.root={folder(tmp_path, shards)}")
    assert code == 65
    assert "only one class, 'ant'" in line
    assert line.endswith("all of its labels are the same")


def test_one_class_of_folders(tmp_path: Path, capsys, flags) -> None:
    files = little_set(("train", "test"))
    root = folder(tmp_path, {path.replace("/", "/all/", 1): data for path, data in files.items()})
    code, line = fit(capsys, *flags, f"--data.root={root}")
    assert code == 65
    assert "only one class, 'all'" in line
    assert line.endswith(
        f"if its sub-folders (ant, ...) are the classes, move them to {root}/train"
    )


@pytest.mark.parametrize(
    "more",
    [["--data.global_batch_size=1"], ["--trainer.accumulate_grad_batches=4"]],
    ids=["batch", "parts"],
)
def test_one_image_a_step_and_batchnorm(capsys, flags, more: list[str]) -> None:
    code, line = fit(capsys, *flags, "--model.net=resnet18", *more)
    assert code == 78
    assert "--data.global_batch_size / devices / --trainer.accumulate_grad_batches" in line


def test_early_stopping_needs_a_validation_split(tmp_path: Path, capsys, flags) -> None:
    flags = [*flags, "--data.val_fraction=0", "--trainer.early_stopping_patience=3"]
    root = folder(tmp_path, little_set(("train", "test")))
    code, line = fit(capsys, *flags, f"--data.root={root}")
    assert code == 78
    assert "--trainer.early_stopping_patience needs a validation split" in line
    # With a val split of its own the set is taken: it is the net that is refused here.
    root = put(str(tmp_path / "own"), little_set(("train", "val", "test")))
    code, line = fit(capsys, *flags, f"--data.root={root}", "--model.net=reznet18")
    assert code == 78
    assert "--model.net" in line


def test_batch_larger_than_the_set(tmp_path: Path, capsys, flags) -> None:
    root = folder(tmp_path, little_set(("train", "test")))
    code, line = fit(capsys, *flags, f"--data.root={root}", "--data.global_batch_size=999")
    assert code == 78
    assert "--data.global_batch_size is 999" in line


def test_more_than_memory_is_allowed(capsys, flags) -> None:
    """Unless told to hold it there, such a set is streamed."""
    code, line = fit(capsys, *flags, "--data.resident_gib=0.001", "--data.mode=resident")
    assert code == 78
    assert "--data.resident_gib" in line
    assert "--data.mode streaming" in line


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--data.mode=resident", "--data.mode resident"),
        ("--data.image_size_px=null", "--data.image_size_px"),
    ],
)
def test_random_boxes_that_cannot_be_cut(capsys, flags, flag: str, named: str) -> None:
    code, line = fit(capsys, *flags, "--data.crop_min_area=0.3", flag)
    assert code == 78
    assert "--data.crop_min_area" in line
    assert named in line


def test_a_set_in_this_process_alone_cannot_be_streamed(capsys, flags) -> None:
    root = put("memory://wrong-input/images", little_set())
    code, line = fit(capsys, *flags, f"--data.root={root}", "--data.mode=streaming")
    assert code == 78
    assert "memory://" in line


@pytest.mark.parametrize(
    ("flag", "code"),
    [
        ("--trainer.precision=17", 78),
        ("--trainer.accelerator=gpu", 78),
        ("--trainer.accelerator=x", 78),
    ],
)
def test_what_lightning_refuses(capsys, flags, flag: str, code: int) -> None:
    if flag.endswith("gpu") and __import__("torch").cuda.is_available():
        pytest.skip("needs a machine without a GPU: the flag is right on this one")
    got, line = fit(capsys, *flags, flag)
    assert got == code
    assert flag.replace("=", " ") in line


def test_an_output_that_cannot_be_written(tmp_path: Path, capsys, flags) -> None:
    (tmp_path / "file").write_text("in the way")
    code, line = fit(capsys, *flags, f"--run.output={tmp_path}/file/run")
    assert code == 78
    assert "--run.output" in line


def test_a_bucket_that_is_not_there(s3, capsys, flags) -> None:
    code, line = fit(capsys, *flags, "--run.output=s3://no-such-bucket-here/run")
    assert code == 78
    assert "--run.output" in line


def test_another_config_on_the_same_output(tmp_path: Path, capsys, flags) -> None:
    root = folder(tmp_path, little_set(("train", "test"), per_class=8))
    same = ["fit", "--run.tracking=none", *flags, f"--data.root={root}", "--data.val_fraction=0.25"]
    assert cli.main([*same, "--trainer.max_epochs=1"]) == 0
    (tmp_path / "run" / "DONE").unlink()
    capsys.readouterr()
    code, line = fit(capsys, *same[2:], "--optim.lr=0.5", "--run.seed=3")
    assert code == 78
    assert "optim.lr was 0.0002, now 0.5" in line
    assert "run.seed was 0, now 3" in line
    assert cli.main([*same, "--trainer.max_epochs=2"]) == 0, "more epochs change nothing learned"


def test_resume_never_and_must(tmp_path: Path, capsys, flags) -> None:
    root = folder(tmp_path, little_set(("train", "test"), per_class=8))
    code, line = fit(capsys, *flags, f"--data.root={root}", "--run.resume=must")
    assert (code, "--run.resume must" in line) == (78, True)
    assert cli.main(["fit", "--run.tracking=none", *flags, f"--data.root={root}",
                     "--trainer.max_epochs=1"]) == 0  # fmt: skip
    (tmp_path / "run" / "DONE").unlink()
    capsys.readouterr()
    code, line = fit(capsys, *flags, f"--data.root={root}", "--run.resume=never")
    assert (code, "--run.resume never" in line) == (78, True)


def test_classes_other_than_the_checkpoints(tmp_path: Path, capsys, flags) -> None:
    root = folder(tmp_path, little_set(("train", "test"), per_class=8))
    run = ["--run.tracking=none", *flags, f"--data.root={root}", "--trainer.max_epochs=1"]
    assert cli.main(["fit", *run]) == 0
    other = put(str(tmp_path / "other"), little_set(("test",), classes=("ant", "bee", "dog")))
    capsys.readouterr()
    code = cli.main(["test", f"--run.output={tmp_path}/run", f"--data.root={other}"])
    assert code == 65
    error = capsys.readouterr().err.splitlines()[-1]
    assert "test images of classes that the checkpoint does not know: dog; it knows 3" in error


def test_commands_on_a_run_that_is_not_there(tmp_path: Path, capsys) -> None:
    assert cli.main(["test", f"--run.output={tmp_path}/nothing"]) == 78
    assert "holds no run" in capsys.readouterr().err
