"""Makes the embedded data set: scikit-learn's handwritten digits as a zip of class folders of PNGs.

    python tests/support/make_digits.py src/lightship/data/digits.zip

Writes the same bytes each time for one version of Pillow, and the same pixels for any.
"""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

TEST_EVERY = 5


def digits() -> dict[str, np.ndarray]:
    """Path in the zip -> [8, 8] uint8: every fifth image is in test; ink is white on black."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.rint(data.images * (255 / data.images.max())).astype(np.uint8)
    return {
        f"{'train' if i % TEST_EVERY else 'test'}/{label}/{i:04d}.png": image
        for i, (image, label) in enumerate(zip(pixels, data.target, strict=True))
    }


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # PNGs shrink no further
        for name, image in sorted(digits().items()):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG", optimize=True)
            entry = zipfile.ZipInfo(name, date_time=(1998, 7, 1, 0, 0, 0))
            archive.writestr(entry, buffer.getvalue())


if __name__ == "__main__":
    write_zip(Path(sys.argv[1]))
