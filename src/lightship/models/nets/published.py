"""Published weights of nets by name: their addresses, and a cache of what was downloaded."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import torchvision

from lightship import storage
from lightship.errors import ConfigError
from lightship.models.nets import timm_nets

logger = logging.getLogger(__name__)
_HUB = "https://huggingface.co"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_ADDRESS = re.compile(r"(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_CHECKSUM = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # of sha256, as torch.hub reads it
_MIRROR = "LIGHTSHIP_WEIGHTS_MIRROR"


def torchvision_names() -> list[str]:
    """Names of torchvision's classifiers."""
    return torchvision.models.list_models(module=torchvision.models)


def addresses(net: str) -> list[str]:
    """Where the weights of a net by name are published, the first choice first.

    Raises:
        ConfigError: There are none.
    """
    found: list[str] = []
    if net.startswith(timm_nets.PREFIX):
        config = timm_nets.pretrained_config(net)
        if config is not None and config.hf_hub_id:
            repo, _, revision = config.hf_hub_id.partition("@")
            files = [config.hf_hub_filename] if config.hf_hub_filename else _HUB_FILES
            found = [f"{_HUB}/{repo}/resolve/{revision or 'main'}/{file}" for file in files]
        url = config.url if config is not None else None
        if isinstance(url, str) and not url.endswith(".npz"):
            found.append(url)
    elif net in torchvision_names():
        found = [torchvision.models.get_model_weights(net).DEFAULT.url]
    if not found:
        raise ConfigError(
            f"--model.weights default: {net} has no published weights; give a URL or leave it out"
        )
    return found


def fetch(net: str) -> tuple[bytes, str]:
    """(the file, its address) of a net's published weights. Any rank; blocks for the download.

    Files are kept under `storage.cache_path("weights")`; those of torch's and the Hub's caches are
    used too. With LIGHTSHIP_WEIGHTS_MIRROR, a URL, the file of https://HOST/PATH is read from
    there, at HOST/PATH; HF_ENDPOINT stands for https://huggingface.co, as for its own tools.

    Raises:
        ConfigError: The net has no published weights, or they are not there or damaged.
        StorageTimeout: Their storage does not answer.
    """
    found = addresses(net)
    for url in found:
        for path in _cached(url):
            data = storage.read_bytes(str(path))
            if _wrong_checksum(data, url) is None:
                return data, url
    failed: Exception | None = None
    for url in found:
        try:
            return _download(url), url
        except (storage.NotFound, storage.Denied, storage.StorageTimeout) as error:
            failed = failed or error
    assert failed is not None
    kind = storage.StorageTimeout if isinstance(failed, storage.StorageTimeout) else ConfigError
    raise kind(
        f"--model.weights default: the weights of {net} cannot be downloaded ({failed}). Without "
        f"network, give a file or URL as --model.weights, or a copy of the site as {_MIRROR}"
    ) from failed


def _cached(url: str) -> Iterator[Path]:
    """Local files that may hold what is at `url`."""
    paths = [_cache_path(url), Path(torch.hub.get_dir(), "checkpoints", storage.base_name(url))]
    hub = _HUB_ADDRESS.fullmatch(url.removeprefix(f"{_HUB}/"))
    if hub and find_spec("huggingface_hub") is not None:
        from huggingface_hub import try_to_load_from_cache

        kept = try_to_load_from_cache(hub["repo"], hub["file"], revision=hub["revision"])
        paths[1] = Path(kept) if isinstance(kept, str) else paths[0]
    return (path for path in paths if path.is_file())


def _cache_path(url: str) -> Path:
    return storage.cache_path("weights", *url.partition("://")[2].split("/"))


def _download(url: str) -> bytes:
    """The file at an address, which is then in the cache."""
    place, path = url, _cache_path(url)
    if mirror := os.environ.get(_MIRROR):
        place = storage.join(mirror, url.partition("://")[2])
    elif endpoint := os.environ.get("HF_ENDPOINT"):
        place = url.replace(_HUB, endpoint.rstrip("/"))
    logger.info(f"downloading weights: {storage.redact(place)}")
    storage.download(place, path, answer_s=storage.Limits.now().probe_s)
    data = path.read_bytes()
    if wrong := _wrong_checksum(data, url):
        path.unlink()
        raise ConfigError(f"--model.weights default: {storage.redact(place)} {wrong}")
    return data


def _wrong_checksum(data: bytes, url: str) -> str | None:
    """How a file differs from the checksum in its name; None if it does not, or has none."""
    named = _CHECKSUM.search(url)
    actual = hashlib.sha256(data).hexdigest()
    if named is None or actual.startswith(named[1]):
        return None
    return f"is damaged: its sha256 begins with {actual[:8]}, by its name with {named[1][:8]}"
