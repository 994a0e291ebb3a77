"""`lightship` with what XLA did in each batch written down: python -m tests.xla.traced TRACE ARGS.

A line of JSON a batch: how often XLA has compiled, moved data to and from the device, and left an
operation to the CPU (`aten::`), from the start of the process to the batch's end.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from lightship import cli

KILL_AT_STEP = "LIGHTSHIP_TEST_KILL_AT_STEP"
_METRICS = {
    "compiled": "CompileTime",
    "fetched": "TransferFromDeviceTime",
    "sent": "TransferToDeviceTime",
}


def counts() -> dict[str, int]:
    """XLA's own counts so far."""
    import torch_xla.debug.metrics as met

    found = {key: (met.metric_data(name) or [0])[0] for key, name in _METRICS.items()}
    aten = [name for name in met.counter_names() if name.startswith("aten::")]
    return found | {"fallbacks": sum(met.counter_value(name) for name in aten)}


def main() -> int:
    """Run lightship with the trace's callback, last of all but the saving."""
    trace, *arguments = sys.argv[1:]
    from lightning.pytorch import Callback

    from lightship.commands import fit
    from lightship.training import trainer as trainers

    class Trace(Callback):
        def _note(self, kind: str, step: int) -> None:
            with Path(trace).open("a") as file:
                file.write(json.dumps({"kind": kind, "step": step, **counts()}) + "\n")
            if kind == "train" and str(step) == os.environ.get(KILL_AT_STEP):
                os.kill(os.getpid(), 9)

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self._note("train", trainer.global_step)

        def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
            self._note("val", trainer.global_step)

        def on_test_batch_end(self, trainer: Any, *args: Any) -> None:
            self._note("test", trainer.global_step)

        def on_validation_end(self, trainer: Any, *args: Any) -> None:
            self._note("val end", trainer.global_step)

    build = trainers.build_trainer

    def with_trace(config: Any, callbacks: list[Any], *more: Any) -> Any:
        return build(config, [*callbacks, Trace()], *more)

    fit.build_trainer = trainers.build_trainer = with_trace
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
