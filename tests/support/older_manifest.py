"""Writes the manifests of runs and packs as version 0.1.0 did."""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lightship import storage, versions
from lightship.data.manifest import Manifest
from lightship.data.mapped_split import NUMBERS
from lightship.redaction import canonical
from lightship.storage.file_list import FileList


def save_manifests(url: str, manifests: Mapping[str, Manifest]) -> None:
    """Write all splits as one compressed .npz at `url`."""
    arrays: dict[str, Any] = {}
    header: dict[str, Any] = {"format": versions.VERSIONS["manifest"], "splits": {}}
    for split, manifest in manifests.items():
        header["splits"][split] = {
            "root": canonical(manifest.root),
            "class_names": manifest.class_names,
            "container": manifest.container,
            "encoding": manifest.encoding,
            "fingerprint": manifest.fingerprint(),
        }
        arrays[f"{split}.files"] = np.frombuffer(FileList.of(manifest.files).text, dtype=np.uint8)
        for column in NUMBERS:
            values = getattr(manifest, column)
            small = np.result_type(
                *map(np.min_scalar_type, (values.min(initial=0), values.max(initial=0)))
            )
            arrays[f"{split}.{column}"] = values.astype(small)
    buffer = io.BytesIO()
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez_compressed(buffer, **arrays)
    storage.write_bytes(url, buffer.getbuffer())
