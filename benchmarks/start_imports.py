"""What a fit imports, beside `import lightning.pytorch` alone, and what its data worker does."""

import resource
import statistics
import subprocess
import sys
import time

from benchmarks.table import print_table, spread

LIGHTNING = "import lightning.pytorch"
FIT = """
from lightship.cli import main
from lightship.distributed import libraries
libraries.begin_imports()
libraries.preload()
import lightship.commands.dispatch
from lightship.training.callbacks import heartbeat
from lightship.commands.fit import fit
libraries.end_imports()
"""
"""As `cli.main` and `commands.dispatch` do it, up to the call of `fit`."""
WORKER = """
import resource, time
from lightship.data.streaming.worker_process import Worker
Worker.start("s3://bucket/images")
time.sleep(3)  # its imports take a tenth of that
Worker.stop()
spent = resource.getrusage(resource.RUSAGE_CHILDREN)
print(spent.ru_utime + spent.ru_stime)
"""
ARMS = {
    "nothing": "pass",
    "import lightning.pytorch": LIGHTNING,
    "what a fit imports": FIT,
}


def show(runs: int) -> None:
    """Measure the arms, interleaved, in fresh processes; print a table and the ratio."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ARMS}
    workers_s = []
    for _ in range(runs):
        workers_s.append(worker_cpu_s())
        for name, code in ARMS.items():
            spent[name].append(measured(code))
    rows = []
    for name, each in spent.items():
        wall_s, cpu_s = zip(*each, strict=True)
        rows.append([name, spread(list(wall_s), 2), spread(list(cpu_s), 2)])
    print_table(["process", "wall s", "CPU s"], rows)
    fit, lightning = (
        [statistics.median(column) for column in zip(*spent[name], strict=True)]
        for name in ("what a fit imports", "import lightning.pytorch")
    )
    ratios = (ours / theirs for ours, theirs in zip(fit, lightning, strict=True))
    print("\nA fit's over Lightning's: wall {:.2f}, CPU {:.2f}".format(*ratios))
    print(f"A data worker, until it can take a task (S3): {spread(workers_s, 2)} CPU s\n")


def worker_cpu_s() -> float:
    """CPU seconds of a data worker that is started and gets nothing to do."""
    done = subprocess.run([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, check=True)
    return float(done.stdout)


def measured(code: str) -> tuple[float, float]:
    """(wall, CPU) seconds of a fresh process that runs `code`."""
    before, began_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    code += "\nimport os; os._exit(0)"  # as a fit ends: modules are not taken down
    subprocess.run([sys.executable, "-c", code], check=True)
    wall_s, after = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
