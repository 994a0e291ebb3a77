"""What to change where memory does not suffice, and the error of a command that ran out of it."""

import re
import traceback

from lightship.config import Config
from lightship.errors import ConfigError, in_one_line

_WORDS = re.compile(r"out of memory|can't allocate memory|unable to allocate|ALLOC_FAILED", re.I)
"""Of torch's and NumPy's allocators, the CUDA driver, cuBLAS and cuDNN."""
_SIZES = re.compile(
    r"tried to allocate [\d.]+ \w+|unable to allocate [\d.]+ \w+"
    r"|GPU \d+ has a total capacity of [\d.]+ \w+ of which [\d.]+ \w+ is free",
    re.I,
)
_IN_EVALUATION = {"validation_step", "test_step", "predict_step"}
_IN_DATA = {"prepare", "_split_on_device"}


def smaller_training_batch(config: Config) -> str:
    """The flags that shrink what a training step holds."""
    parts = config.trainer.accumulate_grad_batches
    return (
        f"--trainer.accumulate_grad_batches {2 * parts} or more, or a smaller "
        "--data.global_batch_size"
    )


def smaller_evaluation_batch(config: Config) -> str:
    """The flag that shrinks what an evaluation step holds."""
    eval_batch_size = max(1, config.data.eval_batch_size // 4)
    return f"--data.eval_batch_size {eval_batch_size} (results do not change)"


def as_config_error(error: BaseException, config: Config) -> ConfigError | None:
    """What a user reads of an exception, if that means that memory ran out; else None.

    Args:
        error: As raised, with its traceback: where it comes from decides what to change.
        config: Of the command.
    """
    text = str(error)
    if not (isinstance(error, MemoryError) or _WORDS.search(text)):
        return None
    called = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    if called & _IN_EVALUATION:
        where, fix = "in evaluation", smaller_evaluation_batch(config)
    elif "training_step" in called or "backward" in called:
        where, fix = "in a training step", smaller_training_batch(config)
    elif called & _IN_DATA:
        where, fix = "for the decoded images", "--data.mode streaming"
    else:
        where, fix = "", f"{smaller_training_batch(config)}; {smaller_evaluation_batch(config)}"
    sizes = "; ".join(match[0] for match in _SIZES.finditer(text)) or in_one_line(error)
    return ConfigError(f"out of memory {where}".rstrip() + f" ({sizes}): set {fix}")
