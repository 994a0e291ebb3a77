"""`lightship export`: a checkpoint as one file that runs without lightship, checked against it.

The file takes images as they are, uint8 RGB, and holds all that evaluation does with them: the
normalisation, the net, and the mean over the views of model.test_flip and test_shift.
docs/export.md says how to load it, and how images get to the size that it takes.
"""

import importlib.util
import json
import logging
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightship import __version__, storage
from lightship.commands.base import Command
from lightship.commands.loading import build_model, load_checkpoint
from lightship.config import EXPORTS, Config, DataConfig
from lightship.data.images.decode import PixelLimit
from lightship.data.sample_decoder import decode_all
from lightship.data.splits import load_splits
from lightship.distributed import comm
from lightship.errors import ConfigError, DataError, LightshipError
from lightship.models.classifier import ImageClassifier
from lightship.training.callbacks.progress import Progress
from lightship.training.trainer import start_progress

logger = logging.getLogger(__name__)
INPUT, OUTPUTS = "images", ("probabilities", "log_probabilities")
LARGEST_DIFFERENCE = 1e-4
_COMPARED_IMAGES, _COMPARED_AT_ONCE = 64, 32
_OPSET = 18
_LARGEST_ONNX_BYTES = 2**31 - 2**24
"""Protobuf's bound, less room for the graph itself."""

Run = Callable[[Tensor], list[np.ndarray]]
"""From [N, 3, S, S] uint8 to the OUTPUTS, each [N, C] float32."""


def export(command: Command) -> None:
    """Write a checkpoint as `command.format` asks, if the file gives the checkpoint's outputs.

    Called in one process; blocks.

    Raises:
        ConfigError: A package is missing, the net cannot be exported, or the file differs.
    """
    config = command.config
    form = FORMATS[command.format]
    url = command.export or storage.join(str(config.run.output), "export", EXPORTS[form.name])
    form.check_asked(url)
    progress = start_progress(config)
    torch.set_float32_matmul_precision("highest")  # which it has just lowered: fp32 is compared
    checkpoint = load_checkpoint(command)
    model = build_model(checkpoint).eval()
    form.check_fits(model)
    what = f"{model.hparams['net']} of step {checkpoint['global_step']}"
    logger.info(f"exporting {what} as {form.name}")
    images, called = _images(config, model, progress)
    with tempfile.TemporaryDirectory(prefix="lightship-") as folder:
        path = Path(folder) / EXPORTS[form.name]
        form.write(model, facts_of(model, checkpoint), path)
        difference = check(form, path, model, images)
        size_bytes = path.stat().st_size
        storage.write_file(url, path)
    shown = storage.redact(url)
    logger.info(
        f"exported {what}, {len(model.class_names)} classes, {size_bytes / 1e6:.1f} MB: {shown}; "
        f"within {difference:.1g} of the checkpoint's outputs on {called}; to load it: "
        f"{form.loading.format(storage.base_name(url))}"
    )


class Evaluation(nn.Module):
    """What is exported: a classifier's evaluation, from pixels to probabilities.

    Args:
        model: In evaluation mode.
    """

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classify.

        Args:
            images: [N, 3, S, S] uint8 RGB.

        Returns:
            The OUTPUTS, each [N, C] float32.
        """
        scores = self.model.log_probabilities(images)
        return scores.exp(), scores


def facts_of(model: ImageClassifier, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the file says of itself."""
    return {
        "class_names": model.class_names,
        "image_size_px": model.hparams["image_size_px"],
        "net": model.hparams["net"],
        "checkpoint_step": checkpoint["global_step"],
        "lightship_version": __version__,
        "torch_version": torch.__version__,
    }


