"""What a command imports: modules are counted, not seconds."""

import subprocess
import sys

PRINT_MODULES = "import sys; print(*{name.split('.')[0] for name in sys.modules})"
LIGHTSHIP_ADDS = {"lightship", "simplejpeg", "zlib_ng", "netrc", "resource"}
"""Top-level packages of a fit that `import lightning.pytorch` does not import."""


def imported(code: str) -> set[str]:
    command = [sys.executable, "-P", "-c", f"{code}\n{PRINT_MODULES}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    return set(done.stdout.split())


def test_a_fit_imports_little_beyond_lightning() -> None:
    """Not wandb, pandas, s3fs, rich, jinja2 or timm; those of Lightning cannot be left out."""
    both = "import lightning.pytorch, sys; before = {name.split('.')[0] for name in sys.modules}\n"
    both += "import lightship.commands.fit\n"
    both += "print(*{name.split('.')[0] for name in sys.modules} - before); sys.exit()"
    assert imported(both) <= LIGHTSHIP_ADDS


def test_processes_that_decode_scale_images_without_torch() -> None:
    """Nor does it need Lightning, or what these import."""
    code = (
        "import io, numpy as np\n"
        "from PIL import Image\n"
        "import lightship.data.decode_ahead, lightship.data.streaming.worker\n"
        "from lightship.data.images.resize import decode_square\n"
        "file = io.BytesIO(); Image.new('RGB', (40, 30), 'red').save(file, 'JPEG')\n"
        "assert decode_square(file.getvalue(), 'image', 8).shape == (8, 8, 3)"
    )
    assert not imported(code) & {"torch", "torchvision", "lightning", "torchmetrics", "s3fs"}
