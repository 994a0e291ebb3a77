"""Published weights: addresses, download from a real HTTP server, cache, checksum, refusals."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save

from lightship.errors import ConfigError
from lightship.models.nets import published
from lightship.models.nets.weights import read_weights
from lightship.storage import StorageTimeout
from tests.support.site import Site, without_other_sources

LITE = "timm:tf_efficientnet_lite0"
LITE_PATH = "timm/tf_efficientnet_lite0.in1k/resolve/main/model.safetensors"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    without_other_sources(tmp_path, monkeypatch)
    with Site(tmp_path / "site") as site:
        yield site


def test_weights_of_timm_come_from_the_hub_once(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{site.url}/")
    site.put(LITE_PATH, save({"a": torch.arange(3)}))
    for _ in range(2):
        read = read_weights(LITE, "default")
        assert torch.equal(read.state["a"], torch.arange(3))
    assert site.gets == [LITE_PATH]
    assert read.where == f"--model.weights default (https://huggingface.co/{LITE_PATH})"
    kept = tmp_path / "LIGHTSHIP_CACHE/weights/huggingface.co" / LITE_PATH
    assert kept.read_bytes() == (site.root / LITE_PATH).read_bytes()


def test_a_mirror_has_every_site_under_its_host(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LIGHTSHIP_WEIGHTS_MIRROR", f"{site.url}/copies")
    site.put(f"copies/huggingface.co/{LITE_PATH}", save({"a": torch.arange(3)}))
    assert torch.equal(read_weights(LITE, "default").state["a"], torch.arange(3))
    # A folder is a mirror too: any URL is.
    monkeypatch.setenv("LIGHTSHIP_WEIGHTS_MIRROR", str(site.root / "copies"))
    monkeypatch.setenv("LIGHTSHIP_CACHE", str(tmp_path / "other"))
    assert torch.equal(read_weights(LITE, "default").state["a"], torch.arange(3))
    assert len(site.gets) == 1


def test_the_next_address_is_tried_where_a_site_lacks_the_file(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTSHIP_WEIGHTS_MIRROR", site.url)
    data = save({"a": torch.arange(3)})
    last = published.addresses(LITE)[-1]
    assert last.startswith("https://github.com/")
    monkeypatch.setattr(published, "addresses", lambda net: [LITE_URL, named(data)])
    site.put(named(data).partition("://")[2], data)
    assert published.fetch(LITE) == (data, named(data))


LITE_URL = f"https://huggingface.co/{LITE_PATH}"


def named(data: bytes) -> str:
    return f"https://example.org/weights-{hashlib.sha256(data).hexdigest()[:8]}.pth"


def test_the_checksum_in_an_address_is_checked(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the download, of the cached file, and of torch's own cache."""
    monkeypatch.setenv("LIGHTSHIP_WEIGHTS_MIRROR", site.url)
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    place = url.partition("://")[2]
    site.put(place, b"damaged on the way")
    with pytest.raises(
        ConfigError, match=r"is damaged: its sha256 begins .* by its name with f37072fd"
    ):
        published.fetch("resnet18")
    cached = tmp_path / "LIGHTSHIP_CACHE/weights" / place
    assert not cached.exists()

    data = b"right"
    monkeypatch.setattr(published, "addresses", lambda net: [named(data)])
    site.put(named(data).partition("://")[2], data)
    asked = len(site.gets)
    assert published.fetch("net") == (data, named(data))
    cached = tmp_path / "LIGHTSHIP_CACHE/weights" / named(data).partition("://")[2]
    cached.write_bytes(b"wrong")
    assert published.fetch("net") == (data, named(data))
    assert cached.read_bytes() == data
    assert len(site.gets) == asked + 2

    cached.unlink()
    of_torch = tmp_path / "TORCH_HOME/hub/checkpoints" / named(data).rpartition("/")[2]
    of_torch.parent.mkdir(parents=True)
    of_torch.write_bytes(data)
    assert published.fetch("net") == (data, named(data))
    assert len(site.gets) == asked + 2


def test_the_hubs_own_cache_is_used(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "HF_HUB_CACHE/models--timm--tf_efficientnet_lite0.in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("c0ffee")
    (folder / "snapshots/c0ffee").mkdir(parents=True)
    data = save({"a": torch.arange(3)})
    (folder / "snapshots/c0ffee/model.safetensors").write_bytes(data)
    assert published.fetch(LITE)[0] == data


def test_without_network_the_error_says_how_to_give_the_weights(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.close()
    monkeypatch.setenv("LIGHTSHIP_WEIGHTS_MIRROR", site.url)
    with pytest.raises(StorageTimeout) as refused:
        published.fetch("resnet18")
    for word in (
        "resnet18",
        "--model.weights",
        "LIGHTSHIP_WEIGHTS_MIRROR",
        "no success within 3 s",
    ):
        assert word in str(refused.value)


def test_a_site_without_the_file_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSHIP_WEIGHTS_MIRROR", site.url)
    with pytest.raises(ConfigError, match="the weights of resnet18 cannot be downloaded"):
        published.fetch("resnet18")


def test_nets_without_published_weights_are_refused_by_name() -> None:
    for net in ("litcnn", "package.module:function", "timm:resnet10t.nope"):
        with pytest.raises(ConfigError, match=net):
            published.addresses(net)
    with pytest.raises(ConfigError, match=r"no such net; did you mean timm:resnet18"):
        published.addresses("timm:resnet19")


def test_every_net_by_name_has_an_address() -> None:
    names = published.torchvision_names()
    assert len(names) > 50
    for name in names:
        assert published.addresses(name)[0].startswith("https://")
    vit = published.addresses("timm:vit_small_patch16_224")
    assert vit[0].startswith("https://huggingface.co/timm/vit_small_patch16_224.augreg")
    assert not any(address.endswith(".npz") for address in vit)
