"""Training images read from S3 by lightship and its peers, beside the limit of decoding alone.

COUNT=5000 RUNS=1 EPOCHS=2 LATENCIES=0,20,80 ARMS="limit,webdataset" EPOCH_LIMIT_S=120 make bench
SPLIT_CORES=1 gives the server a half of the cores, and the arms, the limit too, the other.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import stream_images, stream_peers
from benchmarks.stream_measure import (
    EPOCH_LIMIT_S,
    EPOCHS,
    SPLIT_CORES,
    Arm,
    Result,
    cores,
    failure,
    measure,
)  # fmt: skip
from benchmarks.table import machine, print_table, spread
from tests.support.s3 import S3Server

COUNT = int(os.environ.get("COUNT", "5000"))
RUNS = int(os.environ.get("RUNS", "1"))
LATENCIES_MS = [int(text) for text in os.environ.get("LATENCIES", "0,20,80").split(",")]
CACHE = Path(tempfile.gettempdir()) / "lightship-stream-bench"
HEAD = [
    "arm", "added ms", "cold images/s", "second epoch images/s", "all epochs images/s",
    "first batch s", "batches 2-20 images/s", "of the limit's", "CPU s per 1,000",
    "server's CPU s per 1,000", "requests per image", "KB per image", "peak MiB",
    "share of the limit",
]  # fmt: skip
ARMS = {
    "limit": Arm("limit", "memory"),
    "limit: lightship's decoder": Arm("limit", "memory", "ours"),
    "webdataset": Arm("webdataset", "webdataset", "", "webdataset"),
    "litdata": Arm("litdata", "litdata", "chunks", "litdata"),
    "litdata mended": Arm("litdata", "litdata", "mended", "litdata"),
    "mosaicml-streaming": Arm("mosaicml", "mosaicml", "shipped", "mosaicml-streaming"),
    "mosaicml-streaming mended": Arm("mosaicml", "mosaicml", "mended", "mosaicml-streaming"),
    "folders: litdata raw": Arm("litdata", "folders", "raw", "litdata"),
    "folders: ImageFolder over s3fs batched": Arm("s3fs", "folders", "batches"),
    "folders: ImageFolder over s3fs": Arm("s3fs", "folders", "each"),
    "lightship packed": Arm("lightship", "lightship", "packed"),
    "lightship packed resumed": Arm("lightship", "lightship", "resumed"),
    "folders: lightship": Arm("lightship", "folders", "folders"),
}


def main() -> None:
    """images from S3 (SeaweedFS on this machine), packed or in class folders, and the limit"""
    names = [name.strip() for name in os.environ.get("ARMS", ",".join(ARMS)).split(",")]
    if unknown := set(names) - set(ARMS):
        print(f"no arm {', '.join(unknown)}; there are {', '.join(ARMS)}", file=sys.stderr)
        raise SystemExit(2)
    folder = stream_images.image_folder(CACHE, COUNT, stream_peers.photographs())
    results: dict[tuple[str, int], list[Result]] = {}
    os.sched_setaffinity(0, cores()[0])
    with S3Server(metrics=True) as s3:
        roots = {"memory": str(folder)}
        failed = {name: why for name in names if (why := _provide(ARMS[name], folder, s3, roots))}
        for run, delay_ms, name in itertools.product(range(RUNS), LATENCIES_MS, names):
            if name.startswith("limit") and delay_ms != LATENCIES_MS[0]:
                continue  # it reads no bucket
            arm = ARMS[name]
            result = failed.get(name) or measure(arm, roots[arm.reads], s3, delay_ms)
            results.setdefault((name, delay_ms), []).append(result)
            place = f"run {run + 1}/{RUNS}, {delay_ms} ms"
            print(f"  {place}  {name}: {json.dumps(result)}", file=sys.stderr, flush=True)
    _print_results(results, folder)


def _provide(arm: Arm, folder: Path, s3: S3Server, roots: dict[str, str]) -> Result | None:
    """See that the arm has an environment, and its data in the bucket; why not, if it has not."""
    try:
        python = stream_peers.python_of(arm.peer)
        if arm.reads not in roots:
            roots[arm.reads] = _put(arm, python, folder, s3, roots)
    except subprocess.CalledProcessError as error:
        return failure(error.stderr or str(error))
    return None


def _put(arm: Arm, python: str, folder: Path, s3: S3Server, roots: dict[str, str]) -> str:
    """The URL of a prefix with the arm's kind of data; formats are made once and kept."""
    url = s3.url(arm.reads)
    if arm.reads == "lightship":
        if "folders" not in roots:
            roots["folders"] = upload(folder, s3, s3.url("folders"))
        _pack(python, "stream_lightship", ["pack", roots["folders"], url], os.environ | s3.env)
        return url
    local = folder.with_name(arm.reads)
    done = folder.with_name(f"{arm.reads}-complete")
    if not done.exists():
        shutil.rmtree(local, ignore_errors=True)
        _pack(python, "stream_pack", [arm.reads, str(folder), str(local)], dict(os.environ))
        done.touch()
    return upload(local, s3, url)


def _pack(python: str, module: str, arguments: list[str], env: dict[str, str]) -> None:
    print(f"  {module} {' '.join(arguments)}", file=sys.stderr, flush=True)
    command = [python, "-m", f"benchmarks.{module}", *arguments]
    with tempfile.TemporaryDirectory() as home:
        subprocess.run(
            command, check=True, env=env | {"HOME": home}, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, timeout=1800,
        )  # fmt: skip


