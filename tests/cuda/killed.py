"""`python -m tests.cuda.killed STEP fit ...`: a fit that kills itself before that step; 0: not."""

import os
import signal
import sys

from lightning.pytorch import Callback

from lightship import cli
from lightship.commands import fit


class Killer(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.step and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    step, *arguments = sys.argv[1:]
    build, killer = fit.build_trainer, Killer(int(step))
    fit.build_trainer = lambda config, callbacks, *more: build(config, [killer, *callbacks], *more)
    raise SystemExit(cli.main(arguments))
