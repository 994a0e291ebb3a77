"""One `lightship fit` in this process; prints its numbers and the seconds of training alone."""

import json
import sys
import time

from lightning.pytorch import Trainer

from lightship import cli, storage


def main(output: str, flags: list[str]) -> None:
    spent_s: list[float] = []
    fit = Trainer.fit

    def timed(*args, **kwargs):
        began_s = time.perf_counter()
        fit(*args, **kwargs)
        spent_s.append(time.perf_counter() - began_s)

    Trainer.fit = timed  # type: ignore[method-assign]
    code = cli.main(["fit", "--run.output", output, *flags])
    assert code == 0, f"lightship fit ended with {code}"
    numbers = json.loads(storage.read_bytes(storage.join(output, "DONE")))
    rows = storage.read_bytes(storage.join(output, "logs", "metrics.csv")).decode().splitlines()
    step = int(float(rows[-1].split(",")[0]))
    print(json.dumps({**numbers, "fit_s": spent_s[0], "steps": step}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
