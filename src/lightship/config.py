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

from lightship.errors import ConfigError, UsageError
from lightship.redaction import canonical

OWN_NETS = ("litcnn", "speednet", "speednet96")
NAMED_SETS = ("digits", "cifar10", "cifar100")
"""Values of data.root that are names; a folder of such a name is `./digits`."""
MAX_IMAGE_SIZE_PX = 4096
EXPORTS = {"torch": "model.pt2", "onnx": "model.onnx"}
"""Formats of `lightship export`, and their default file names."""
_FREE_BUT_OF_THE_RUN = (
    "data.on_error", "data.max_bad_fraction", "trainer.monitor", "trainer.deterministic",
    "trainer.limit_val_batches", "trainer.limit_test_batches",
)  # fmt: skip
"""Free settings on which the numbers of an evaluation depend."""
Interpolation = Literal["bilinear", "bicubic"]
LossName = Literal["cross_entropy", "focal"]
PREPROCESSING = ("image_size_px", "interpolation", "eval_crop", "mean", "std")
"""The settings of the data section whose default is that of the weights."""
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
    run.output has a checkpoint), or fail if none exists (must)."""
    tracking: Literal["auto", "offline", "none"] = free("auto")
    """Weights & Biases: online if an API key is found, else offline (auto); always offline; or
    disabled (none: wandb need not be installed)."""
    project: str | None = free(None)
    """Weights & Biases project. Default: WANDB_PROJECT, else lightship."""
    log_format: Literal["auto", "text", "json"] = free("auto")
    """Progress output: bars on a terminal, else timestamped lines (auto); timestamped lines (text);
    or JSON lines."""
    log_level: Literal["debug", "info", "warning"] = free("info")
    """Least severe messages that are shown; progress is shown at every level."""
    log_images: int = bounded(32, 0, 1024, "images", free=True)
    """Number of fixed validation images logged to Weights & Biases (uploaded if online) with their
    predictions, and of example images in the report; 0: none."""
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
    (streaming), or choose by data.resident_gib, crop_min_area and sizes_px (auto)."""
    resident_gib: float = bounded(4.0, 0, None, "GiB", free=True)
    """Per split: max decoded size kept on the device; a larger split is streamed."""
    cache_gib: float = bounded(0.0, 0, None, "GiB", free=True)
    """Streaming: size of the local disk cache; 0: no cache."""
    decoded_cache_gib: float = bounded(4.0, 0, None, "GiB", free=True)
    """Resident: size of the local disk cache of decoded images, with which the next start on the
    same images begins at once; 0: no cache."""
    prefetch_gib: float = bounded(2.0, 0.0625, None, "GiB", free=True)
    """Streaming: max memory per process for prefetched data. A lower value makes more requests."""
    global_batch_size: int = bounded(64, 1, 2**20, "images")
    """Images per optimizer step, over all devices and accumulated batches; divisible by their
    number. The last, incomplete batch of an epoch is dropped."""
    eval_batch_size: int = bounded(512, 1, 2**20, "images", free=True)
    """Images per device and evaluation step; metrics do not depend on it."""
    image_size_px: int | None = bounded(None, 1, MAX_IMAGE_SIZE_PX, "pixels")
    """Resize and center-crop images to squares of this side. Default: the size of model.weights, if
    known; else no resizing: all must be equal squares."""
    sizes_px: list[int] | None = None
    """Training: image sides for equal parts of the epochs, such as 128,160 (small images first save
    time); evaluation is always at image_size_px. Default: image_size_px. Implies streaming."""
    interpolation: Interpolation | None = None
    """Filter of every resizing (antialiased). Default: that of model.weights, else bilinear."""
    eval_crop: float | None = bounded(None, 0.1, 1)
    """Side of the center crop as a fraction of the image's short side, where training takes no
    random crop (timm's crop_pct). Default: that of model.weights, else 1."""
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
    """Max width times height of a decoded image. A larger non-progressive JPEG that is scaled down
    is decoded at 1/2, 1/4 or 1/8 of its size; any other larger image is unreadable."""
    max_scan_pixels: int = bounded(2**29, 1, None, "pixels", free=True)
    """Max width times height times scans of a progressive JPEG of more than 16 scans (10 are
    usual), which bounds the time to decode it."""
    decode_gib: float = bounded(2.0, 0.0625, None, "GiB", free=True)
    """Max memory per process for the images being decoded at one time; others wait. An image that
    needs more is decoded alone. Decoding takes up to 9 bytes a pixel; WebP, AVIF, TIFF and
    progressive JPEG up to 20."""
    max_sample_mib: float = bounded(1024.0, 0.001, 2**20, "MiB", free=True)
    """Max size of an image's file (of a Parquet row: of its bytes); a larger one is unreadable. The
    default holds a 16-bit RGB image of max_image_pixels without compression."""
    decode_threads: int = bounded(0, 0, 1024, "threads", free=True)
    """Image decoding threads per process; 0: one per core."""
    normalize: Literal["auto", "imagenet", "none"] = "auto"
    """Pixel normalization: mean and std of model.weights, if known, else of the train split (auto);
    of ImageNet; or only scaled to 0..1 (none)."""
    mean: list[float] | None = None
    """Mean per channel of pixels in 0..1, such as [0.5,0.5,0.5]; in place of normalize's."""
    std: list[float] | None = None
    """Standard deviation per channel of pixels in 0..1; in place of normalize's."""
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


