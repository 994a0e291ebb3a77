"""What torch asks of an optimizer's `step`, for optimizers of our own."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class SteppingOptimizer(Optimizer):
    """An optimizer whose subclasses implement the update in `move`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. Does not synchronize with the device.

        Args:
            closure: Computes the gradients and returns the loss; None: the gradients are there.

        Returns:
            The closure's result.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.move()
        return loss

    @abstractmethod
    def move(self) -> None:
        """Update all parameters that have a gradient. Called without autograd."""
