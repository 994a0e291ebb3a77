"""The first samples at --data.root, found without listing or scanning all of it."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from lightship import storage
from lightship.config import DataConfig
from lightship.data.images.decode import decode
from lightship.data.images.limits import ImageLimits
from lightship.data.images.resize import decode_square
from lightship.data.manifest import Manifest
from lightship.data.regime import side_of
from lightship.data.sample_reader import plan_spans, read_samples
from lightship.data.shards.index import INDEX, INDEX_0_1, index_in, read_index
from lightship.data.sources.cifar import ENCODING
from lightship.data.sources.detect import (
    LOOKED_FOR,
    bytes_by_kind,
    files_by_kind,
    kind_of_file,
    may_be_packed,
)
from lightship.data.sources.file_names import count_by_suffix, is_ignored, is_image
from lightship.data.sources.gzip_file import Gunzipped
from lightship.data.sources.layouts import scan
from lightship.data.sources.listing import nothing_there
from lightship.data.sources.own_files import is_of_run, run_folders
from lightship.data.sources.parquet import scan_parquet
from lightship.data.sources.roots import NAMED_ROOTS, inside_if_zip
from lightship.doctor.context import Context
from lightship.errors import DataError
from lightship.storage.file_table import FileTable
from lightship.storage.tar_headers import read_headers

_MAX_LISTED = 256
_SPANS_BYTES = 16 * 2**20
_PIECE_BYTES = 4 * 2**20  # as the stream's blocks
_HEAD_BYTES = 2 * 2**20
_CIFAR_ROW_BYTES = 3073.0
_DECODED, _MAX_FIRST = 16, 2**16
TAR_SHARDS = "tar shards"
"""The layout whose content only reading all of it tells."""


@dataclass(frozen=True)
class FirstSamples:
    """What the first files show.

    Attributes:
        layout: What holds the images.
        spans: What to read to measure the speed; at most about 16 MiB.
        image_bytes: Mean size of a stored image; None: not known.
        images: A few images' bytes, to be decoded.
        encoding: Of these (`Manifest.encoding`).
        count: Images of the training split, where an index or a table of contents tells.
        classes: Number of classes, likewise.
        whole_bytes: Size of an archive that is fetched whole before anything else.
    """

    layout: str
    spans: list[storage.Span]
    image_bytes: float | None = None
    images: list[bytes] = field(default_factory=list)
    encoding: str = "image"
    count: int | None = None
    classes: int | None = None
    whole_bytes: int | None = None

    def size_px(self, data: DataConfig) -> int | None:
        """Side of the images as a fit takes them; None if there is none to look at.

        Raises:
            DataError: The first image cannot be read or skipped, or is not square and not resized.
        """
        if data.image_size_px:
            return data.image_size_px
        pixels = next(self.decoded(data), None)
        return None if pixels is None else side_of(pixels, "the first image")

    def decoded(self, data: DataConfig, size_px: int | None = None) -> Iterator[np.ndarray]:
        """The images as a fit decodes them, [H, W, 3] uint8; squares if there is a `size_px`.

        Raises:
            DataError: One cannot be read or skipped.
        """
        limits = ImageLimits.of(data)
        for image in self.images:
            try:
                if size_px:
                    yield decode_square(image, self.encoding, size_px, limits)
                else:
                    yield decode(image, self.encoding, limits=limits)
            except DataError:
                if data.on_error == "raise":
                    raise


def first_samples(context: Context) -> FirstSamples:
    """Look at the first files at --data.root, of a few hundred that are listed. Blocks.

    Raises:
        LightshipError: Nothing is there, or it is no data set.
    """
    data = context.config.data
    if data.root == "digits":
        return _of_manifest(scan("digits")["train"], "the embedded digits")
    url, md5 = NAMED_ROOTS.get(data.root, (data.root, data.root_md5))
    if md5 and storage.is_remote(url):
        kept = storage.cache_path(md5.lower(), storage.base_name(url))
        if not kept.exists():
            size = storage.size_bytes(url)
            return FirstSamples("an archive", _pieces(url, {"": size}), whole_bytes=size)
        url = inside_if_zip(str(kept), is_download=True)
    elif may_be_packed(url):
        try:
            return _indexed(url, INDEX)
        except (storage.NotFound, storage.Denied):
            return _indexed(url, INDEX_0_1)
    else:
        url = inside_if_zip(url)
    try:
        files = storage.list_files(url, _MAX_LISTED, skip=is_ignored)
    except storage.NotFound as error:
        raise nothing_there(url) from error
    files = [file for file in files if not file.path or not is_ignored(file.path)]
    sizes = {file.path: file.size_bytes for file in files}
    runs = run_folders(sizes)
    return _listed(url, FileTable.of({p: n for p, n in sizes.items() if not is_of_run(p, runs)}))


def _listed(url: str, sizes: FileTable) -> FirstSamples:
    """Of the largest kind of these files; the path "" is the root itself."""
    if name := index_in(sizes):
        return _indexed(url, name)
    if "" in sizes:
        kinds = {kind_of_file(url, sizes[""], storage.redact(url)): np.ones(1, dtype=bool)}
    elif not (kinds := files_by_kind(sizes)):
        raise DataError(
            f"--data.root {storage.redact(url)}: the first {len(sizes)} files are "
            f"{count_by_suffix(sizes)}; looked for {LOOKED_FOR}"
        )
    size_of_kind = bytes_by_kind(kinds, sizes)
    kind = max(size_of_kind, key=size_of_kind.__getitem__)
    chosen = dict(sizes.select(kinds[kind]))
    if kind == "image":
        most = Manifest.max_sample_bytes  # a larger one counts as unreadable, as it does for a fit
        chosen = {path: size for path, size in chosen.items() if size <= most}
        spans = _pieces(url, chosen, piece_bytes=most)
        images = [each for each in storage.read_spans(spans[:_DECODED]) if isinstance(each, bytes)]
        return FirstSamples("one file an image", spans, _mean(list(chosen.values())), images)
    spans = _pieces(url, chosen)
    if kind == "CIFAR":
        layout = "a CIFAR python archive, unpacked"  # whose pickles are read whole
        return FirstSamples(layout, spans, _CIFAR_ROW_BYTES, encoding=ENCODING)
    if kind == "Parquet":
        first = list(chosen)[:1]
        (part,) = scan_parquet(url, first, storage.redact(url), labelled=False).parts
        return FirstSamples("Parquet", spans, _mean(part.length))
    lengths, images = _look_into_tar(storage.join(url, next(iter(chosen))), kind != "tar")
    if kind == "tar":
        return FirstSamples(TAR_SHARDS, spans, _mean(lengths), images)
    # Read from its beginning to its end before training, whatever is in it.
    return FirstSamples("a gzipped tar", spans, None, images, whole_bytes=sum(chosen.values()))


def _pieces(url: str, sizes: dict[str, int], piece_bytes: int = _PIECE_BYTES) -> list[storage.Span]:
    """The first 16 MiB of files (path -> bytes) in pieces, of which the last is whole too."""
    spans, left = [], _SPANS_BYTES
    for path, size in sizes.items():
        for at in range(0, min(size, left), piece_bytes):
            span = storage.Span(storage.join(url, path), at, min(at + piece_bytes, size))
            spans.append(span)
        left -= size
    return spans


def _mean(lengths: Sequence[int] | np.ndarray) -> float | None:
    return float(np.mean(lengths)) if len(lengths) else None


def _indexed(url: str, name: str) -> FirstSamples:
    """Packed shards, whose index tells all."""
    manifests = read_index(url, name)
    split = "train" if "train" in manifests else min(manifests)
    return _of_manifest(manifests[split], "packed shards")


def _of_manifest(manifest: Manifest, layout: str) -> FirstSamples:
    count = int(np.searchsorted(np.cumsum(manifest.length[:_MAX_FIRST]), _SPANS_BYTES)) + 1
    ids = np.arange(min(count, len(manifest), _MAX_FIRST))
    in_place = ids[np.lexsort((manifest.offset[ids], manifest.file_index[ids]))]
    images = []
    for _, data in read_samples(manifest, ids[:_DECODED]):
        if isinstance(data, DataError):
            raise data
        images.append(data)
    return FirstSamples(
        layout,
        [span for span, _ in plan_spans(manifest, in_place)],
        _mean(manifest.length[ids]),
        images,
        manifest.encoding,
        len(manifest),
        len(manifest.class_names),
    )


def _look_into_tar(url: str, is_gzipped: bool) -> tuple[list[int], list[bytes]]:
    """The sizes of the images among a tar's first members, and the first of these images.

    Raises:
        DataError: It is no tar.
    """
    lengths: list[int] = []
    images: list[bytes] = []
    try:
        with storage.open_binary(url) as file:
            stream: Any = Gunzipped(file, url) if is_gzipped else file
            for member in islice(read_headers(stream), _MAX_LISTED):
                if member.kind == "file" and is_image(member.path) and not is_ignored(member.path):
                    lengths.append(member.size)
                    if len(images) < _DECODED and member.size <= _HEAD_BYTES:
                        stream.seek(member.start)
                        images.append(stream.read(member.size))
                if member.start > _HEAD_BYTES:
                    break
    except (DataError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"--data.root {storage.redact(url)} is no whole tar ({error})") from error
    return lengths, images
