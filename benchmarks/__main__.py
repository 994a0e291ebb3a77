"""`make bench`: every table, each measured with its peers interleaved in one run.

make bench                         # all tables
make bench TABLES="tutorial"       # some
CIFAR10=FOLDER make bench          # real CIFAR-10 as class folders, for the tables that need it
AIRBENCH_DIR=FOLDER make bench     # a checkout of KellerJordan/cifar10-airbench, for `speed`
IMAGENET=FOLDER make bench         # real ImageNet as class folders, for the table `stream`
TRASHNET=FOLDER WEIGHTS=FILE make bench   # see `finetune`
"""

import sys

from benchmarks import (
    checkpoint_stall,
    finetune,
    limits,
    resnet50,
    s3_clients,
    scale,
    scaling,
    speed,
    start,
    step_overhead,
    stream,
    tutorial,
)

TABLES = {
    "checkpoint_stall": checkpoint_stall.main,
    "tutorial": tutorial.main,
    "limits": limits.main,
    "scale": scale.main,
    "scaling": scaling.main,
    "start": start.main,
    "stream": stream.main,
    "speed": speed.main,
    "resnet50": resnet50.main,
    "step_overhead": step_overhead.main,
    "s3_clients": s3_clients.main,
    "finetune": finetune.main,
}


def main(names: list[str]) -> int:
    for name in names or TABLES:
        if name not in TABLES:
            print(f"no table '{name}'; there are {', '.join(TABLES)}", file=sys.stderr)
            return 2
        print(f"\n== {name}: {TABLES[name].__doc__}\n", flush=True)
        TABLES[name]()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
