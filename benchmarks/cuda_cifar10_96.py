"""Part `cifar10_96`: the recipe cifar10-96, whose figures were never measured on a GPU."""

from collections.abc import Iterator
from typing import Any

from benchmarks import cuda_data, one_fit
from benchmarks.cuda_part import Job
from benchmarks.table import run_json


def rows(job: Job) -> Iterator[dict[str, Any]]:
    """As many seeds as there is time for; the first as a command of its own."""
    root = cuda_data.cifar10(job.data, job.folder, job.is_toy)
    if root is None:
        yield {"arm": "", "note": f"not run: no {cuda_data.CIFAR10} (make cuda-data)"}
        return
    taken_s, seed = 0.0, 0
    while seed == 0 or (job.left_s > 1.3 * taken_s and not job.is_toy):
        before_s = job.left_s
        yield run(job, root, seed)
        taken_s, seed = before_s - job.left_s, seed + 1


def run(job: Job, root: str, seed: int) -> dict[str, Any]:
    """One fit."""
    flags = ["--config=cifar10-96", f"--data.root={root}", f"--run.seed={seed}"]
    flags += ["--run.tracking=none", *job.accelerator]
    if job.is_toy:
        flags += ["--data.global_batch_size=4", "--trainer.max_steps=4"]
    output = f"{job.folder}/96-{seed}"
    found = (
        one_fit.measure(output, flags)
        if job.is_toy
        else run_json("benchmarks.one_fit", output, *flags)
    )
    train_s = found["init_s"] + found["step_s"] * found["steps"]
    row = {"arm": f"lightship fit --config cifar10-96, seed {seed}", "training_s": [train_s]}
    row |= {"accuracy": [found["test/acc"]]}
    return row | ({} if job.is_toy else {"command_s": [found["process_s"]]})
