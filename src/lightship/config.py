"""The settings: every field with its unit and range, and the checks that need no torch.

The parser (cli/parser.py) is built from these dataclasses: a field's name is its flag
(`--data.global_batch_size`), its docstring the help. Fields under `trainer` have Lightning's names.
A field made with `free=True` does not affect what is trained and may differ between two starts of
one run.
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
"""Formats of `lightship export`, and their default file names."""
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
    """A dataclass field without a range that may differ between two starts of one run."""
    return bounded(default, free=True)


@dataclass
class RunConfig:
    """Outputs, checkpoints, resuming, tracking."""

    output: str | None = free(None)
    """URL or path of all outputs (config, checkpoints, logs, report, DONE). Default:
    runs/NAME-HASH, with the hash of all settings that affect training."""
    seed: int = bounded(0, 0, 2**31 - 1)
    """Seed of initialisation, sample order and augmentation."""
    resume: Literal["auto", "never", "must"] = free("auto")
    """Resume from the newest valid checkpoint in run.output: if one exists (auto), never (fail if
    run.output is not empty), or fail if none exists (must)."""
    tracking: Literal["auto", "offline", "none"] = free("auto")
    """Weights & Biases: online if an API key is found, else offline (auto); always offline; or
    disabled (none: wandb need not be installed)."""
    project: str = free("lightship")
    """Weights & Biases project."""
    log_format: Literal["auto", "text", "json"] = free("auto")
    """Progress output: bars on a terminal, else timestamped lines (auto); timestamped lines (text);
    or JSON lines."""
    log_level: Literal["debug", "info", "warning"] = free("info")
    """Least severe messages that are shown; progress is shown at every level."""
    log_images: int = bounded(32, 0, 1024, "images", free=True)
    """Number of fixed validation images logged with their predictions; 0: none."""
    checkpoint_every_steps: int | None = bounded(None, 1, None, "steps", free=True)
    """Max optimizer steps lost on a crash: a checkpoint starts every N/2 steps, and training waits
    if it is not durable after N. Default: no limit in steps."""
    checkpoint_every_s: float | None = bounded(600.0, 1, None, "seconds", free=True)
    """Max seconds of training lost on a crash, plus 1 step (up to 8 if distributed). Works as
    checkpoint_every_steps; null: no limit in seconds."""
    keep_last: int = bounded(2, 1, 1000, "checkpoints", free=True)
    """Number of most recent checkpoints to keep, in addition to the best."""


@dataclass
class DataConfig:
    """Data set, input pipeline and augmentation."""

    root: str = "digits"
    """URL or path of the images: class folders, WebDataset tars, Parquet, a CIFAR python archive,
    a .zip or .tar of class folders; or a name: digits (embedded), cifar10, cifar100."""
    root_md5: str | None = None
    """Expected MD5 of the archive at data.root (known for cifar10 and cifar100)."""
    mode: Literal["auto", "resident", "streaming"] = free("auto")
    """Decode once and keep the set on the device (resident), read and decode continuously
    (streaming), or choose by data.resident_gib and data.crop_min_area (auto)."""
    resident_gib: float = bounded(4.0, 0, None, "GiB", free=True)
    """Max decoded size kept on the device; a larger set is streamed."""
    cache_gib: float = bounded(0.0, 0, None, "GiB", free=True)
    """Streaming: size of the local disk cache; 0: no cache."""
    prefetch_gib: float = bounded(2.0, 0.0625, None, "GiB", free=True)
    """Streaming: max memory per process for prefetched data. A lower value makes more requests."""
    global_batch_size: int = bounded(64, 1, 2**20, "images")
    """Images per optimizer step, over all devices and accumulated batches."""
    eval_batch_size: int = bounded(512, 1, 2**20, "images", free=True)
    """Images per device and evaluation step; metrics do not depend on it."""
    image_size_px: int | None = bounded(None, 1, 4096, "pixels")
    """Resize and center-crop images to squares of this side. Default: no resizing, all images must
    have one size."""
    val_fraction: float = bounded(0.1, 0, 0.9)
    """Fraction of train held out for validation if there is no val split, independent of run.seed;
    0: no validation."""
    on_error: Literal["raise", "skip"] = free("raise")
    """Unreadable image: fail, or skip and report."""
    max_bad_fraction: float = bounded(0.01, 0, 1, free=True)
    """With on_error=skip, max fraction of a split that may be skipped. Each image counts once over
    all epochs, processes and restarts. Checked per process at once, and over all processes at each
    checkpoint, epoch end, test and validation."""
    max_image_pixels: int = bounded(178_956_970, 1, None, "pixels", free=True)
    """Max width times height of a decoded image; decoding takes up to 7 bytes of memory a pixel.
    A larger non-progressive JPEG that is scaled down is decoded at 1/2, 1/4 or 1/8 of its size;
    any other larger image is unreadable."""
    decode_threads: int = bounded(0, 0, 1024, "threads", free=True)
    """Image decoding threads per process; 0: one per core."""
    normalize: Literal["auto", "imagenet", "none"] = "auto"
    """Pixel normalization: mean and std of the train split (auto), of ImageNet (as torchvision's
    weights expect), or only scaled to 0..1 (none)."""
    crop_padding_px: int = bounded(0, 0, 512, "pixels")
    """Training: reflection padding before a random crop of the original size."""
    crop_min_area: float = bounded(0.0, 0, 1)
    """Training: min area of a random resized crop as a fraction of the image, aspect ratio 3:4 to
    4:3 (torchvision's RandomResizedCrop, usually 0.08); 0: the whole image. Implies streaming."""
    flip: bool = False
    """Training: random horizontal flip, probability 1/2."""
    flip_in_turn: bool = False
    """With data.flip: alternating flip, each image every other epoch, instead of random."""
    cutout_px: int = bounded(0, 0, 4096, "pixels")
    """Training: side of a random square set to grey; 0: none."""
    mixup_alpha: float = bounded(0.0, 0, 100)
    """Training: mixup with weights from Beta(alpha, alpha); 0: none."""
    cutmix_alpha: float = bounded(0.0, 0, 100)
    """Training: CutMix with areas from Beta(alpha, alpha); 0: none. With mixup_alpha > 0, each pair
    of images gets one of the two at random."""


@dataclass
class ModelConfig:
    """Net, weights, loss and test-time augmentation."""

    net: str = "litcnn"
    """litcnn, speednet, speednet96, a torchvision classifier (resnet18, ...), or your own as
    package.module:function, called with the number of classes, returning a torch.nn.Module."""
    weights: str | None = None
    """Initial weights: `default` (torchvision's pretrained weights, downloaded) or the URL of a
    state dict or checkpoint. The last layer is reinitialised if its number of classes differs."""
    label_smoothing: float = bounded(0.0, 0, 0.99)
    """Label smoothing of the training loss."""
    ema_decay: float = bounded(0.0, 0, 0.99999)
    """Decay of the exponential moving average of the weights used for evaluation; 0: no average."""
    channels_last: bool = False
    """NHWC memory format (faster convolutions on CPU and GPU)."""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    """torch.compile mode."""
    test_flip: bool = False
    """Test-time augmentation: average predictions with those of the mirrored image."""
    test_shift: bool = False
    """Test-time augmentation: two diagonal shifts by 1 px, together of weight 1/2."""


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adam", "adamw", "sgd", "muon", "muon-sgd"] = "adam"
    """Optimizer. muon: Muon for matrices and filters, AdamW for other parameters; muon-sgd: Muon
    for filters of a fixed norm, SGD for other parameters (for nets with BatchNorm)."""
    lr: float = bounded(2e-4, 0, 100)
    """Peak learning rate for the global batch; not scaled by the number of processes."""
    momentum: float = bounded(0.9, 0, 0.9999)
    """Nesterov momentum of SGD and Muon (muon-sgd: of the filters)."""
    weight_decay: float = bounded(0.0, 0, 10)
    """Weight decay of matrices and filters, not of biases and norms. muon-sgd: fraction by which
    all weights but the filters shrink in a step at the peak learning rate."""
    sgd_lr: float = bounded(0.05, 1e-9, 1e6)
    """muon-sgd: peak learning rate of biases and norms, for the mean loss of the global batch."""
    head_lr: float = bounded(0.05, 1e-9, 1e6)
    """muon-sgd: peak learning rate of the last layer, for the mean loss of the global batch."""
    sgd_momentum: float = bounded(0.85, 0, 0.9999)
    """muon-sgd: Nesterov momentum of all parameters but the filters."""
    whitening_fraction: float = bounded(0.375, 0, 1)
    """muon-sgd: fraction of all steps in which the bias of a frozen first layer (whitening) is
    trained."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning-rate schedule after warm-up."""
    warmup_fraction: float = bounded(0.0, 0, 0.99)
    """Fraction of all steps with linear warm-up from 0."""
    final_lr_fraction: float = bounded(0.0, 0, 1)
    """Learning rate of the last step as a fraction of the peak (cosine, linear)."""


@dataclass
class TrainerConfig:
    """Lightning's Trainer arguments, and early stopping."""

    max_epochs: int = bounded(20, -1, None, "epochs", free=True)
    """Max epochs; -1: no limit (then max_steps must be set)."""
    max_steps: int = bounded(-1, -1, None, "steps", free=True)
    """Max optimizer steps; -1: no limit."""
    accelerator: str = free("auto")
    """auto, cpu, gpu, tpu, or another accelerator of Lightning or XLA device in PJRT_DEVICE."""
    devices: str = free("auto")
    """Number of devices on this node, or auto. For several nodes set torchrun's PET_* variables."""
    precision: str = "32-true"
    """32-true, bf16-mixed, 16-mixed, bf16-true or 16-true."""
    accumulate_grad_batches: int = bounded(1, 1, 4096, "parts", free=True)
    """Split each global batch into N parts, processed one after another to save memory."""
    gradient_clip_val: float = bounded(0.0, 0, None)
    """Max gradient norm; 0: no clipping."""
    log_every_n_steps: int = bounded(50, 1, None, "steps", free=True)
    """Steps between log points. Other steps do not synchronize with the device."""
    check_val_every_n_epoch: int = bounded(1, 1, None, "epochs", free=True)
    """Epochs between validations."""
    limit_train_batches: int | None = bounded(None, 1, None, "batches")
    """Max global batches per epoch."""
    limit_val_batches: int | None = bounded(None, 1, None, "batches", free=True)
    """Max batches per validation."""
    limit_test_batches: int | None = bounded(None, 1, None, "batches", free=True)
    """Max batches per test."""
    sync_batchnorm: bool = False
    """Compute BatchNorm statistics over the global batch instead of per GPU."""
    timeout_s: float = bounded(300.0, 1, 86400, "seconds", free=True)
    """Timeout of a collective operation; the run then ends with code 74."""
    deterministic: bool = free(False)
    """Allow only deterministic algorithms (slower on CUDA)."""
    monitor: Literal["val/loss", "val/acc"] = free("val/loss")
    """Metric that selects the best checkpoint and drives early stopping."""
    on_nonfinite: Literal["warn", "stop"] = free("warn")
    """Loss not finite at a log point or validation: warn, or stop with code 70. The best checkpoint
    always has a finite loss."""
    early_stopping_patience: int = bounded(0, 0, None, "validations", free=True)
    """Stop after N validations without improvement of monitor; 0: never."""

    @property
    def is_on_tpu(self) -> bool:
        """Whether PyTorch/XLA drives the devices."""
        return self.accelerator == "tpu" or (
            self.accelerator == "auto" and os.environ.get("PJRT_DEVICE") == "TPU"
        )


@dataclass
class PackConfig:
    """Settings of `lightship pack`."""

    shard_mib: float = bounded(256.0, 0.001, 2**16, "MiB")
    """Shard size."""
    short_side_px: int | None = bounded(None, 1, 65_535, "pixels")
    """Downscale images whose shorter side is longer than this. JPEG stays JPEG (see quality), other
    formats become PNG. Default: no scaling."""
    quality: int | None = bounded(None, 1, 100)
    """Encode every image as JPEG of this quality. Default: copy images byte for byte; encode only
    those scaled down, JPEG with quality 90."""
    on_error: Literal["raise", "skip"] = "raise"
    """Unreadable image: fail, or skip and list in DST/skipped.txt. Images that are copied are
    checked by their first bytes and not decoded."""
    max_bad_fraction: float = bounded(0.01, 0, 1)
    """With on_error=skip, max fraction of a split that may be skipped."""
    max_image_pixels: int = bounded(178_956_970, 1, None, "pixels")
    """Max width times height of a decoded image, as --data.max_image_pixels of fit."""
    src_md5: str | None = None
    """Expected MD5 of an archive at SRC, which is then downloaded and cached (known for cifar10 and
    cifar100)."""
    threads: int = bounded(0, 0, 256, "threads")
    """Shards written in parallel; 0: two per core, max 16. Each takes 100 to 200 MiB of memory
    and, if DST is remote, one shard of temporary disk space (TMPDIR)."""
    log_format: Literal["auto", "text", "json"] = "auto"
    """Progress output: a bar on a terminal, else timestamped lines (auto); timestamped lines
    (text); or JSON lines."""
    log_level: Literal["debug", "info", "warning"] = "info"
    """Least severe messages that are shown; progress is shown at every level."""


@dataclass
class Config:
    """All settings of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def identity(config: Config) -> dict[str, Any]:
    """The settings that affect training, as flat `section.field` keys with plain values."""
    flat = {}
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        for item in dataclasses.fields(part):
            if not item.metadata.get(_FREE):
                flat[f"{section.name}.{item.name}"] = getattr(part, item.name)
    return {**flat, "data.root": plain_root(config.data.root)}


def plain_root(root: str) -> str:
    """`data.root` normalized: without trailing slashes and a leading `./`."""
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
    """Whether two values of data.root name one place; relative paths are from the working dir."""
    one, other = plain_root(one).rstrip("/"), plain_root(other).rstrip("/")
    if one == other or "://" in one + other or "::" in one + other or {one, other} & {*NAMED_SETS}:
        return one == other
    return os.path.realpath(one) == os.path.realpath(other)


def check(config: Config) -> None:
    """Raise ConfigError, naming value, bound and flag, for settings invalid on any machine."""
    for section in dataclasses.fields(config):
        check_ranges(getattr(config, section.name), f"--{section.name}.")
    data, trainer = config.data, config.trainer
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ConfigError(
            "--trainer.max_epochs and --trainer.max_steps are both -1 (no limit): the run would "
            "never end; set one of them"
        )
    for name in ("max_epochs", "max_steps"):
        if getattr(trainer, name) == 0:
            raise ConfigError(
                f"--trainer.{name} is 0, which trains nothing; it must be at least 1, or -1 (no "
                "limit). To evaluate a trained run: lightship validate or lightship test"
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
        raise ConfigError("--data.flip_in_turn true needs --data.flip true")
    if data.crop_min_area and data.image_size_px is None:
        raise ConfigError("--data.crop_min_area needs --data.image_size_px, the output size")
    if data.crop_min_area and data.mode == "resident":
        raise ConfigError(
            f"--data.crop_min_area {data.crop_min_area:g} crops the original images, which "
            "--data.mode resident does not keep; set streaming or auto"
        )
    if config.model.weights == "default" and config.model.net in OWN_NETS:
        raise ConfigError(
            f"--model.weights default: {config.model.net} has no published weights; give a URL"
        )


def check_ranges(part: Any, prefix: str) -> None:
    """Raise ConfigError for a field of the dataclass `part` that is out of its range.

    Args:
        part: A section, or all settings of a command.
        prefix: Prefix of the flags of its fields, such as `--data.`.
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
    """A field's range and unit for the help, such as " [at least 1 images]", or ''."""
    meta = next(item.metadata for item in dataclasses.fields(section) if item.name == name)
    text = f"{_bound(meta)} {meta.get(_UNIT) or ''}".strip()
    return f" [{text}]" if text else ""


def type_text(section: type, name: str) -> str:
    """A field's type in words, such as "a whole number or null"."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    kind = typing.get_type_hints(section)[name]
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    kinds = typing.get_args(kind) or (kind,)
    return " or ".join(words.get(part, "null") for part in kinds)
