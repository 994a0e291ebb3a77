"""Preprocessing: what comes with weights, and that every command sees the same pixels."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from lightship.config import PREPROCESSING, Config, DataConfig
from lightship.data.images.decode import decode
from lightship.data.images.resize import DEFAULT_RESIZE, OVERSAMPLING, Resize, decode_square
from lightship.data.regime import resize_of
from lightship.errors import ConfigError
from lightship.models.nets.published import torchvision_names
from lightship.models.nets.weights import Weights
from lightship.models.preprocessing import adopt, adopt_by_name, of_weights

LITE = "timm:tf_efficientnet_lite0"
FILE = Weights("file", {"a": torch.zeros(1)}, {})
OF_LITE = {
    "image_size_px": 224, "interpolation": "bicubic", "eval_crop": 0.875, "mean": [0.5] * 3,
    "std": [0.5] * 3,
}  # fmt: skip


def picture(height: int, width: int, format: str = "PNG") -> bytes:
    """With edges, gradients and noise."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, (rows ^ columns) % 256], 2)
    noise = np.random.default_rng(0).integers(-20, 20, pixels.shape)
    out = io.BytesIO()
    image = Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
    image.save(out, format, quality=92)
    return out.getvalue()


@pytest.mark.parametrize("size", [(300, 400), (256, 256), (224, 224), (100, 180), (231, 1400)])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("crop", [0.875, 0.95, 1.0])
def test_pixels_are_those_of_timms_own_transform(
    size: tuple[int, int], format: str, crop: float
) -> None:
    difference = difference_from_timm(picture(*size, format), crop)
    assert difference.mean() < 1
    assert difference.max() <= 16  # where an edge overshoots


@pytest.mark.parametrize("size", [(1500, 2000), (2000, 1500)])
@pytest.mark.parametrize("crop", [0.875, 1.0])
def test_pixels_of_a_jpeg_that_is_decoded_smaller_are_those_of_timms_own_transform(
    size: tuple[int, int], crop: float
) -> None:
    data = picture(*size, "JPEG")
    enough_px = OVERSAMPLING * Resize("bicubic", crop).short_side_px(224)
    assert min(decode(data, "image", (enough_px, enough_px)).shape[:2]) < 1500
    assert difference_from_timm(data, crop).mean() < 1


def difference_from_timm(data: bytes, crop: float) -> np.ndarray:
    """Of an image as the net gets it, [3, 224, 224]."""
    timm = pytest.importorskip("timm")
    config = {**timm.data.resolve_data_config({}, model=_lite()), "crop_pct": crop}
    transform = timm.data.create_transform(**config, normalize=False)
    expected = transform(Image.open(io.BytesIO(data)).convert("RGB"))
    found = decode_square(data, "image", 224, resize=Resize("bicubic", crop))
    return np.abs(found.transpose(2, 0, 1).astype(int) - expected.numpy().astype(int))


def _lite():
    timm = pytest.importorskip("timm")
    return timm.create_model("tf_efficientnet_lite0")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "swin_t", "efficientnet_b3", "vit_b_16"])
def test_pixels_are_those_of_torchvisions_own_transform(name: str) -> None:
    import torchvision

    data = picture(300, 420)
    own = of_weights(name, FILE)
    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    image = pil_to_tensor(Image.open(io.BytesIO(data)))
    expected = transform(image) * torch.tensor(own["std"]).view(3, 1, 1)
    expected = (expected + torch.tensor(own["mean"]).view(3, 1, 1)) * 255
    resize = Resize(own["interpolation"], own["eval_crop"])
    found = decode_square(data, "image", own["image_size_px"], resize=resize)
    assert (torch.from_numpy(found.copy()).permute(2, 0, 1) - expected).abs().mean() < 1


def test_every_net_of_torchvision_has_preprocessing() -> None:
    for name in torchvision_names():
        own = of_weights(name, FILE)
        assert set(own) == set(PREPROCESSING)
        data = DataConfig()
        adopt(data, own)
        assert 0.1 <= data.eval_crop <= 1, name


def test_open_settings_become_the_weights_own() -> None:
    data = DataConfig()
    own = of_weights(LITE, FILE)
    assert own == {**OF_LITE, "crop_mode": "center"}
    assert adopt(data, own) == ""
    assert {name: getattr(data, name) for name in PREPROCESSING} == OF_LITE
    assert resize_of(data) == Resize("bicubic", 0.875)


def test_a_crop_mode_that_lightship_lacks_is_said() -> None:
    own = of_weights("timm:convnext_tiny.fb_in22k_ft_in1k_384", FILE)
    assert "crop mode center (theirs: squash)" in adopt(DataConfig(), own)


def test_the_name_alone_tells_doctor() -> None:
    config = Config()
    config.model.net = LITE
    adopt_by_name(config)
    assert config.data.image_size_px is None, "random weights have no preprocessing"
    config.model.weights = "s3://nowhere/w.pth"
    adopt_by_name(config)
    assert {name: getattr(config.data, name) for name in PREPROCESSING} == OF_LITE


def test_what_differs_is_said_and_kept() -> None:
    data = DataConfig(image_size_px=160, interpolation="bilinear", normalize="imagenet")
    line = adopt(data, OF_LITE)
    assert (data.image_size_px, data.interpolation, data.eval_crop) == (160, "bilinear", 0.875)
    assert (data.mean, data.std) == (None, None)
    for part in (
        "image_size_px 160 (theirs: 224)",
        "interpolation bilinear (theirs: bicubic)",
        "normalize imagenet (theirs: mean [0.5,0.5,0.5])",
    ):
        assert part in line
    assert "eval_crop" not in line


def test_a_checkpoint_of_lightship_has_its_own() -> None:
    kept = {
        "net": "litcnn", "class_names": ["a", "b"], "image_size_px": 24, "mean": [0.1, 0.2, 0.3],
        "std": [0.4] * 3, "interpolation": "bicubic", "eval_crop": 0.5,
    }  # fmt: skip
    own = of_weights("resnet18", FILE._replace(hyper_parameters=kept))
    assert own == {name: kept[name] for name in PREPROCESSING}
    kept.pop("interpolation"), kept.pop("eval_crop")  # of an older version
    own = of_weights("resnet18", FILE._replace(hyper_parameters=kept))
    assert (own["interpolation"], own["eval_crop"]) == DEFAULT_RESIZE
    for wrong in ({"eval_crop": 1e-9}, {"image_size_px": 10**9}, {"mean": [0.5]}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            of_weights("resnet18", FILE._replace(hyper_parameters={**kept, **wrong}))


@pytest.mark.parametrize("name", ["crop_min_area", "eval_crop", "interpolation"])
def test_resizing_without_a_size_is_refused(name: str) -> None:
    data = DataConfig(**{name: "bicubic" if name == "interpolation" else 0.5})
    with pytest.raises(ConfigError, match=f"--data.{name} needs --data.image_size_px"):
        adopt(data, {})
