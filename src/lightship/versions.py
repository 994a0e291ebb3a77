"""Versions of file formats, and the meaning of keys that older files lack.

Keys may be added to or missing from a file of any version: readers fill in missing ones from the
tables here. A format's version is raised only if older code would misunderstand the file; older
code then refuses it by version. Files without a version were written by 0.1.0.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lightship import __version__
from lightship.config import Config, identity
from lightship.errors import ConfigError

VERSIONS = {
    "config.yaml": 1, "checkpoint": 2, "checkpoint record": 1, "prediction parts": 1,
    "manifest": 1, "manifest table": 1, "pack.json": 1, "features": 1, "order": 2, "decay": 2,
}  # fmt: skip
"""Format -> the newest version that this code reads, and the one it writes."""
MEANT: dict[str, Any] = {}
"""Setting -> its meaning in older versions without it, if other than the default."""
OLDEST = frozenset(
    {
        "run.seed", "data.root", "data.root_md5", "data.global_batch_size", "data.image_size_px",
        "data.val_fraction", "data.normalize", "data.crop_padding_px", "data.crop_min_area",
        "data.flip", "data.flip_in_turn", "data.cutout_px", "data.mixup_alpha",
        "data.cutmix_alpha", "model.net", "model.weights", "model.label_smoothing",
        "model.ema_decay", "model.channels_last", "model.compile", "model.test_flip",
        "model.test_shift", "optim.name", "optim.lr", "optim.momentum", "optim.weight_decay",
        "optim.sgd_lr", "optim.head_lr", "optim.sgd_momentum", "optim.whitening_fraction",
        "optim.schedule", "optim.warmup_fraction", "optim.final_lr_fraction", "trainer.precision",
        "trainer.gradient_clip_val", "trainer.limit_train_batches", "trainer.sync_batchnorm",
    }
)  # fmt: skip
"""Settings of 0.1.0 that affect training. All are in a run's hash: changing this set would change
the default names of runs."""


class NewerVersion(ConfigError):
    """A file was written by a newer lightship; it is neither read nor deleted."""


def check(what: str, version: Any, where: str) -> None:
    """Raise NewerVersion for a file of a newer format version.

    Args:
        what: A key of VERSIONS.
        version: The version in the file; 0 or None: the file has none.
        where: The file's name, for the error.
    """
    if version and (not isinstance(version, int) or version > VERSIONS[what]):
        raise NewerVersion(
            f"{where} has version {version!s:.40} of its format ({what}), and lightship "
            f"{__version__} reads up to {VERSIONS[what]}: upgrade lightship"
        )


def meant(key: str) -> Any:
    """The value of the setting `section.field` for runs of versions that did not have it."""
    section, _, name = key.partition(".")
    return MEANT.get(key, getattr(getattr(Config(), section), name))


def complete(kept: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """All settings of the sections of a config.yaml, of any version."""
    return {
        section.name: {
            item.name: fields[item.name]
            if item.name in fields
            else meant(f"{section.name}.{item.name}")
            for item in dataclasses.fields(section.default_factory)  # type: ignore[arg-type]
        }
        for section in dataclasses.fields(Config)
        for fields in [kept.get(section.name, {})]
    }


def identity_hash(config: Config, root: str | None = None) -> str:
    """First 8 hex digits of the sha256 of `identity`: the same in every version.

    A setting that 0.1.0 did not have is included only if it differs from what 0.1.0 did.

    Args:
        config: The settings.
        root: data.root as 0.1.0 hashed it, with a trailing slash; None: that of `config`.
    """
    hashed = {
        key: value
        for key, value in identity(config).items()
        if key in OLDEST or value != meant(key)
    }
    if root is not None:
        hashed["data.root"] = root
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:8]
