"""One arm of the table `scale`: python -m benchmarks.scale_listing OBJECTS.

From the pages of a listing of S3 (see `tests.support.s3_listing`) to the manifest of class folders.
Prints one line of JSON.
"""

import json
import os
import sys
import time

from benchmarks.scale_order import memory_mb
from lightship.data.sources import layouts
from lightship.data.sources.build_manifests import build_manifests
from lightship.data.sources.listing import list_root
from lightship.storage.s3_clients import S3fs
from tests.support.s3_listing import CLASSES, URL, answers


def main(objects: int) -> None:
    """Measure the listing alone, and all until the manifest."""
    os.environ["LIGHTSHIP_S3_CLIENT"] = "s3fs"
    S3fs.answers = answers(CLASSES)  # type: ignore[method-assign]
    list_root(URL, URL)  # imports what it needs
    S3fs.answers = answers(objects)  # type: ignore[method-assign]
    before_mb, began_s = memory_mb("VmHWM"), time.process_time()
    listing = list_root(URL, URL)
    listed_s = time.process_time()
    found = layouts._find(URL, URL, listing, labelled=True)
    del listing
    manifest = build_manifests(found, URL, URL)["train"]
    assert (len(manifest), len(manifest.class_names)) == (objects, CLASSES)
    measured = {
        "list_us": (listed_s - began_s) / objects * 1e6,
        "find_us": (time.process_time() - listed_s) / objects * 1e6,
        "peak_bytes": (memory_mb("VmHWM") - before_mb) * 2**20 / objects,
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main(int(sys.argv[1]))
