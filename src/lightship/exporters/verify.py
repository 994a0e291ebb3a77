"""The check of an exported file against the checkpoint's outputs."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightship.errors import ConfigError
from lightship.exporters.formats import Evaluation, Format, first_line
from lightship.models.classifier import ImageClassifier

LARGEST_DIFFERENCE = 1e-4
_COMPARED_AT_ONCE = 32


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
            f"the exported file does not load or run ({first_line(error)}): nothing is written"
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
