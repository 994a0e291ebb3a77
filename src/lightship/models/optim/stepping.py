"""What torch asks of an optimizer's `step`, for optimizers of our own."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class SteppingOptimizer(Optimizer):
    """An optimizer whose rule is `move`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters that have a gradient; never waits for the device.

        Args:
            closure: Makes the gradients anew and returns the loss; None: they are there.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.move()
        return loss

    @abstractmethod
    def move(self) -> None:
        """Move all parameters that have a gradient; called without autograd."""
