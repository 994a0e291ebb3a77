"""What a run can be told: every field with its unit and range, and the checks that need no torch.

The parser (cli.py) is built from these dataclasses, so a field's name is its flag
(`--data.global_batch_size`) and its docstring is its help. Field names under `trainer` are
Lightning's own. Fields made with `free(...)` may change between two starts of one run: they do not
change what is learned.
"""

import dataclasses
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightship.errors import ConfigError

OWN_NETS = ("litcnn", "speednet", "speednet96")
NAMED_SETS = ("digits", "cifar10", "cifar100")
"""Values of data.root that are names; a folder of such a name is `./digits`."""
EXPORTS = {"torch": "model.pt2", "onnx": "model.onnx"}
"""Formats of `lightship export`, and the file's name where none is given."""
_MIN, _MAX, _FREE, _UNIT = "at_least", "at_most", "free", "unit"


def bounded(
    default: Any,
    at_least: float | None = None,
    at_most: float | None = None,
    unit: str = "",
    free: bool = False,
) -> Any:
    """A dataclass field with an inclusive range (None: open) in `unit`, checked by `check`."""
    meta = {_MIN: at_least, _MAX: at_most, _UNIT: unit, _FREE: free}
    return field(default=default, metadata=meta)


def free(default: Any) -> Any:
    """A dataclass field that two starts of the same run may set differently."""
    return field(default=default, metadata={_FREE: True})


@dataclass
class RunConfig:
    """Where the run lives and how it is kept."""

    output: str | None = free(None)
    """URL or path where the run lives (config, checkpoints, logs, report, DONE). Default:
    runs/NAME-HASH, where the hash is of everything that changes what is learned."""
    seed: int = bounded(0, 0, 2**31 - 1)
    """Seed of initialisation, order and augmentation."""
    resume: Literal["auto", "never", "must"] = free("auto")
    """Continue from the newest good checkpoint under run.output: if there is one (auto), never
    (a non-empty output is then refused), or fail without one (must)."""
    tracking: Literal["auto", "offline", "none"] = free("auto")
    """Weights & Biases: online when a key is found and offline without one (auto), always offline,
    or not at all (wandb need not be installed)."""
    project: str = free("lightship")
    """Weights & Biases project."""
    log_format: Literal["auto", "text", "json"] = free("auto")
    """Progress: bars in a terminal and timed lines elsewhere (auto), timed lines, or JSON lines."""
    log_images: int = bounded(32, 0, 1024, "images", free=True)
    """How many fixed validation images are logged with their predictions; 0: none."""
    checkpoint_every_steps: int | None = bounded(None, 1, None, "steps", free=True)
    """The most optimizer steps that a kill may lose: a save begins each half of them, and training
    waits for one that is not durable at the whole. Default: no bound in steps."""
    checkpoint_every_s: float | None = bounded(600.0, 1, None, "seconds", free=True)
    """The most seconds of training that a kill may lose, kept in the same way: and a step, or
    eight where several processes must agree."""
    keep_last: int = bounded(2, 1, 1000, "checkpoints", free=True)
    """How many of the newest checkpoints are kept, beside the best."""