FREEZE = re.compile(r"none|backbone|stages:[1-9]\d{0,3}")


@dataclass
class ModelConfig:
    """Net, weights, loss and test-time augmentation."""

    net: str = "litcnn"
    """litcnn, speednet, speednet96, a torchvision classifier (resnet18, ...), timm:NAME or
    timm:NAME.TAG, or your own as package.module:function, called with the number of classes,
    returning a torch.nn.Module."""
    weights: str | None = None
    """Initial weights: `default` (torchvision's or timm's pretrained weights, downloaded) or the
    URL of a state dict or checkpoint (.pth, .pt, .ckpt, .safetensors; hf://ORG/REPO/FILE). Their
    preprocessing, where it is known, becomes the default of data.image_size_px, interpolation,
    eval_crop, mean and std. The last layer is new if its number of classes differs."""
    trust: bool = free(False)
    """Run the code that a checkpoint or a run's config.yaml names as its net (module:function).
    Without it, --model.net or a --config file of this command must name the same net."""
    freeze: str = "none"
    """Layers that do not train: none, backbone (all but the last layer), or stages:N (the first N
    stages; of a ResNet 1 is the stem, 2 adds layer1). Their BatchNorm statistics stay too."""
    head_init: Literal["random", "features"] = "random"
    """Initial last layer: random, or fitted to the features of the training images without
    augmentation (at most 20,000, or 50 per class up to 100,000) by logistic regression; with many
    classes by linear discriminant analysis."""
    batch_norm: Literal["train", "frozen", "precise"] = "train"
    """BatchNorm statistics. train: of each batch, a running average in evaluation. frozen: those of
    model.weights, in training too; scale and shift still train (for fine-tuning on small batches).
    precise: as train, but recomputed on 1,024 training images before each validation. frozen has no
    effect on a net without BatchNorm."""
    unfreeze_epoch: int | None = bounded(None, 1, None, "epochs")
    """Number of epochs after which the layers of model.freeze begin to train; null: never."""
    dropout: float | None = bounded(None, 0, 0.99)
    """Probability of the net's dropout layers; null: the net's own."""
    drop_path: float | None = bounded(None, 0, 0.99)
    """Stochastic depth: probability that training leaves out the last residual branch, falling to 0
    at the first; null: the net's own."""
    grad_checkpointing: bool = free(False)
    """Training keeps the inputs of the net's blocks only, and computes them again for the backward
    pass: less memory, about a third more time, the same result. Not with model.compile."""
    loss: LossName = "cross_entropy"
    """Training loss: cross-entropy, or focal loss (Lin et al. 2017), which gives less weight to
    images that are already classified well. Evaluation always uses cross-entropy."""
    focal_gamma: float = bounded(2.0, 0, 10)
    """Focal loss: exponent of its factor (1 - p)^gamma; 0 is cross-entropy."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weight of each class in the training loss: 1 (none), or inversely proportional to its number
    of training images (balanced, as in scikit-learn). Evaluation is not weighted."""
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
    """Weight decay of matrices and filters, not of biases, norms, position embeddings, tokens and
    layer scales. muon-sgd: fraction by which all weights but the filters shrink in a step at the
    peak learning rate."""
    sgd_lr: float = bounded(0.05, 1e-9, 1e6)
    """muon-sgd: peak learning rate of biases and norms (the loss is averaged over the batch)."""
    head_lr: float = bounded(0.05, 1e-9, 1e6)
    """muon-sgd: peak learning rate of the last layer (the loss is averaged over the batch)."""
    sgd_momentum: float = bounded(0.85, 0, 0.9999)
    """muon-sgd: Nesterov momentum of all parameters but the filters."""
    whitening_fraction: float = bounded(0.375, 0, 1)
    """muon-sgd: the bias of a frozen first layer (whitening) trains for this fraction of steps."""
    layer_decay: float = bounded(1.0, 0.01, 1)
    """Learning rate by depth: the layer (block) before the last has this factor of `lr`, each one
    before that this factor of the next, at least a hundredth of `lr`; 1: all have the same. Common
    for fine-tuning: 0.65 to 0.9."""
    head_lr_scale: float = bounded(1.0, 0.001, 1000)
    """Factor of `lr` for the last layer."""
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
    """auto, cpu, gpu, tpu (the XLA device of PJRT_DEVICE), or another accelerator of Lightning."""
    devices: str = free("auto")
    """Number of devices on this node, or auto. For several nodes set torchrun's PET_* variables."""
    precision: str = "32-true"
    """32-true, bf16-mixed, 16-mixed, bf16-true, 16-true, or auto: bf16-mixed where the device
    computes in bfloat16, 16-mixed on older GPUs, else 32-true."""
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
    monitor: Literal["val/loss", "val/acc", "val/balanced_acc", "val/f1", "val/top5"] = free(
        "val/loss"
    )
    """Metric that selects the best checkpoint and drives early stopping: the lowest loss, or the
    highest accuracy, balanced accuracy (mean over classes), macro F1 or top-5 accuracy (of more
    than five classes)."""
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
    max_sample_mib: float = bounded(1024.0, 0.001, 2**20, "MiB")
    """Max size of an image's file, as --data.max_sample_mib of fit."""
    max_scan_pixels: int = bounded(2**29, 1, None, "pixels")
    """Max pixels times scans of a progressive JPEG, as --data.max_scan_pixels of fit."""
    decode_gib: float = bounded(2.0, 0.0625, None, "GiB")
    """Max memory for the images being decoded at one time, as --data.decode_gib of fit."""
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
    """The settings that affect training, as flat `section.field` keys with plain values.

    Without secrets: a new signature of the same URL makes no other run.
    """
    flat = {}
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        for item in dataclasses.fields(part):
            if not item.metadata.get(_FREE):
                value = getattr(part, item.name)
                flat[f"{section.name}.{item.name}"] = _identity_of(item.name, value)
    return flat


