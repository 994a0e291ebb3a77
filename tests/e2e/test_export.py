"""`lightship export` on a real run, and every command and example of docs/export.md."""

import contextlib
import io
import json
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from lightship import cli, storage
from lightship.checkpoint.store import CheckpointStore
from lightship.config import EXPORTS
from lightship.data.images.resize import decode_square
from lightship.data.sample_decoder import decode_all
from lightship.data.sources import layouts
from lightship.exporters import formats, verify
from lightship.models.classifier import ImageClassifier
from tests.support import warm
from tests.support.images import encoded

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
COMMANDS = [line.strip() for line in PAGE.splitlines() if line.startswith("    lightship ")]
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
LOADING = {
    "torch": 'torch.export.load("model.pt2").module()',
    "onnx": 'onnxruntime.InferenceSession("model.onnx")',
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on the digits, its evaluation with both views and in channels_last."""
    path = tmp_path_factory.mktemp("desk")
    flags = ["--trainer.max_epochs=1", "--model.test_flip=true", "--run.tracking=none"]
    assert cli.main(["fit", "--config=digits", *flags, f"--run.output={path}/runs/mine"]) == 0
    return path


@pytest.fixture
def run(desk: Path) -> str:
    return str(desk / "runs" / "mine")


@pytest.fixture(scope="module")
def exported(desk: Path) -> dict[str, str]:
    """Both formats in their places; what each export said last."""
    said = {}
    config = desk / "runs" / "mine" / "config.yaml"
    plain = config.read_text()
    config.write_text(plain.replace("compile: none", "compile: default"))  # as training might have
    assert config.read_text() != plain
    try:
        for kind in EXPORTS:
            flags = [f"--run.output={desk}/runs/mine", f"--format={kind}"]
            with contextlib.redirect_stderr(io.StringIO()) as printed:
                assert cli.main(["export", *flags]) == 0
            said[kind] = printed.getvalue().splitlines()[-1]
    finally:
        config.write_text(plain)
    return said


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    """[256, 3, 32, 32] uint8: real digits, evenly over the test split."""
    manifest = layouts.scan("digits", None)["test"]
    ids = np.linspace(0, len(manifest) - 1, 256).astype(np.int64)
    return torch.from_numpy(decode_all(manifest, ids, image_size_px=32)[0]).permute(0, 3, 1, 2)


def checkpoint(run: str, which: str = "best") -> tuple[ImageClassifier, int]:
    """What Lightning alone makes of a run's checkpoint, and its step."""
    store = CheckpointStore(f"{run}/checkpoints")
    commit = store.best() if which == "best" else store.newest()
    assert commit is not None
    path = store.url_of(commit)
    model = ImageClassifier.load_from_checkpoint(path, weights_only=True, map_location="cpu")
    return model.eval(), commit.step


def of_file(path: Path, images: torch.Tensor) -> list[np.ndarray]:
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        return session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        return [output.numpy() for output in torch.export.load(path).module()(images)]


@pytest.mark.parametrize("kind", EXPORTS)
def test_the_best_checkpoint_as_a_file(run: str, digits, exported, kind: str) -> None:
    path = Path(run) / "export" / EXPORTS[kind]
    model, step = checkpoint(run)
    with torch.no_grad():
        scores = model.log_probabilities(digits)
    assert (scores.exp() > 0.5).sum() > 128, "hardly trained"
    assert model.test_flip
    for count in (1, 256):
        probabilities, log_probabilities = of_file(path, digits[:count])
        assert np.abs(probabilities - scores.exp().numpy()[:count]).max() <= 1e-4
        assert np.abs(log_probabilities - scores.numpy()[:count]).max() <= 1e-4
    size_mb = path.stat().st_size / 1e6
    line = exported[kind]
    assert f"exported litcnn of step {step}, 10 classes, {size_mb:.1f} MB: {path}; within" in line
    assert "outputs on 64 images of test at digits" in line
    assert line.endswith(LOADING[kind])
    assert {each.name for each in path.parent.iterdir()} == set(EXPORTS.values())


@pytest.mark.parametrize("kind", EXPORTS)
def test_to_a_url_from_the_last_checkpoint_with_the_images_gone(run, capsys, kind: str) -> None:
    url = f"memory://test-export/{kind}/model"
    flags = [f"--run.output={run}", f"--format={kind}", f"--export={url}", "--ckpt_path=last"]
    assert cli.main(["export", *flags, "--data.root=/nowhere"]) == 0
    told = capsys.readouterr().err
    assert "comparing on random images; the run's cannot be read" in told
    assert "/nowhere" in told
    assert "outputs on 64 random images (seed 0)" in told.splitlines()[-1]
    assert storage.size_bytes(url) > 3_000_000
    _, step = checkpoint(run, "last")
    assert f"of step {step}," in told


@pytest.mark.parametrize("root", [(), ("--data.root=digits.zip",)], ids=["no images", "images"])
def test_from_a_checkpoint_without_its_run(run, tmp_path, monkeypatch, capsys, root) -> None:
    monkeypatch.chdir(tmp_path)
    embedded = resources.files("lightship.data") / "digits.zip"
    (tmp_path / "digits.zip").write_bytes(embedded.read_bytes())
    store = CheckpointStore(f"{run}/checkpoints")
    best = store.best()
    assert best is not None
    flags = [f"--ckpt_path={store.url_of(best)}", "--export=model.pt2", *root]
    assert cli.main(["export", *flags]) == 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert ("images of test at digits.zip" if root else "64 random images (seed 0)") in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.zip", "model.pt2"]


def test_one_process_exports_whatever_launcher_started_it(run, capsys, monkeypatch) -> None:
    """As a member of a group of two it would wait for the other."""
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    flags = [f"--run.output={run}", "--trainer.timeout_s=1", "--trainer.devices=2"]
    url = "memory://test-export/launched"
    assert cli.main(["export", *flags, f"--export={url}"]) == 0
    assert storage.exists(url)


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_file_that_went_wrong_is_not_written(run, capsys, monkeypatch, kind: str) -> None:
    """The disk turns a weight between writing and checking."""
    form = formats.FORMATS[kind]
    write = form.write

    def write_and_spoil(model: ImageClassifier, facts: dict[str, Any], path: Path) -> None:
        write(model, facts, path)
        content, bias = path.read_bytes(), model.net[-1].bias.detach().numpy()
        assert content.count(bias.tobytes()) == 1
        path.write_bytes(
            content.replace(bias.tobytes(), (bias + 0.01).astype("f4")[::-1].tobytes())
        )

    monkeypatch.setattr(form, "write", write_and_spoil)
    url = f"memory://test-export/spoilt/{kind}"
    flags = [f"--run.output={run}", f"--format={kind}", f"--export={url}"]
    assert cli.main(["export", *flags]) == 78
    line = capsys.readouterr().err.splitlines()[-1]
    assert "differ from the checkpoint's by" in line
    assert "more than 0.0001: nothing is written" in line
    assert not storage.exists(url)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(run, capsys, monkeypatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as Python itself marks what is not there
    assert cli.main(["export", f"--run.output={run}", "--format=onnx"]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the package {package}: pip install onnx onnxscript onnxruntime" in line


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--format=tflite"], 2, "--format is 'tflite'; it must be one of torch, onnx"),
        (["--export=m.onnx"], 78, "--export m.onnx is a name for --format onnx, and --format is"),
        (["--format=onnx", "--export=m.pt2"], 78, "--export m.pt2 is a name for --format torch"),
        (["--ckpt_path=nowhere.ckpt"], 78, "nowhere.ckpt"),
        (["--exprot=x"], 2, "unknown flag --exprot; did you mean --export?"),
    ],
)
def test_wrong_input(run, capsys, flags: list[str], code: int, told: str) -> None:
    assert cli.main(["export", f"--run.output={run}", *flags]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert told in lines[0]


def test_it_needs_a_run(capsys) -> None:
    assert cli.main(["export"]) == 2
    assert "lightship export needs --run.output" in capsys.readouterr().err


def test_the_page_says_what_it_must() -> None:
    assert [command.split()[1] for command in COMMANDS] == ["export"] * 3
    assert len(EXAMPLES) == 3
    for name in (formats.INPUT, *formats.OUTPUTS):
        assert f"| `{name}` |" in PAGE
    assert f"{verify.LARGEST_DIFFERENCE:g}".replace("0.0001", "1e-4") in PAGE


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page(desk: Path, run: str, s3, command: str) -> None:
    bucket = s3.url("export")
    for item in storage.list_files(run):
        content = storage.read_bytes(f"{run}/{item.path}")
        storage.write_bytes(f"{bucket}/runs/1/{item.path}", content)
    arguments = command.replace("s3://bucket", bucket).split()[1:]
    fresh = [sys.executable, "-m", "lightship"]
    done = subprocess.run(
        [*(fresh if command == COMMANDS[0] else [warm.executable()]), *arguments],
        cwd=desk, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if "--export" in arguments:
        assert storage.size_bytes(arguments[-1]) > 3_000_000


def picture(height: int, width: int) -> np.ndarray:
    """[H, W, 3] uint8 with detail of several sizes."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 97 + y / 61), np.sin(x / 13) * np.cos(y / 17), np.sin((x + y) / 7)]
    return np.stack([60 * waves[0] + 50 * wave + 128 for wave in waves], -1).astype(np.uint8)


PICTURES = [("jpg", 50, 71, 1), ("png", 90, 61, 1), ("jpg", 100, 64, 6), ("jpg", 32, 32, 1)]


@pytest.mark.parametrize(("image_format", "height", "width", "orientation"), PICTURES)
def test_the_examples_of_the_page(
    desk, exported, monkeypatch, image_format: str, height: int, width: int, orientation: int
) -> None:
    """They run as they stand, and give the checkpoint's answer to lightship's own pixels."""
    monkeypatch.chdir(desk)
    pixels = picture(height, width)
    Path("image.jpg").write_bytes(encoded(pixels, image_format))
    if orientation != 1:
        exif = Image.Exif()
        exif[0x112] = orientation
        Image.fromarray(pixels).save("image.jpg", exif=exif)
    model, _ = checkpoint(str(desk / "runs" / "mine"))
    size_px = model.hparams["image_size_px"]
    exact = torch.from_numpy(
        decode_square(Path("image.jpg").read_bytes(), "image", size_px).transpose(2, 0, 1)[None]
    )
    with torch.no_grad():
        expected = model.log_probabilities(exact).exp().numpy()
    *examples, very_pixels = EXAMPLES
    names: dict[str, Any] = {}
    for example in examples:
        names = {}
        exec(example, names)
        found = np.asarray(names["pixels"])
        assert found.shape == tuple(exact.shape)
        assert np.abs(found.astype(int) - exact.numpy()).max() <= 1
        assert np.abs(np.asarray(names["probabilities"]) - expected).max() < 0.02
        assert names["class_names"] == model.class_names
        assert names["best"] == expected.argmax()
    exec(very_pixels, names)  # the last of the examples above has loaded the facts
    np.testing.assert_array_equal(names["pixels"], exact)


def test_the_files_need_no_lightship(desk, exported) -> None:
    """The examples, with Python told that there is no lightship."""
    (desk / "image.jpg").write_bytes(encoded(picture(40, 50), "jpg"))
    for example in EXAMPLES[:2]:
        code = f"import sys; sys.modules['lightship'] = None\n{example}"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=desk, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        name, probability = done.stdout.split()
        assert name in [str(digit) for digit in range(10)]
        assert 0.1 <= float(probability) <= 1


def test_the_metadata_is_the_runs(run, exported) -> None:
    extra = {"lightship.json": ""}
    torch.export.load(Path(run) / "export" / "model.pt2", extra_files=extra)
    facts = json.loads(extra["lightship.json"])
    session = onnxruntime.InferenceSession(Path(run) / "export" / "model.onnx")
    kept = session.get_modelmeta().custom_metadata_map
    assert {**kept, "class_names": json.loads(kept["class_names"])} == {
        key: value if isinstance(value, list) else str(value) for key, value in facts.items()
    }
    model, step = checkpoint(run)
    assert facts["class_names"] == model.class_names
    assert facts["checkpoint_step"] == step
    assert facts["image_size_px"] == 32