@dataclass
class DataConfig:
    """What is learned from, and how it is fed."""

    root: str = "digits"
    """URL or path of the images: class folders, WebDataset tars, Parquet, a CIFAR python archive,
    a .zip or .tar of class folders; or a name: digits (embedded), cifar10, cifar100."""
    root_md5: str | None = None
    """MD5 that the archive at data.root must have (the named sets bring their own)."""
    mode: Literal["auto", "resident", "streaming"] = free("auto")
    """Hold the decoded set on the device (resident), read it as it is needed (streaming), or
    decide by data.resident_gib and data.crop_min_area (auto)."""
    resident_gib: float = bounded(4.0, 0, None, "GiB", free=True)
    """Largest decoded size held on the device."""
    cache_gib: float = bounded(0.0, 0, None, "GiB", free=True)
    """Size of the local block cache in streaming mode; 0: none."""
    prefetch_gib: float = bounded(2.0, 0.0625, None, "GiB", free=True)
    """Streaming: memory of each process for what is read ahead. Less means more requests."""
    global_batch_size: int = bounded(64, 1, 2**20, "images")
    """Images per optimizer step over all devices and accumulation; the device's share follows."""
    eval_batch_size: int = bounded(512, 1, 2**20, "images", free=True)
    """Images per evaluation batch on each device; results do not depend on it."""
    image_size_px: int | None = bounded(None, 1, 4096, "pixels")
    """Images become squares of this side. Default: as they are, if all are of one size."""
    val_fraction: float = bounded(0.1, 0, 0.9)
    """Share of train that is held out where there is no val split (the same images for every
    run.seed); 0: train without validation."""
    on_error: Literal["raise", "skip"] = free("raise")
    """An image that cannot be read: stop and name it, or leave it out and count it."""
    max_bad_fraction: float = bounded(0.01, 0, 1, free=True)
    """With on_error=skip, the largest share of a split that may be skipped. Each image counts once,
    over all epochs, processes and restarts. A process checks its own count at once, that of all
    processes at each checkpoint, thus at each epoch's end, and after a test or validation."""
    max_image_pixels: int = bounded(178_956_970, 1, None, "pixels", free=True)
    """Largest image that is decoded, width times height: a bound of memory, of which a pixel takes
    up to 7 bytes. A larger JPEG that is to be scaled down is decoded at a half, a quarter or an
    eighth of its size (unless it is progressive); any other larger image cannot be read."""
    decode_threads: int = bounded(0, 0, 1024, "threads", free=True)
    """Threads that decode images; 0: one a core."""
    normalize: Literal["auto", "imagenet", "none"] = "auto"
    """Pixel scaling: by the train split's own mean and deviation (auto), by ImageNet's (what
    torchvision's weights expect), or to 0..1 only."""
    crop_padding_px: int = bounded(0, 0, 512, "pixels")
    """Training: reflect-pad by this much and crop back at random."""
    crop_min_area: float = bounded(0.0, 0, 1)
    """Training: cut out a random part of each image, at least this share of its area and 3:4 to 4:3
    in shape, and scale it to image_size_px (torchvision's RandomResizedCrop; 0.08 is usual); 0: the
    whole image. The set is then streamed."""
    flip: bool = False
    """Training: mirror half of the images left to right."""
    flip_in_turn: bool = False
    """With data.flip: mirror each image every other epoch instead of by chance."""
    cutout_px: int = bounded(0, 0, 4096, "pixels")
    """Training: grey out a random square of this side; 0: none."""
    mixup_alpha: float = bounded(0.0, 0, 100)
    """Training: mix pairs of images with a Beta(alpha, alpha) weight; 0: none."""
    cutmix_alpha: float = bounded(0.0, 0, 100)
    """Training: paste a box of one image of a pair into the other; 0: none. With mixup too, each
    pair draws one of the two."""


@dataclass
class ModelConfig:
    """The net and its loss."""

    net: str = "litcnn"
    """litcnn, speednet, speednet96, any torchvision classifier (resnet18, ...), or your own as
    package.module:function, which is called with the number of classes and returns a
    torch.nn.Module."""
    weights: str | None = None
    """Start from: `default` (torchvision's own, fetched from their address) or the URL of a state
    dict. The last layer is made anew when its number of classes differs."""
    label_smoothing: float = bounded(0.0, 0, 0.99)
    """Probability mass spread over all classes in the training loss."""
    ema_decay: float = bounded(0.0, 0, 0.99999)
    """Evaluate an exponential moving average of the weights; 0: the weights themselves."""
    channels_last: bool = False
    """Keep images and filters in NHWC memory order (faster convolutions on CPU and GPU)."""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    """torch.compile mode of the net."""
    test_flip: bool = False
    """Average each evaluated image's prediction with that of its mirror image."""
    test_shift: bool = False
    """Average it also with those of the image moved by one pixel to either corner, half of all."""