def upload(local: Path, s3: S3Server, url: str) -> str:
    """Put all files below the folder under the URL; returns the URL."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = s3.client()

    def put(path: Path) -> None:
        key = f"{prefix}/{path.relative_to(local).as_posix()}"
        client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(put, (path for path in sorted(local.rglob("*")) if path.is_file())))
    return url


def _print_results(results: dict[tuple[str, int], list[Result]], folder: Path) -> None:
    of_limit = [run for run in results.get(("limit", LATENCIES_MS[0]), []) if "images" in run]
    limit = statistics.median([_rate(run, 1) for run in of_limit]) if of_limit else None
    early = [_early_rate(run) for run in of_limit if "early_s" in run]
    early_limit = statistics.median(early) if early else None
    print(f"{machine()}; {_described(folder)}; n = {RUNS}; median (range)\n")
    rows = [_row(*key, runs, limit, early_limit) for key, runs in results.items()]
    print_table(HEAD, rows)
    print(f"\nBatches of 128 at 224 px (RandomResizedCrop, flip, uint8), {EPOCHS} epochs, a fresh")
    print("process with empty caches each; two workers or threads; the same decoder in all peers.")
    print("Cold, and all epochs together: start-up included. Requests and bytes: of all epochs, by")
    print("the server's count;")
    print("litdata and mosaicml-streaming keep on the local disk what the others read again.")
    if SPLIT_CORES:
        print("Half of the cores are the server's, the others the arm's (the limit's, too).")
    else:
        print("Server and arm share the cores.")
    print("Added latency: a proxy on the server's cores (0: no proxy).")
    for line in [*_notes(results), *_comparisons(results, limit)]:
        print(line)


def _described(folder: Path) -> str:
    sizes = [path.stat().st_size for path in folder.rglob("*.jpg")]
    kind = "real"
    if not folder.parent.name.startswith("real"):
        sources = folder.parent.name.split("-")[2]
        kind = f"made of {sources} photographs that packages ship"
    return f"{len(sizes):,} JPEGs ({kind}) of {statistics.mean(sizes) / 1000:.0f} KB"


def _rate(run: Result, epoch: int) -> float:
    return run[f"epoch{epoch}_images"] / run[f"epoch{epoch}_s"]


def _mean_rate(run: Result) -> float:
    """Of all epochs together: what was read ahead in one of them flatters the next alone."""
    epochs = range(1, EPOCHS + 1)
    images = sum(run[f"epoch{epoch}_images"] for epoch in epochs)
    return images / sum(run[f"epoch{epoch}_s"] for epoch in epochs)


def _early_rate(run: Result) -> float:
    """From the second batch to the twentieth: what reading ahead has reached by then."""
    return run["early_images"] / run["early_s"]


def _row(
    name: str, delay_ms: int, runs: list[Result], limit: float | None, early_limit: float | None
) -> list[str]:
    row = [name, "" if name.startswith("limit") else str(delay_ms)]
    good = [run for run in runs if "images" in run]
    if not good:
        what = "failed" if any("failed" in run for run in runs) else "not run"
        return [*row, what, *[""] * (len(HEAD) - 3)]
    cold = [_rate(run, 1) for run in good]
    row.append(spread(cold))
    row.append(spread([_rate(run, 2) for run in good]) if EPOCHS > 1 else "")
    row.append(spread([_mean_rate(run) for run in good]))
    row.append(spread([run["first_batch_s"] for run in good], 2))
    early = [_early_rate(run) for run in good if "early_s" in run]
    row.append(spread(early) if early else "")
    row.append(f"{statistics.median(early) / early_limit:.2f}" if early and early_limit else "")
    row.append(spread([1000 * run["cpu_s"] / run["images"] for run in good], 2))
    if name.startswith("limit"):
        row += ["", "", ""]
    else:
        row.append(spread([1000 * run["server_cpu_s"] / run["images"] for run in good], 2))
        row.append(spread([run["requests"] / run["images"] for run in good], 3))
        row.append(spread([run["sent_bytes"] / run["images"] / 1000 for run in good]))
    row.append(spread([run["peak_rss_mib"] for run in good]))
    row.append(f"{statistics.median(cold) / limit:.2f}" if limit else "")
    return row


def _notes(results: dict[tuple[str, int], list[Result]]) -> Iterator[str]:
    """What the numbers do not say: which runs failed and of what, which were cut short."""
    for (name, delay_ms), runs in results.items():
        reasons = Counter(
            f"{key.replace('_', ' ')}: {run[key]}"
            for run in runs
            for key in ("failed", "not_run")
            if key in run
        )
        for reason, times in reasons.items():
            yield f"{name}, {delay_ms} ms: {times} of {len(runs)} {reason}"
        if any("cut_short" in run for run in runs):
            yield f"{name}, {delay_ms} ms: epochs cut short after {EPOCH_LIMIT_S:.0f} s"


def _comparisons(
    results: dict[tuple[str, int], list[Result]], limit: float | None
) -> Iterator[str]:
    """For each latency the best peer, packed and from folders, and lightship beside it."""
    for delay_ms, kind in itertools.product(LATENCIES_MS, ("packed", "folders")):
        rates = {
            name: statistics.median([_rate(run, 1) for run in good])
            for (name, delay), runs in results.items()
            if delay == delay_ms and (name.startswith("folders") == (kind == "folders"))
            if not name.startswith("limit") and not name.endswith("resumed")
            if (good := [run for run in runs if "images" in run])
        }
        peers = {name: rate for name, rate in rates.items() if "lightship" not in name}
        if not peers:
            continue
        best = max(peers, key=peers.__getitem__)
        text = f"{kind}, {delay_ms} ms: cold, the best peer is {best}, {peers[best]:,.0f} images/s"
        for rate in (rate for name, rate in rates.items() if "lightship" in name):
            text += f"; lightship {rate:,.0f}: {rate / peers[best]:.2f} times that"
            text += f", {rate / limit:.2f} of the limit" if limit else ""
        yield text
