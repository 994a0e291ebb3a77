"""One set of images from a folder, a zip, a tar and S3: the same samples, order and weights."""

from pathlib import Path

import pytest
import torch

from lightship import cli
from lightship.checkpoint.store import CheckpointStore
from tests.support.images import little_set, put, real_cifar10, tarred, zipped


@pytest.fixture(scope="module", params=["noise", "CIFAR-10"])
def files(request) -> dict[str, bytes]:
    """Class folders: of noise, and a slice of real CIFAR-10 where its archive is at hand."""
    if request.param == "noise":
        return little_set(("train", "test"), per_class=12, size_px=(32, 32), image_format="jpeg")
    return real_cifar10(train=12, test=4)


def weights(output: str, root: str) -> dict[str, torch.Tensor]:
    """Of the last checkpoint after a short fit whose every step depends on order and pixels."""
    code = cli.main([
        "fit", f"--data.root={root}", f"--run.output={output}", "--run.tracking=none",
        "--data.global_batch_size=6", "--data.flip=true", "--data.crop_padding_px=4",
        "--data.cutmix_alpha=1", "--optim.lr=0.01", "--trainer.max_epochs=2",
    ])  # fmt: skip
    assert code == 0
    store = CheckpointStore(f"{output}/checkpoints")
    newest = store.newest()
    assert newest is not None
    return store.load_checkpoint(store.url_of(newest))["state_dict"]


@pytest.fixture(scope="module")
def from_folder(files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    path = tmp_path_factory.mktemp("folder")
    return weights(str(path / "run"), put(str(path / "images"), files))


@pytest.mark.parametrize(
    "layout", ["zip", "chained zip", "tar", "s3", "s3 zip", "s3 tar", "memory"]
)
def test_final_weights_are_the_same(layout, files, from_folder, tmp_path: Path, request) -> None:
    where = str(tmp_path)
    if layout.startswith("s3"):
        where = request.getfixturevalue("s3").url("images")
    elif layout == "memory":
        where = f"memory://same-everywhere-{len(files)}"
    if "zip" in layout:
        put(where, {"set.zip": zipped(files)})
        root = f"{where}/set.zip" if layout == "zip" else f"zip://::{where}/set.zip"
    elif "tar" in layout:
        put(where, {"set.tar": tarred(files)})
        root = f"{where}/set.tar"
    else:
        root = put(f"{where}/folder", files)
    got = weights(f"{where}/run", root)
    assert got.keys() == from_folder.keys()
    for name, expected in from_folder.items():
        assert torch.equal(got[name], expected), name
