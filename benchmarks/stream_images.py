"""The images of the stream table: photographs of ImageNet's size, made of those that packages ship.

Each is a random part of one photograph: scaled, mirrored, its colours changed, with a little noise,
saved at the quality that brings it near a size drawn for it. The same call makes the same bytes.
"""

import hashlib
import io
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 100
SIZES_PX = ((500, 375), (500, 375), (500, 375), (375, 500), (500, 333), (500, 400), (480, 360))
MEAN_BYTES, DEVIATION_BYTES, LEAST_BYTES, MOST_BYTES = 118_000, 28_000, 50_000, 200_000
QUALITIES = range(70, 97)
_PHOTOGRAPHS = {  # package -> its colour photographs
    "sklearn": "datasets/images/china.jpg datasets/images/flower.jpg",
    "skimage": "data/astronaut.png data/chelsea.png data/coffee.png data/motorcycle_left.png "
    "data/motorcycle_right.png data/rocket.jpg",
}


def photographs(more: Path | None = None) -> list[Image.Image]:
    """The photographs of the packages installed here, or in the folder `more`; at least one."""
    found = []
    for package, names in _PHOTOGRAPHS.items():
        spec = find_spec(package)
        roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
        roots += [more / package] if more else []
        for name in names.split():
            path = next((root / name for root in roots if (root / name).exists()), None)
            if path:
                found.append(Image.open(path).convert("RGB"))
    assert found, f"none of {', '.join(_PHOTOGRAPHS)} is installed"
    return found


def make_image(sources: list[Image.Image], index: int) -> bytes:
    """JPEG number `index`."""
    rng = np.random.default_rng([2026, index])
    source = sources[rng.integers(len(sources))]
    width, height = SIZES_PX[rng.integers(len(SIZES_PX))]
    fits = min(source.width / width, source.height / height)  # of the size that fills the source
    scale = fits * rng.uniform(0.5, 1.0)
    left = rng.uniform(0, source.width - width * scale)
    top = rng.uniform(0, source.height - height * scale)
    box = (left, top, left + width * scale, top + height * scale)
    image = source.resize((width, height), Image.Resampling.BICUBIC, box)
    pixels = np.asarray(image, np.float32)[:, :: rng.choice([-1, 1])]
    contrast, offsets = rng.uniform(0.75, 1.25), rng.uniform(-20, 20, 3)
    grain = rng.standard_normal((height, width, 1), np.float32) * rng.uniform(8.0, 13.0)
    pixels = (pixels - 128) * contrast + 128 + offsets + grain
    made = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    drawn = rng.normal(MEAN_BYTES, DEVIATION_BYTES)
    return _encoded_near(made, float(np.clip(drawn, LEAST_BYTES, MOST_BYTES)))


def _encoded_near(image: Image.Image, size_bytes: float) -> bytes:
    """At the lowest quality that makes it as large, or else at the highest."""
    low, high = QUALITIES[0], QUALITIES[-1]
    while low < high:
        middle = (low + high) // 2
        if len(_encoded(image, middle)) < size_bytes:
            low = middle + 1
        else:
            high = middle
    return _encoded(image, low)


def _encoded(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def image_folder(cache: Path, count: int, more: Path | None = None) -> Path:
    """CLASS/IMAGE.jpg, `count` in all: of IMAGENET=folder if set, else made; kept in the cache."""
    real = os.environ.get("IMAGENET")
    sources = [] if real else photographs(more)
    kind = f"made-of-{len(sources)}"
    if real:
        kind = f"real-{hashlib.sha256(real.encode()).hexdigest()[:8]}"
    folder = cache / f"{kind}-{count}" / "folders"
    if (done := folder.with_name("folders-complete")).exists():
        return folder
    print(f"  {count} images into {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    if real:
        _copy_real(Path(real), folder, count)
    else:
        for name in range(min(CLASSES, count)):
            (folder / f"class_{name:03d}").mkdir(parents=True)
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(partial(_write, sources, folder), range(count)))
    done.touch()
    return folder


def _write(sources: list[Image.Image], folder: Path, index: int) -> None:
    path = folder / f"class_{index % CLASSES:03d}" / f"{index:06d}.jpg"
    path.write_bytes(make_image(sources, index))


def _copy_real(root: Path, folder: Path, count: int) -> None:
    """`count` of the images of ROOT/CLASS/IMAGE or ROOT/train/CLASS/IMAGE, of the first classes."""
    root = root / "train" if (root / "train").is_dir() else root
    each = -(-count // CLASSES)
    taken = [
        path
        for name in sorted(entry for entry in root.iterdir() if entry.is_dir())
        for path in sorted(name.glob("*.[jJ][pP]*"))[:each]
    ][:count]
    assert len(taken) == count, f"IMAGENET={root} has {len(taken)} images in reach, COUNT={count}"
    for path in taken:
        target = folder / path.parent.name / f"{path.stem}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
