"""An exported file computes what the checkpoint does, and a file that does not is found out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from lightship.config import EXPORTS
from lightship.data.sample_decoder import decode_all
from lightship.data.sources import layouts
from lightship.errors import ConfigError
from lightship.exporters import formats, verify
from lightship.models.classifier import ImageClassifier
from tests.support.images import pixels_of, real_cifar10

CLASSES = ["ant", "bee", "cat", "dog", "elk"]
FORMS = list(formats.FORMATS.values())
NETS: list[dict[str, Any]] = [
    {"net": "litcnn"},
    {"net": "litcnn", "channels_last": True, "test_flip": True},
    {"net": "resnet18", "channels_last": True},
    {"net": "speednet", "test_flip": True, "test_shift": True},
    {"net": "tests.support.own_nets:moody", "test_flip": True},
]
LITTLE = "tests.support.own_nets:pooled_linear"


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """[256, 3, 32, 32] uint8: real digits, evenly over the set."""
    manifest = layouts.scan("digits", None)["test"]
    ids = np.linspace(0, len(manifest) - 1, 256).astype(np.int64)
    return torch.from_numpy(decode_all(manifest, ids, image_size_px=32)[0]).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """[256, 3, 32, 32] uint8 of CIFAR-10."""
    files = real_cifar10(train=0, test=26)
    pixels = np.stack([pixels_of(data) for data in files.values()])[:256]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def classifier(images: Tensor, net: str = "litcnn", **options: Any) -> ImageClassifier:
    """A classifier of 32 px that tells its images apart, its BatchNorms in use."""
    torch.manual_seed(0)
    model = ImageClassifier(net, CLASSES, 32, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], **options)
    *_, head = (part for part in model.net.modules() if isinstance(part, nn.Linear))
    came: list[Tensor] = []
    head.register_forward_pre_hook(lambda _, inputs: came.append(inputs[0]))
    with torch.no_grad():
        model(images)
        model.eval()(images)
        common = came[1].mean(0)  # what all images have is taken from the weights
        head.weight -= torch.outer(head.weight @ common, common) / common.dot(common)
        head.weight *= 2 / model(images).std(0)[:, None]
    head._forward_pre_hooks.clear()
    return model


def outputs(model: ImageClassifier, images: Tensor) -> list[np.ndarray]:
    """Of the checkpoint: probabilities and their logarithms, by its own evaluation."""
    with torch.no_grad():
        scores = model.log_probabilities(images)
    return [scores.exp().numpy(), scores.numpy()]


def written(form: formats.Format, model: ImageClassifier, folder: Path) -> Path:
    path = folder / EXPORTS[form.name]
    form.write(model, formats.facts_of(model, {"global_step": 7}), path)
    return path


def assert_same(form: formats.Format, path: Path, model: ImageClassifier, images: Tensor) -> None:
    """Absolutely within 1e-4, for one image, for seven, for all."""
    run = form.load(path)
    expected = outputs(model, images)
    assert np.ptp(expected[0], axis=0).max() > 0.05, "the images make no difference"
    for count in (1, 7, len(images)):
        found = run(images[:count])
        assert [output.dtype for output in found] == [np.float32] * 2
        for theirs, ours in zip(found, expected, strict=True):
            assert theirs.shape == (count, len(CLASSES))
            assert np.abs(theirs - ours[:count]).max() <= 1e-4


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("options", NETS, ids=lambda options: ",".join(map(str, options.values())))
def test_the_file_gives_the_checkpoints_outputs(form, options, digits, tmp_path: Path) -> None:
    model = classifier(digits, **options)
    path = written(form, model, tmp_path)
    assert_same(form, path, model, digits)
    assert verify.check(form, path, model, digits[:9]) <= 1e-4


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_on_photographs(form, photographs, tmp_path: Path) -> None:
    model = classifier(photographs, "resnet18", test_flip=True)
    assert_same(form, written(form, model, tmp_path), model, photographs)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_both_views_count(form, digits, tmp_path: Path) -> None:
    model = classifier(digits, LITTLE, test_flip=True)
    run = form.load(written(form, model, tmp_path))
    probabilities, _ = run(digits)
    mirrored, _ = run(digits.flip(3))
    assert np.abs(probabilities - mirrored).max() <= 1e-4
    model.test_flip = False
    assert np.abs(probabilities - outputs(model, digits)[0]).max() > 0.01


def test_onnx_stays_finite_where_both_views_are_all_but_certain(digits, tmp_path: Path) -> None:
    model = classifier(digits, LITTLE, test_flip=True)
    with torch.no_grad():
        model.net[-1].weight *= 20
    expected = outputs(model, digits)[1]
    assert expected.min() < -120, "exp of it would still be a float32"
    _, found = formats.FORMATS["onnx"].load(written(formats.FORMATS["onnx"], model, tmp_path))(
        digits
    )
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_a_program_says_what_it_is(digits, tmp_path: Path) -> None:
    path = written(formats.FORMATS["torch"], classifier(digits), tmp_path)
    extra = {"lightship.json": ""}
    torch.export.load(path, extra_files=extra)
    facts = json.loads(extra["lightship.json"])
    assert (facts["class_names"], facts["image_size_px"]) == (CLASSES, 32)
    assert (facts["net"], facts["checkpoint_step"]) == ("litcnn", 7)
    assert facts["lightship_version"]
    assert str(Path(__file__).parents[3]).encode() not in path.read_bytes()


def test_an_onnx_model_says_what_it_is(digits, tmp_path: Path) -> None:
    path = written(formats.FORMATS["onnx"], classifier(digits), tmp_path)
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    facts = {each.key: each.value for each in model.metadata_props}
    assert json.loads(facts["class_names"]) == CLASSES
    assert (facts["image_size_px"], facts["checkpoint_step"]) == ("32", "7")
    assert facts["lightship_version"]
    assert [each.version for each in model.opset_import if not each.domain] == [18]
    assert not any(each.external_data for each in model.graph.initializer)
    shapes = {
        each.name: [d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim]
        for each in [*model.graph.input, *model.graph.output]
    }
    assert shapes == {
        "images": ["batch", 3, 32, 32],
        "probabilities": ["batch", 5],
        "log_probabilities": ["batch", 5],
    }
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert str(Path(__file__).parents[3]).encode() not in path.read_bytes()


def with_another_weight(path: Path, model: ImageClassifier) -> None:
    """Turn the sign of the last layer's bias, where it stands in the file."""
    bias = model.net[-1].bias.detach().numpy()
    content = path.read_bytes()
    assert content.count(bias.tobytes()) == 1
    path.write_bytes(content.replace(bias.tobytes(), (-bias).tobytes()))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_wrong_weight_is_found(form, digits, tmp_path: Path) -> None:
    model = classifier(digits, LITTLE)
    path = written(form, model, tmp_path)
    verify.check(form, path, model, digits)
    with_another_weight(path, model)
    with pytest.raises(ConfigError, match=r"differ from the checkpoint's by 0\.\d+|by \d"):
        verify.check(form, path, model, digits)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_not_a_number_is_found(form, digits, tmp_path: Path) -> None:
    model, broken = (classifier(digits, LITTLE) for _ in range(2))
    with torch.no_grad():
        broken.net[-1].bias[0] = float("nan")
    with pytest.raises(ConfigError, match="by nan"):
        verify.check(form, written(form, broken, tmp_path), model, digits)


