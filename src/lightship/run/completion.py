"""Whether a finished run is complete under the settings of a new start."""

import json
from dataclasses import dataclass

from lightship import storage
from lightship.config import TrainerConfig

_RESULTS = ("test/acc", "val/acc")
_MAX_BYTES = 2**20


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
        step: Optimizer steps done.
        epoch: Epochs done.
        settings: With which it finished.
        has_score: Whether its last checkpoint has one: its validation loss was finite.
        best_url: URL of its best checkpoint; None: no checkpoint has a score.
    """

    step: int
    epoch: int
    settings: TrainerConfig
    has_score: bool
    best_url: str | None

    @property
    def has_diverged(self) -> bool:
        """Whether early stopping ended it where the loss was not finite."""
        patience = self.settings.early_stopping_patience
        return bool(patience) and not self.has_score and not self._reaches(self.settings)

    def trains_on(self, settings: TrainerConfig) -> bool:
        """Whether these settings train it further."""
        if self._reaches(settings):
            return False
        if self._reaches(self.settings):
            return True
        if self.has_diverged and self.settings.monitor == "val/loss":
            return False  # no patience continues it
        before, patience = self.settings.early_stopping_patience, settings.early_stopping_patience
        return bool(before) and (patience > before or not patience)

    def why_complete(self, settings: TrainerConfig) -> list[str]:
        """Why these settings do not train it further, where that may be unexpected."""
        if self._reaches(settings):
            return [
                f"--trainer.{name} {bound} is below the {done} {name.removeprefix('max_')} done"
                for name, bound, done in self._bounds(settings)
                if 0 <= bound < done
            ]
        if self.has_diverged:
            return [self._remedy()]
        if self._bounds(settings) == self._bounds(self.settings):
            return []
        return [
            f"early stopping ended this run at epoch {self.epoch}; to train on to "
            f"{shown_bounds(settings)}, raise --trainer.early_stopping_patience "
            f"(was {self.settings.early_stopping_patience})"
        ]

    def _remedy(self) -> str:
        """What a user does about a run that has diverged."""
        start = ""
        if self.best_url is not None:
            start = f" It can start from the best checkpoint: --model.weights {self.best_url}"
        return (
            f"training diverged: early stopping ended this run at epoch {self.epoch}, where "
            "val/loss was not finite. Train again with a lower --optim.lr or with "
            f"--trainer.gradient_clip_val, in another --run.output.{start}"
        )

    def _reaches(self, settings: TrainerConfig) -> bool:
        return any(bound != -1 and done >= bound for _, bound, done in self._bounds(settings))

    def _bounds(self, settings: TrainerConfig) -> list[tuple[str, int, int]]:
        """(flag, bound, done) of epochs and steps."""
        return [
            ("max_epochs", settings.max_epochs, self.epoch),
            ("max_steps", settings.max_steps, self.step),
        ]


def shown_bounds(settings: TrainerConfig) -> str:
    """The flags that bound training, as a user writes them."""
    flags = {"max_epochs": settings.max_epochs, "max_steps": settings.max_steps}
    return ", ".join(f"--trainer.{name} {bound}" for name, bound in flags.items() if bound != -1)


def read_results(done_url: str) -> dict[str, float] | None:
    """The accuracies in DONE; None if it is damaged. Blocks."""
    data = storage.read_small(done_url, _MAX_BYTES)
    try:
        found = json.loads(data)
        results = {key: found[key] for key in _RESULTS if found.get(key) is not None}
    except (ValueError, RecursionError, AttributeError):
        return None
    # Not a number of 4,000 digits, nor NaN: both are JSON for Python.
    is_right = all(type(v) in (int, float) and 0 <= v <= 1 for v in results.values())
    return results if is_right else None