class Format(ABC):
    """One kind of file.

    Attributes:
        name: As --format takes it.
        packages: What it needs beyond lightship's own dependencies.
        loading: How a user loads it, with a place for the file's name.
    """

    name: str
    packages: tuple[str, ...] = ()
    loading: str

    def check_asked(self, url: str) -> None:
        """Raise ConfigError for a missing package, or for a name that says another format."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"--format {self.name} needs the package {package}: pip install lightship[onnx]"
                )
        for name, file in EXPORTS.items():
            if name != self.name and url.endswith(Path(file).suffix):
                raise ConfigError(
                    f"--export {storage.redact(url)} is a name for --format {name}, and --format "
                    f"is {self.name}"
                )

    def check_fits(self, model: ImageClassifier) -> None:
        """Raise ConfigError if the format cannot hold the weights; here: it can."""
        return

    @abstractmethod
    def write(self, model: ImageClassifier, facts: dict[str, Any], path: Path) -> None:
        """Write the file. Raises ConfigError if the net cannot be traced."""

    @abstractmethod
    def load(self, path: Path) -> Run:
        """Load the file as a user would."""


class TorchProgram(Format):
    """A torch.export program (.pt2)."""

    name, loading = "torch", 'torch.export.load("{}").module()'

    def write(self, model: ImageClassifier, facts: dict[str, Any], path: Path) -> None:
        """See Format."""
        extra_files = {"lightship.json": json.dumps(facts)}
        with warnings.catch_warnings():
            # Said of filters in channels_last order, which are saved whole.
            warnings.filterwarnings("ignore", message="No complete tensor found")
            torch.export.save(trace(model), path, extra_files=extra_files)

    def load(self, path: Path) -> Run:
        """See Format."""
        program = torch.export.load(path).module()

        def run(images: Tensor) -> list[np.ndarray]:
            with torch.no_grad():
                return [output.numpy() for output in program(images)]

        return run


class Onnx(Format):
    """An ONNX model in one file."""

    name, loading = "onnx", 'onnxruntime.InferenceSession("{}")'
    packages = ("onnx", "onnxscript", "onnxruntime")

    def check_fits(self, model: ImageClassifier) -> None:
        """See Format."""
        tensors = [*model.net.parameters(), *model.net.buffers()]
        size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size_bytes > _LARGEST_ONNX_BYTES:
            raise ConfigError(
                f"--format onnx: the weights are {size_bytes / 2**30:.1f} GiB, and one ONNX file "
                "holds 2 GiB at most; --format torch has no such bound"
            )

    def write(self, model: ImageClassifier, facts: dict[str, Any], path: Path) -> None:
        """See Format."""
        # onnxscript writes log(exp(a) + exp(b)), which is -inf where both underflow.
        program = trace(model).run_decompositions({torch.ops.aten.logaddexp.default: logaddexp})
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=_OPSET,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes={INPUT: {0: "batch"}},
                verbose=False,
            )
        except RuntimeError as error:
            raise _untraceable(model, error) from error
        assert exported is not None
        proto = exported.model_proto
        for key, value in facts.items():
            text = value if isinstance(value, str) else json.dumps(value)
            proto.metadata_props.add(key=key, value=text)
        path.write_bytes(proto.SerializeToString())

    def load(self, path: Path) -> Run:
        """See Format."""
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda images: session.run(list(OUTPUTS), {INPUT: images.numpy()})


FORMATS: dict[str, Format] = {form.name: form for form in (TorchProgram(), Onnx())}


def trace(model: ImageClassifier) -> torch.export.ExportedProgram:
    """A classifier's `Evaluation` as a program for any number of images.

    Raises:
        ConfigError: The net does what cannot be traced, or is made for one number of images.
    """
    size_px = model.hparams["image_size_px"]
    example = torch.zeros((2, 3, size_px, size_px), dtype=torch.uint8)
    shapes = {INPUT: {0: torch.export.Dim("batch", min=1)}}
    try:
        with torch.no_grad():
            program = torch.export.export(Evaluation(model), (example,), dynamic_shapes=shapes)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise _untraceable(model, error) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which are nobody's business
    return program


def logaddexp(one: Tensor, other: Tensor) -> Tensor:
    """log(exp(one) + exp(other)) for any finite values."""
    return torch.maximum(one, other) + torch.log(1 + torch.exp(-(one - other).abs()))


def check(form: Format, path: Path, model: ImageClassifier, images: Tensor) -> float:
    """Load a file and compare its outputs with the checkpoint's.

    Args:
        form: Of the file.
        path: Of the file.
        model: In evaluation mode.
        images: [K, 3, S, S] uint8, K at least 2.

    Returns:
        The largest difference: of log-probabilities below -1 relative to their size, as float32
        has no more digits for them; else absolute.

    Raises:
        ConfigError: It is more than LARGEST_DIFFERENCE, or the file does not load.
    """
    batches = (images[:1], *images.split(_COMPARED_AT_ONCE))  # one by itself, and several
    try:
        run = form.load(path)
        found = [output for batch in batches for output in run(batch)]
    except Exception as error:  # the errors of onnxruntime and of zip files have no base in common
        raise ConfigError(
            f"the exported file does not load or run ({_first_line(error)}): nothing is written"
        ) from error
    with torch.no_grad():
        expected = [output.numpy() for batch in batches for output in Evaluation(model)(batch)]
    if not all(np.isfinite(output).all() for output in expected[::2]):
        raise ConfigError(
            "the checkpoint's outputs are not finite: it is of a training that diverged; choose "
            "another with --ckpt_path"
        )
    worst = 0.0
    for theirs, ours in zip(found, expected, strict=True):
        difference = np.abs(theirs - ours) / np.maximum(1, np.abs(ours))
        worst = float(np.maximum(worst, difference.max()))  # which keeps a NaN
    if not worst <= LARGEST_DIFFERENCE:
        raise ConfigError(
            f"the exported file's outputs differ from the checkpoint's by {worst:.1e}, more than "
            f"{LARGEST_DIFFERENCE:g}: nothing is written. A net that draws random numbers in "
            "evaluation does this; else try another --format"
        )
    return worst


def _images(config: Config, model: ImageClassifier, progress: Progress) -> tuple[Tensor, str]:
    """Images to compare on, [K, 3, S, S] uint8, and what they are: the run's, else random ones."""
    if config.run.output is not None or config.data.root != DataConfig.root:
        try:
            return _real_images(config, model)
        except LightshipError as error:
            logger.warning(f"comparing on random images; the run's cannot be read: {error}")
    size_px = model.hparams["image_size_px"]
    shape = (_COMPARED_IMAGES, 3, size_px, size_px)
    generator = torch.Generator().manual_seed(config.run.seed)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return images, f"{len(images)} random images (seed {config.run.seed})"


def _real_images(config: Config, model: ImageClassifier) -> tuple[Tensor, str]:
    output = config.run.output
    cache_url = storage.join(output, "data") if output else None
    splits = load_splits(config.data, cache_url, need="train")
    shown = storage.redact(config.data.root)
    split = next(name for name in ("test", "val", "train") if name in splits)
    manifest = splits[split]
    ids = np.unique(np.linspace(0, len(manifest) - 1, _COMPARED_IMAGES).astype(np.int64))
    images, bad = decode_all(
        manifest,
        ids,
        image_size_px=model.hparams["image_size_px"],
        threads=comm.cores(),
        limit=PixelLimit(config.data.max_image_pixels),
        max_bad_fraction=1.0,
    )
    good = torch.from_numpy(images[~np.isin(ids, list(bad.reasons))]).permute(0, 3, 1, 2)
    if len(good) < 2:
        raise DataError(f"only one image of {split} at --data.root {shown}")
    return good, f"{len(good)} images of {split} at {shown}"


def _untraceable(model: ImageClassifier, error: Exception) -> ConfigError:
    return ConfigError(
        f"--model.net {model.hparams['net']} cannot be exported for any number of images: "
        f"{_first_line(error)}"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
