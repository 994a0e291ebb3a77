"""The formats of `lightship export`: a torch.export program and an ONNX model.

The file takes images as they are, uint8 RGB, and includes all steps of evaluation: normalization,
the net, and the mean over the views of model.test_flip and test_shift.
"""

import importlib.util
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightship import __version__, storage
from lightship.config import EXPORTS
from lightship.errors import ConfigError
from lightship.extras import INSTALL
from lightship.models.classifier import ImageClassifier

INPUT, OUTPUTS = "images", ("probabilities", "log_probabilities")
_OPSET = 18
_LARGEST_ONNX_BYTES = 2**31 - 2**24
"""Protobuf's bound, less room for the graph itself."""

Run = Callable[[Tensor], list[np.ndarray]]
"""From [N, 3, S, S] uint8 to the OUTPUTS, each [N, C] float32."""


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
    size_px = model.hparams["image_size_px"]
    return {
        "class_names": model.class_names,
        "image_size_px": size_px,
        "short_side_px": model.resize.short_side_px(size_px),
        "interpolation": model.resize.interpolation,
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
                    f"--format {self.name} needs the package {package}: {INSTALL[self.name]}"
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


def _untraceable(model: ImageClassifier, error: Exception) -> ConfigError:
    return ConfigError(
        f"--model.net {model.hparams['net']} cannot be exported for any number of images: "
        f"{first_line(error)}"
    )


def first_line(error: Exception) -> str:
    """The first line of an error's text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
