"""Part `resnet50`: 224 px, synthetic, compiled, bf16: the ordinary entry beside a bare loop."""

from collections.abc import Iterator
from typing import Any

from benchmarks import one_fit, resnet50
from benchmarks.cuda_part import LIMIT, Job


def rows(job: Job) -> Iterator[dict[str, Any]]:
    """The bare loop first: its compilation is in the cache when lightship's net is compiled."""
    windows = resnet50.bare()[resnet50.WARM_UP :]
    how = f"batch {resnet50.BATCH}, {resnet50.PRECISION}, compile {resnet50.COMPILE}"
    rate = len(windows) / sum(1 / each for each in windows)
    yield {"arm": "bare loop, one batch (limit)", "images_per_s": [rate], LIMIT: True, "note": how}
    root = resnet50.write_images(job.folder, 100 if job.is_toy else 10_000)
    output = f"{job.folder}/resnet50"
    run = one_fit.measure(output, [*resnet50.flags(root), *job.accelerator])
    rate = resnet50.logged_rate(output)
    yield {"arm": "lightship fit, resident", "images_per_s": [rate], "training_s": [run["fit_s"]],
           "note": f"{how}; training s with compilation"}  # fmt: skip
