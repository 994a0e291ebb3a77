"""The peer: airbench94_muon.py from a checkout, on the given images; prints accuracy and seconds.

Where there is a CUDA device the file runs unmodified, all its 200 runs. Without one its text is
moved to the CPU as it is read: float32 for half, its epochs as asked, not compiled.
"""

import contextlib
import json
import os
import runpy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lightship.data.sample_decoder import decode_all
from lightship.data.sources import layouts

_SCRIPT = "airbench94_muon.py"
_WHITENING_SHARE = 3 / 8


class Stopwatch:
    """Stands for a CUDA event where there is none."""

    def record(self) -> None:
        self.at_s = time.perf_counter()

    def elapsed_time(self, other: "Stopwatch") -> float:
        return 1000 * (other.at_s - self.at_s)


def write_images(root: str, folder: str) -> None:
    """The files that the script looks for before it would download."""
    os.makedirs(f"{folder}/cifar10")
    for split, manifest in layouts.scan(root).items():
        images, _ = decode_all(manifest, threads=len(os.sched_getaffinity(0)))
        rows = {
            "images": torch.from_numpy(images),
            "labels": torch.from_numpy(manifest.label.astype("int64")),
            "classes": manifest.class_names,
        }
        torch.save(rows, f"{folder}/cifar10/{split}.pt")


def on_cpu(text: str, epochs: float) -> str:
    """The script's text, moved."""
    for theirs, ours in (
        ('torch.device("cuda")', 'torch.device("cpu")'),
        (".half()", ".float()"),
        ("ceil(8 * len(train_loader))", f"ceil({epochs} * len(train_loader))"),
        (
            "ceil(3 * len(train_loader))",
            f"ceil({epochs * _WHITENING_SHARE} * len(train_loader))",
        ),
        ("torch.cuda.Event(enable_timing=True)", "Stopwatch()"),
        ("torch.cuda.synchronize()", "pass"),
    ):
        assert theirs in text, f"{_SCRIPT} is not the one this was written for: no {theirs}"
        text = text.replace(theirs, ours)
    return text


def run_on_cpu(path: str, seed: int, epochs: float) -> dict[str, Any]:
    text = on_cpu(Path(path).read_text(), epochs)
    names: dict[str, Any] = {"__name__": "airbench", "Stopwatch": Stopwatch}
    exec(compile(text, path, "exec"), names)
    seen: list[dict[str, Any]] = []
    names["print_training_details"] = lambda variables, is_final_entry: seen.append(dict(variables))
    torch.manual_seed(seed)
    net = names["CifarNet"]().to(memory_format=torch.channels_last)
    with torch.compiler.set_stance("force_eager"):
        accuracy = names["main"](seed, net)
    trained = seen[-2]  # the last is after the test with its six views
    images = trained["step"] * trained["batch_size"]
    return {"test/acc": accuracy, "train_s": trained["time_seconds"], "images": images}


def run_on_cuda(path: str) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as said:
        with contextlib.redirect_stdout(said):
            runpy.run_path(path, run_name="__main__")
        said.seek(0)
        return outcome(said.read())


def outcome(text: str) -> dict[str, Any]:
    """What the unmodified script printed: of all its runs, or of those that it had time for."""
    rows = [row.split("|") for row in text.splitlines() if "eval" in row][1:]  # after the warm-up
    accuracies, seconds = ([float(row[at]) for row in rows] for at in (-3, -2))
    deviation = statistics.stdev(accuracies) if len(rows) > 1 else 0.0
    mean = statistics.fmean(accuracies) if rows else float("nan")
    return {"test/acc": mean, "std": deviation, "seconds": seconds, "accuracies": accuracies}


def main(airbench_dir: str, root: str, seed: int, epochs: float) -> None:
    path = os.path.abspath(f"{airbench_dir}/{_SCRIPT}")
    with tempfile.TemporaryDirectory() as folder:
        write_images(os.path.abspath(root), folder)
        os.chdir(folder)
        sys.argv[0] = path  # which the script reads
        on_gpu = torch.cuda.is_available()
        result = run_on_cuda(path) if on_gpu else run_on_cpu(path, seed, epochs)
        os.chdir("/")
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
