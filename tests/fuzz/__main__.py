"""`make fuzz`: mutated files through every reader, for MINUTES or FILES of each kind.

python -m tests.fuzz --minutes 10 --seed 1 [--files N] [KIND...]
python -m tests.fuzz --seed 1 --show KIND NUMBER      # write one file to standard output

Files with a finding are kept in build/fuzz/findings. Exits 1 if there is one.
"""

import argparse
import sys
import time
from pathlib import Path

from tests.fuzz.runner import Outcome, file_of, fuzz, seeds_of
from tests.fuzz.targets import TARGETS

_AT_ONCE = 250


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--files", type=int, help="of each kind, instead of minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", nargs=2, metavar=("KIND", "NUMBER"))
    parser.add_argument("kinds", nargs="*", help=", ".join(target.name for target in TARGETS))
    args = parser.parse_args()
    targets = {target.name: target for target in TARGETS}
    if args.show:
        target = targets[args.show[0]]
        data = file_of(target, seeds_of(target), args.seed, int(args.show[1]))
        sys.stdout.buffer.write(data)
        return 0
    chosen = [targets[name] for name in args.kinds or targets]
    outcomes = {target.name: Outcome() for target in chosen}
    end_s, first = time.monotonic() + 60 * args.minutes, 0
    folder = Path("build/fuzz")
    while first < args.files if args.files else time.monotonic() < end_s:
        stop = min(first + _AT_ONCE, args.files or first + _AT_ONCE)
        for target in chosen:
            found = fuzz(target, range(first, stop), args.seed, folder)
            outcomes[target.name].add(found)
            for text in found.findings:
                print(f"{text}\n", flush=True)
        first = stop
    print(_table(outcomes))
    return int(any(outcome.findings for outcome in outcomes.values()))


def _table(outcomes: dict[str, Outcome]) -> str:
    lines = ["| file | read | refused | findings | peak memory, MiB | longest, CPU s |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    total = Outcome()
    for name, outcome in [*outcomes.items(), ("all", total)]:
        lines.append(
            f"| {name} | {outcome.returned} | {outcome.refused} | {len(outcome.findings)} | "
            f"{outcome.peak_mib:.0f} | {outcome.peak_cpu_s:.2f} |"
        )
        total.add(outcome)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
