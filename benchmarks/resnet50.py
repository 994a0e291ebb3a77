"""ResNet-50 at 224 px on synthetic images: the ordinary entry beside a bare loop over one batch."""

import csv
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

from benchmarks.table import machine, print_table, run_json, spread
from tests.support.images import little_set, put

RUNS = int(os.environ.get("RUNS", "1"))
CLASSES = 1000
SIZE_PX = int(os.environ.get("SIZE_PX", "224"))
ON_GPU = torch.cuda.is_available()
BATCH = int(os.environ.get("BATCH", "256" if ON_GPU else "8"))
WINDOW = int(os.environ.get("WINDOW", "20" if ON_GPU else "5"))
"""Steps between two looks at the clock, which wait for the device."""
WINDOWS = int(os.environ.get("WINDOWS", "12" if ON_GPU else "6"))
WARM_UP = 2
"""Windows in which kernels are chosen and compiled."""
PRECISION, COMPILE = ("bf16-mixed", "default") if ON_GPU else ("32-true", "none")


def main() -> None:
    """ResNet-50, 224 px, synthetic: lightship beside a bare loop (compiled, bf16 on a GPU)"""
    rates: dict[str, list[float]] = {"bare loop (limit)": [], "lightship fit": []}
    with tempfile.TemporaryDirectory() as folder:
        root = write_images(folder)
        for run in range(RUNS):
            for name, rate in zip(rates, (bare_rate, lightship_rate), strict=True):
                rates[name].append(rate(root, f"{folder}/run-{run}"))
                print(f"  run {run + 1}/{RUNS}  {name}: {rates[name][-1]:.1f}", file=sys.stderr)
    limits = rates["bare loop (limit)"]
    shares = {name: [a / b for a, b in zip(r, limits, strict=True)] for name, r in rates.items()}
    print(f"{machine()}; batch {BATCH}, {PRECISION}, compile {COMPILE}; n = {RUNS}\n")
    rows = [[name, spread(rate, 1), spread(shares[name], 3)] for name, rate in rates.items()]
    print_table(["arm", "images/s", "of the bare rate"], rows)


def write_images(folder: str, images: int = 10_000) -> str:
    """Class folders of `images` names for a hundred images of noise; the root."""
    root = Path(folder) / "images"
    names = [f"{number:04d}" for number in range(CLASSES)]
    size_px = (SIZE_PX, SIZE_PX)
    put(str(root), little_set(("train",), 1, names[:100], size_px, image_format="jpg"))
    for number in range(100, images):
        name = names[number % CLASSES]
        (root / "train" / name).mkdir(exist_ok=True)
        source = root / "train" / names[number % 100] / "000.jpg"
        os.link(source, root / "train" / name / f"{number}.jpg")
    return str(root)


def lightship_rate(root: str, output: str) -> float:
    """Images a second of a fit, between its log points after the first ones."""
    run_json("benchmarks.one_fit", output, *flags(root))
    return logged_rate(output)


def flags(root: str) -> list[str]:
    """The fit's."""
    return [
        "--config=imagenet-resnet50", f"--data.root={root}", f"--data.image_size_px={SIZE_PX}",
        # What the bare loop does not do: random cuts, mixing, averaging, evaluation.
        "--data.crop_min_area=0", "--data.mixup_alpha=0", "--data.cutmix_alpha=0",
        "--model.ema_decay=0", "--data.val_fraction=0", "--data.mode=resident",
        f"--data.global_batch_size={BATCH}", f"--trainer.max_steps={WINDOW * WINDOWS}",
        f"--trainer.log_every_n_steps={WINDOW}", f"--trainer.precision={PRECISION}",
        f"--model.compile={COMPILE}", "--trainer.devices=1", "--run.tracking=offline",
    ]  # fmt: skip


def logged_rate(output: str) -> float:
    """Images a second between the log points of a run, after the first ones."""
    with open(f"{output}/logs/metrics.csv") as table:
        rows = [row for row in csv.DictReader(table) if int(float(row["step"])) % WINDOW == 0]
    rates = [float(row["throughput/images_per_s"]) for row in rows[WARM_UP:]]
    assert len(rates) == WINDOWS - WARM_UP
    return len(rates) / sum(1 / rate for rate in rates)


def bare_rate(root: str, output: str) -> float:
    """Images a second of the loop as one would write it, over one batch that stays in memory."""
    rates: list[float] = run_json("benchmarks.resnet50", "bare")["rates"][WARM_UP:]
    return len(rates) / sum(1 / rate for rate in rates)


def bare() -> list[float]:
    """Images a second of each window."""
    device = torch.device("cuda" if ON_GPU else "cpu")
    torch.set_float32_matmul_precision("high")
    net = torchvision.models.resnet50(num_classes=CLASSES)
    net.to(device, memory_format=torch.channels_last)
    if COMPILE != "none":
        net.compile(mode=COMPILE)
    optimizer = torch.optim.SGD(
        net.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-5, fused=True
    )
    steps = WINDOW * WINDOWS
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    shape = (BATCH, 3, SIZE_PX, SIZE_PX)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (BATCH,), device=device)
    rates = []
    for _ in range(WINDOWS):
        began_s = time.perf_counter()
        for _ in range(WINDOW):
            with torch.autocast(device.type, torch.bfloat16, enabled=PRECISION == "bf16-mixed"):
                logits = net(pixels.float() / 128 - 1)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        loss.item()
        rates.append(WINDOW * BATCH / (time.perf_counter() - began_s))
    return rates


if __name__ == "__main__":
    assert sys.argv[1:] == ["bare"]
    print(json.dumps({"rates": bare()}))