def test_a_checkpoint_of_a_diverged_training_is_named(digits, tmp_path: Path) -> None:
    broken = classifier(digits, LITTLE)
    with torch.no_grad():
        broken.net[-1].bias[0] = float("nan")
    path = written(formats.FORMATS["torch"], broken, tmp_path)
    with pytest.raises(ConfigError, match=r"outputs are not finite.*--ckpt_path"):
        verify.check(formats.FORMATS["torch"], path, broken, digits)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_torn_file_is_found(form, digits, tmp_path: Path) -> None:
    model = classifier(digits, LITTLE)
    path = written(form, model, tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="does not load or run"):
        verify.check(form, path, model, digits)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("net", ["branching", "for_pairs"])
def test_a_net_that_cannot_be_traced(form, net: str, digits, tmp_path: Path) -> None:
    model = classifier(digits[:2], net=f"tests.support.own_nets:{net}")
    with pytest.raises(
        ConfigError, match=f"--model.net tests.support.own_nets:{net} cannot be exported"
    ):
        written(form, model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_net_that_draws_random_numbers(form, digits, tmp_path: Path) -> None:
    model = classifier(digits, net="tests.support.own_nets:restless")
    with pytest.raises(ConfigError, match="random numbers"):
        verify.check(form, written(form, model, tmp_path), model, digits)


def test_onnx_has_a_bound(digits) -> None:
    model = classifier(digits, LITTLE)
    model.net = nn.Linear(2**15, 2**14, device="meta")  # 2 GiB that are nowhere
    with pytest.raises(ConfigError, match=r"2\.0 GiB, and one ONNX file holds 2 GiB at most"):
        formats.FORMATS["onnx"].check_fits(model)
    formats.FORMATS["torch"].check_fits(model)


def test_logaddexp() -> None:
    one, other = (torch.randn(1000, dtype=torch.float64) * 200 for _ in range(2))
    torch.testing.assert_close(formats.logaddexp(one, other), torch.logaddexp(one, other))


def test_the_command_line_knows_the_formats() -> None:
    assert list(EXPORTS) == list(formats.FORMATS)