def _identity_of(name: str, value: Any) -> Any:
    value = plain_root(value) if name == "root" else value
    return canonical(value) if isinstance(value, str) else value


def of_run(kept: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings of a run's config.yaml that a command on the run takes from it.

    A run's folder may come from anywhere: what describes the machine (devices, memory, limits of
    an image, the block cache) and what is shown is that of the command.
    """
    taken = {*identity(Config()), *_FREE_BUT_OF_THE_RUN}
    return {
        section: {name: value for name, value in fields.items() if f"{section}.{name}" in taken}
        for section, fields in kept.items()
    }


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
    """Whether two values of data.root name one place, with whatever credentials."""
    return place_of(one) == place_of(other)


def place_of(root: str) -> str:
    """The place that a value of data.root names, without credentials.

    Of a path that is this machine's real one; relative paths are from the working directory.
    """
    place = canonical(plain_root(root))
    if "://" in place or "::" in place or place in NAMED_SETS:
        return place.rstrip("/")
    return os.path.realpath(place)


def check(config: Config, starts_anew: bool = True, trains: bool = True) -> None:
    """Raise ConfigError, naming value, bound and flag, for settings invalid on any machine.

    Args:
        config: The settings.
        starts_anew: Whether a model is trained that does not come from a checkpoint.
        trains: Whether a model is trained.
    """
    for section in dataclasses.fields(config):
        check_ranges(getattr(config, section.name), f"--{section.name}.")
    data, trainer = config.data, config.trainer
    _check_length(trainer)
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
    for name, least in (("mean", 0.0), ("std", 1 / 255)):
        channels = getattr(data, name)
        if channels is not None and not (
            len(channels) == 3 and all(least <= channel <= 1 for channel in channels)
        ):
            raise ConfigError(
                f"--data.{name} is {channels}; it must be three numbers of at least {least:.3g} "
                "and at most 1"
            )
    if config.model.weights is None:
        check_resized(data)
    _check_fine_tuning(config, starts_anew)
    _check_sizes(config)
    if config.model.loss != "focal" and config.model.focal_gamma != ModelConfig.focal_gamma:
        raise ConfigError(
            f"--model.focal_gamma {config.model.focal_gamma:g} needs --model.loss focal"
        )
    if trains and data.mode == "resident":
        _check_resident(data)
    if config.model.grad_checkpointing and config.model.compile != "none":
        raise ConfigError(
            f"--model.grad_checkpointing true does not work with --model.compile "
            f"{config.model.compile}, which decides itself what is computed again; set one of "
            "them to its default"
        )
    if config.model.weights == "default" and config.model.net in OWN_NETS:
        raise ConfigError(
            f"--model.weights default: {config.model.net} has no published weights; give a URL"
        )


def _check_length(trainer: TrainerConfig) -> None:
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


def _check_resident(data: DataConfig) -> None:
    """Raise ConfigError for settings of training that need the original images."""
    kept = "the original images, which --data.mode resident does not keep; set streaming or auto"
    if data.crop_min_area:
        raise ConfigError(f"--data.crop_min_area {data.crop_min_area:g} crops {kept}")
    if data.sizes_px:
        raise ConfigError(
            f"--data.sizes_px is {_listed(data.sizes_px)}: each size is made of {kept}"
        )


def _check_sizes(config: Config) -> None:
    sizes = config.data.sizes_px
    if sizes is None:
        return
    shown = f"--data.sizes_px is {_listed(sizes)}"
    if not sizes or not all(1 <= size <= MAX_IMAGE_SIZE_PX for size in sizes):
        raise ConfigError(f"{shown}; it must be sizes of 1 to {MAX_IMAGE_SIZE_PX} pixels")
    if not 1 <= config.trainer.max_epochs < 10**6:
        raise ConfigError(
            f"{shown}: sizes follow the epochs, so --trainer.max_epochs "
            f"({config.trainer.max_epochs}) must be 1 to 999999"
        )


def _listed(values: list[int]) -> str:
    return ",".join(map(str, values))


def _check_fine_tuning(config: Config, starts_anew: bool) -> None:
    model, optim = config.model, config.optim
    is_random = model.weights is None and is_published(model.net)
    if not FREEZE.fullmatch(model.freeze):
        raise ConfigError(
            f"--model.freeze is '{model.freeze}'; it must be none, backbone or stages:N"
        )
    if model.unfreeze_epoch is not None and model.freeze == "none":
        raise ConfigError("--model.unfreeze_epoch needs --model.freeze backbone or stages:N")
    if model.freeze != "none" and is_random and starts_anew:
        raise ConfigError(
            f"--model.freeze {model.freeze} needs --model.weights: {model.net} starts from random "
            "weights, which frozen layers would keep; set none to train all layers"
        )
    if model.head_init == "features" and is_random:
        raise ConfigError(
            f"--model.head_init features needs --model.weights: {model.net} starts from random "
            "weights, whose features say little"
        )
    if model.batch_norm == "frozen" and is_random:
        raise ConfigError(
            f"--model.batch_norm frozen needs --model.weights: {model.net} starts without "
            "statistics"
        )
    for name in ("layer_decay", "head_lr_scale"):
        if optim.name == "muon-sgd" and getattr(optim, name) != 1:
            raise ConfigError(
                f"--optim.{name} does nothing with --optim.name muon-sgd, whose rates are lr, "
                "sgd_lr and head_lr; choose another optimizer"
            )


def is_published(net: str) -> bool:
    """Whether a net is ours, torchvision's or timm's, which have random weights at first."""
    return ":" not in net or net.startswith("timm:")


def check_resized(data: DataConfig) -> None:
    """Raise ConfigError for settings of resizing without a size, when that of weights is known."""
    for name in ("crop_min_area", "eval_crop", "interpolation", "sizes_px"):
        if getattr(data, name) and data.image_size_px is None:
            raise ConfigError(f"--data.{name} needs --data.image_size_px, the output size")


def check_ranges(part: Any, prefix: str) -> None:
    """Check types and ranges.

    Raises UsageError for a value that is missing or of another type, ConfigError for one that is
    out of its range.

    Args:
        part: A section, or all settings of a command.
        prefix: Prefix of the flags of its fields, such as `--data.`.
    """
    types = typing.get_type_hints(type(part))
    for item in dataclasses.fields(part):
        value = getattr(part, item.name)
        if value is None and type(None) not in typing.get_args(types[item.name]):
            raise UsageError(f"{prefix}{item.name} is null; give it a value, or leave the key out")
        if not _is_a(value, types[item.name]):  # of a file that the parser has not converted
            expected = type_text(type(part), item.name)
            raise UsageError(f"{prefix}{item.name} is {value!r:.80}; it must be {expected}")
        _check_range(f"{prefix}{item.name}", value, item.metadata)


def _is_a(value: Any, kind: Any) -> bool:
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return value in inner
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(item, inner[0]) for item in value)
    if inner:
        return any(_is_a(value, each) for each in inner)
    return type(value) is kind or (kind is float and type(value) is int)


def _check_range(flag: str, value: Any, meta: Mapping[str, Any]) -> None:
    low, high = meta.get(_MIN), meta.get(_MAX)
    if value is None:
        return
    if type(value) is int and abs(value) >= 2**63:  # of any number of digits
        raise ConfigError(f"{flag} does not fit in 64 bits; it must be {_bound(meta)}")
    is_low, is_high = low is not None and value < low, high is not None and value > high
    if is_low or is_high or value != value:  # NaN is neither
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
    words |= {list[float]: "a list of numbers", list[int]: "a list of whole numbers"}
    words |= {type(None): "null"}
    kind = typing.get_type_hints(section)[name]
    kinds = [kind] if typing.get_origin(kind) is Literal else typing.get_args(kind) or [kind]
    return " or ".join(
        "one of " + ", ".join(typing.get_args(part))
        if typing.get_origin(part) is Literal
        else words[part]
        for part in kinds
    )