@dataclass
class OptimConfig:
    """How the weights move."""

    name: Literal["adam", "adamw", "sgd", "muon", "muon-sgd"] = "adam"
    """Muon moves matrices and filters; all else in the net then moves by AdamW, or by SGD
    (muon-sgd, for nets with BatchNorm: the filters' size is then fixed)."""
    lr: float = bounded(2e-4, 0, 100)
    """Peak learning rate, for the global batch: it does not depend on the number of processes."""
    momentum: float = bounded(0.9, 0, 0.9999)
    """SGD (Nesterov) and Muon (with muon-sgd: of the filters)."""
    weight_decay: float = bounded(0.0, 0, 10)
    """Decay of matrices and filters; biases and norms are left alone. With muon-sgd: the share of
    itself that each weight but the filters loses in a step at the peak rate."""
    sgd_lr: float = bounded(0.05, 1e-9, 1e6)
    """muon-sgd: peak rate of biases and norms, for the mean loss over the global batch."""
    head_lr: float = bounded(0.05, 1e-9, 1e6)
    """muon-sgd: peak rate of the last layer, for the mean loss over the global batch."""
    sgd_momentum: float = bounded(0.85, 0, 0.9999)
    """muon-sgd: Nesterov momentum of all but the filters."""
    whitening_fraction: float = bounded(0.375, 0, 1)
    """muon-sgd: share of all steps in which the bias of a first layer whose weight is frozen (a
    whitening layer) still moves."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_fraction: float = bounded(0.0, 0, 0.99)
    """Share of all steps in which the learning rate rises linearly from 0 to its peak."""
    final_lr_fraction: float = bounded(0.0, 0, 1)
    """Learning rate at the last step as a share of the peak (cosine, linear)."""


@dataclass
class TrainerConfig:
    """Lightning's Trainer: the same names and meanings, and early stopping."""

    max_epochs: int = bounded(20, -1, None, "epochs", free=True)
    """Passes over train; -1: no bound (then max_steps must be set)."""
    max_steps: int = bounded(-1, -1, None, "steps", free=True)
    """Optimizer steps; -1: no bound."""
    accelerator: str = free("auto")
    """auto, cpu, gpu, tpu (or another XLA device that PJRT_DEVICE names), ..."""
    devices: str = free("auto")
    """auto, or how many on this node. Several nodes: see torchrun's PET_* variables."""
    precision: str = "32-true"
    """32-true, bf16-mixed, 16-mixed, bf16-true, 16-true."""
    accumulate_grad_batches: int = bounded(1, 1, 4096, "parts", free=True)
    """Cut each global batch into so many parts computed one after the other (less memory)."""
    gradient_clip_val: float = bounded(0.0, 0, None)
    """Largest norm of the gradient; 0: unbounded."""
    log_every_n_steps: int = bounded(50, 1, None, "steps", free=True)
    """Steps between log points; in between a step does not wait for the device."""
    check_val_every_n_epoch: int = bounded(1, 1, None, "epochs", free=True)
    """Epochs between validations."""
    limit_train_batches: int | None = bounded(None, 1, None, "batches")
    """Stop each epoch after so many global batches."""
    limit_val_batches: int | None = bounded(None, 1, None, "batches", free=True)
    """Validate on so many batches only."""
    limit_test_batches: int | None = bounded(None, 1, None, "batches", free=True)
    """Test on so many batches only."""
    sync_batchnorm: bool = False
    """Normalise over the global batch instead of each GPU's share."""
    timeout_s: float = bounded(300.0, 1, 86400, "seconds", free=True)
    """Longest wait for the other processes in one exchange; then the run ends with code 74."""
    deterministic: bool = free(False)
    """Refuse nondeterministic algorithms (slower on CUDA)."""
    monitor: Literal["val/loss", "val/acc"] = free("val/loss")
    """What the best checkpoint is best at, and what early stopping watches."""
    on_nonfinite: Literal["warn", "stop"] = free("warn")
    """A loss that is not finite at a log point or validation: report it and go on, or end the run
    with code 70; either way the best checkpoint is one of a finite loss."""
    early_stopping_patience: int = bounded(0, 0, None, "validations", free=True)
    """Stop after so many validations without a better monitor; 0: never."""

    @property
    def is_on_tpu(self) -> bool:
        """Whether PyTorch/XLA drives the devices."""
        return self.accelerator == "tpu" or (
            self.accelerator == "auto" and os.environ.get("PJRT_DEVICE") == "TPU"
        )


@dataclass
class PackConfig:
    """How `lightship pack` writes its shards."""

    shard_mib: float = bounded(256.0, 0.001, 2**16, "MiB")
    """Size at which a shard is full."""
    short_side_px: int | None = bounded(None, 1, 65_535, "pixels")
    """Scale images down until their shorter side has so many pixels; never up. JPEG stays JPEG (see
    quality) and all else becomes PNG. Default: images keep their size."""
    quality: int | None = bounded(None, 1, 100)
    """Make every image a JPEG of this quality. Default: only what is scaled is compressed again,
    JPEG with quality 90; all else is copied byte for byte."""
    on_error: Literal["raise", "skip"] = "raise"
    """An image that cannot be read: stop and name it, or leave it out and list it in
    DST/skipped.txt. What is copied is known by its first bytes and not decoded."""
    max_bad_fraction: float = bounded(0.01, 0, 1)
    """With on_error=skip, the largest share of a split that may be left out."""
    max_image_pixels: int = bounded(178_956_970, 1, None, "pixels")
    """Largest image that is decoded, width times height (see --data.max_image_pixels)."""
    src_md5: str | None = None
    """MD5 that the one file at SRC must have; it is then fetched and kept (the named sets bring
    their own)."""
    threads: int = bounded(0, 0, 256, "threads")
    """Shards written at once, each by a thread that takes 100 to 200 MiB of memory and, where DST
    is no local path, a shard's size of temporary disk (TMPDIR); 0: two a core, at most 16."""
    log_format: Literal["auto", "text", "json"] = "auto"
    """Progress: a bar in a terminal and timed lines elsewhere (auto), timed lines, or JSON
    lines."""


@dataclass
class Config:
    """All of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def identity(config: Config) -> dict[str, Any]:
    """The settings that change what is learned, as flat `section.field` keys with plain values."""
    flat = {}
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        for item in dataclasses.fields(part):
            if not item.metadata.get(_FREE):
                flat[f"{section.name}.{item.name}"] = getattr(part, item.name)
    return {**flat, "data.root": plain_root(config.data.root)}


def plain_root(root: str) -> str:
    """`data.root` without what does not change its meaning: slashes at its end, a leading `./`."""
    if not root or "::" in root or root.startswith(("http://", "https://")):
        return root
    protocol, is_url, path = root.rpartition("://")
    if is_url:
        return f"{protocol}://{path.rstrip('/')}" if path.strip("/") else root
    parts = [part for part in root.split("/") if part not in ("", ".")]
    if root.startswith("/"):
        return "/" + "/".join(parts)
    plain = "/".join(parts) or "."
    return f"./{plain}" if plain in NAMED_SETS and root != plain else plain


def is_same_root(one: str, other: str) -> bool:
    """Whether two values of data.root name one place; a relative path counts from here."""
    one, other = plain_root(one).rstrip("/"), plain_root(other).rstrip("/")
    if one == other or "://" in one + other or "::" in one + other or {one, other} & {*NAMED_SETS}:
        return one == other
    return os.path.realpath(one) == os.path.realpath(other)


def check(config: Config) -> None:
    """Raise ConfigError, naming value, bound and flag, for what no machine could run."""
    for section in dataclasses.fields(config):
        check_ranges(getattr(config, section.name), f"--{section.name}.")
    data, trainer = config.data, config.trainer
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ConfigError(
            "--trainer.max_epochs and --trainer.max_steps are both -1 (no bound): the run would "
            "never end; set one of them"
        )
    for name in ("max_epochs", "max_steps"):
        if getattr(trainer, name) == 0:
            raise ConfigError(
                f"--trainer.{name} is 0, which trains nothing; it must be at least 1, or -1 (no "
                "bound). To evaluate a trained run: lightship validate or lightship test"
            )
    if data.global_batch_size % trainer.accumulate_grad_batches:
        raise ConfigError(
            f"--data.global_batch_size {data.global_batch_size} is not divisible by "
            f"--trainer.accumulate_grad_batches {trainer.accumulate_grad_batches}"
        )
    if trainer.devices != "auto" and not re.fullmatch("[1-9][0-9]*", trainer.devices):
        raise ConfigError(
            f"--trainer.devices is '{trainer.devices}'; it must be 'auto' or a number of at least 1"
        )
    if data.flip_in_turn and not data.flip:
        raise ConfigError("--data.flip_in_turn true says how to mirror: set --data.flip true too")
    if data.crop_min_area and data.image_size_px is None:
        raise ConfigError("--data.crop_min_area needs --data.image_size_px, the size to scale to")
    if data.crop_min_area and data.mode == "resident":
        raise ConfigError(
            f"--data.crop_min_area {data.crop_min_area:g} cuts from whole images, which "
            "--data.mode resident does not keep; set streaming or auto"
        )
    if config.model.weights == "default" and config.model.net in OWN_NETS:
        raise ConfigError(
            f"--model.weights default: {config.model.net} has no published weights; give a URL"
        )


def check_ranges(part: Any, prefix: str) -> None:
    """Raise ConfigError for a field of the dataclass `part` that is out of its range.

    Args:
        part: One section, or the whole of a command's settings.
        prefix: What its fields' flags begin with, such as `--data.`.
    """
    for item in dataclasses.fields(part):
        _check_range(f"{prefix}{item.name}", getattr(part, item.name), item.metadata)


def _check_range(flag: str, value: Any, meta: Mapping[str, Any]) -> None:
    low, high = meta.get(_MIN), meta.get(_MAX)
    if value is None:
        return
    if (low is not None and value < low) or (high is not None and value > high):
        unit = meta.get(_UNIT) or ""
        raise ConfigError(f"{flag} is {value}; it must be {_bound(meta)} {unit}".rstrip())


def _bound(meta: Mapping[str, Any]) -> str:
    limits = (("at least", meta.get(_MIN)), ("at most", meta.get(_MAX)))
    return " and ".join(f"{word} {limit:.10g}" for word, limit in limits if limit is not None)


def range_text(section: type, name: str) -> str:
    """A field's range and unit as help shows them, such as " [at least 1 images]"."""
    meta = next(item.metadata for item in dataclasses.fields(section) if item.name == name)
    text = f"{_bound(meta)} {meta.get(_UNIT) or ''}".strip()
    return f" [{text}]" if text else ""


def type_text(section: type, name: str) -> str:
    """What a field takes, in words, such as "a whole number or null"."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    kind = typing.get_type_hints(section)[name]
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    kinds = typing.get_args(kind) or (kind,)
    return " or ".join(words.get(part, "null") for part in kinds)
