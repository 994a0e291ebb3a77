"""The first samples at --data.root, found without listing or scanning all of it."""

import io
import zlib
from dataclasses import dataclass, field, replace

import numpy as np

from lightship import storage
from lightship.config import DataConfig
from lightship.data.images.decode import decode
from lightship.data.images.limits import ImageLimits
from lightship.data.manifest import Manifest, load_manifests
from lightship.data.regime import side_of
from lightship.data.sample_reader import plan_spans, read_samples
from lightship.data.shards.index import INDEX
from lightship.data.sources.cifar import ENCODING
from lightship.data.sources.detect import (
    LOOKED_FOR,
    files_by_kind,
    kind_of_file,
    largest_kind,
    may_be_packed,
)
from lightship.data.sources.file_names import count_by_suffix, is_ignored, is_image
from lightship.data.sources.layouts import scan
from lightship.data.sources.listing import nothing_there
from lightship.data.sources.own_files import without_runs
from lightship.data.sources.parquet import scan_parquet
from lightship.data.sources.roots import NAMED_ROOTS, inside_if_zip
from lightship.doctor.context import Context
from lightship.errors import DataError
from lightship.storage.tar_headers import read_headers

_MAX_LISTED = 256
_SPANS_BYTES = 16 * 2**20
_PIECE_BYTES = 4 * 2**20  # as the stream's blocks
_HEAD_BYTES = 2 * 2**20
_MAX_SAMPLE_BYTES = Manifest.max_sample_bytes
_DECODED = 16
_TAR = "tar shards"


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

    @property
    def is_read_whole(self) -> bool:
        """Whether only reading all of it tells what is in it."""
        return self.whole_bytes is not None or self.layout == _TAR

    def size_px(self, data: DataConfig) -> int | None:
        """Side of the images as a fit takes them; None if there is none to look at.

        Raises:
            DataError: The first image cannot be read or skipped, or is not square and not resized.
        """
        if data.image_size_px:
            return data.image_size_px
        for image in self.images:
            try:
                pixels = decode(image, self.encoding, limits=ImageLimits.of(data))
            except DataError:
                if data.on_error == "raise":
                    raise
            else:
                return side_of(pixels, "the first image")
        return None


def first_samples(context: Context) -> FirstSamples:
    """Look at the first files at --data.root. Blocks."""
    return find_first_samples(context.config.data)


def find_first_samples(data: DataConfig) -> FirstSamples:
    """The same, of a data section; a few hundred files of a listing at most.

    Raises:
        LightshipError: Nothing is there, or it is no data set.
    """
    if data.root == "digits":
        return _of_manifest(scan("digits")["train"], "the embedded digits")
    url, md5 = NAMED_ROOTS.get(data.root, (data.root, data.root_md5))
    if md5 and storage.is_remote(url):
        kept = storage.cache_path(md5.lower(), storage.base_name(url))
        if not kept.exists():
            size = storage.size_bytes(url)
            return FirstSamples("an archive", _pieces(url, size), whole_bytes=size)
        return _listed(inside_if_zip(str(kept), is_download=True))
    return _indexed(url) if may_be_packed(url) else _listed(inside_if_zip(url))


def _listed(url: str) -> FirstSamples:
    try:
        files = storage.list_files(url, _MAX_LISTED, skip=is_ignored)
    except storage.NotFound as error:
        raise nothing_there(url) from error
    if [file.path for file in files] == [""]:
        return _in_one_file(url, files[0].size_bytes)
    sizes = without_runs({f.path: f.size_bytes for f in files if not is_ignored(f.path)})
    if INDEX in sizes:
        return _indexed(url)
    kinds = files_by_kind(sizes)
    if not kinds:
        raise DataError(
            f"--data.root {storage.redact(url)}: the first {len(sizes)} files are "
            f"{count_by_suffix(sizes)}; looked for {LOOKED_FOR}"
        )
    kind = largest_kind(kinds, sizes)
    path = kinds[kind][0]
    if kind == "CIFAR":
        # Its pickles are read whole; rows of 3,073 bytes.
        path = max(kinds[kind], key=lambda path: sizes[path])
        pieces = _pieces(storage.join(url, path), sizes[path])
        return FirstSamples("a CIFAR python archive, unpacked", pieces, 3073.0, encoding=ENCODING)
    if kind == "image":
        return _single_files(url, kinds[kind], sizes)
    if kind == "Parquet":
        return _in_parquet(url, path, sizes[path])
    return _in_tar(storage.join(url, path), sizes[path])


def _in_one_file(url: str, size_bytes: int) -> FirstSamples:
    kind = kind_of_file(url, size_bytes, storage.redact(url))
    if kind == "image":
        return _single_files(url, [""], {"": size_bytes})
    if kind == "Parquet":
        return _in_parquet(url, "", size_bytes)
    return _in_tar(url, size_bytes)


def _indexed(url: str) -> FirstSamples:
    """Packed shards, whose index tells all."""
    manifests = load_manifests(storage.join(url, INDEX))
    split = "train" if "train" in manifests else min(manifests)
    return _of_manifest(replace(manifests[split], root=url), "packed shards")


def _of_manifest(manifest: Manifest, layout: str) -> FirstSamples:
    count = int(np.searchsorted(np.cumsum(manifest.length), _SPANS_BYTES)) + 1
    ids = np.arange(min(count, len(manifest)))
    in_place = ids[np.lexsort((manifest.offset[ids], manifest.file_index[ids]))]
    images = []
    for _, data in read_samples(manifest, ids[:_DECODED]):
        if isinstance(data, DataError):
            raise data
        images.append(data)
    return FirstSamples(
        layout,
        [span for span, _ in plan_spans(manifest, in_place)],
        float(manifest.length[ids].mean()),
        images,
        manifest.encoding,
        len(manifest),
        len(manifest.class_names),
    )


def _single_files(url: str, paths: list[str], sizes: dict[str, int]) -> FirstSamples:
    spans: list[storage.Span] = []
    total = 0
    for path in paths:
        if sizes[path] > _MAX_SAMPLE_BYTES:
            continue  # an unreadable image, as it is for a fit
        if spans and total + sizes[path] > _SPANS_BYTES:
            break
        total += sizes[path]
        spans.append(storage.Span(storage.join(url, path), 0, sizes[path]))
    images = [data for data in storage.read_spans(spans[:_DECODED]) if isinstance(data, bytes)]
    return FirstSamples("one file an image", spans, total / max(1, len(spans)), images)


def _in_tar(url: str, size_bytes: int) -> FirstSamples:
    """A tar, known by its first MiB alone."""
    head = storage.read_range(url, 0, min(size_bytes, _HEAD_BYTES))
    is_gzipped = head.startswith(b"\x1f\x8b")
    images: list[bytes] = []
    lengths: list[int] = []
    if is_gzipped:
        try:
            head = zlib.decompressobj(31).decompress(head, 4 * _HEAD_BYTES)
        except zlib.error as error:
            raise DataError(f"{storage.redact(url)} is a damaged gzip file ({error})") from error
    is_tar = False
    try:
        for member in read_headers(io.BytesIO(head)):
            is_tar = True
            if member.kind == "file" and is_image(member.path) and not is_ignored(member.path):
                lengths.append(member.size)
                data = head[member.start : member.start + member.size]
                if len(data) == member.size and len(images) < _DECODED:
                    images.append(data)
    except DataError as error:
        if not is_tar:  # else it is where the head ends within a member
            raise DataError(
                f"--data.root {storage.redact(url)} is one file of {size_bytes} bytes and no tar, "
                f"zip or Parquet ({error})"
            ) from error
    mean = float(np.mean(lengths)) if lengths else None
    if is_gzipped:
        # Read from its beginning to its end before training, whatever is in it.
        return FirstSamples("a gzipped tar", _pieces(url, size_bytes), None, images,
                            whole_bytes=size_bytes)  # fmt: skip
    return FirstSamples(_TAR, _pieces(url, size_bytes), mean, images)


def _in_parquet(url: str, file: str, size_bytes: int) -> FirstSamples:
    (part,) = scan_parquet(url, [file], storage.redact(url), labelled=False).parts
    where = storage.join(url, file) if file else url
    mean = float(np.mean(part.length)) if len(part.length) else None
    return FirstSamples("Parquet", _pieces(where, size_bytes), mean)


def _pieces(url: str, size_bytes: int) -> list[storage.Span]:
    """The first 16 MiB of a file in blocks."""
    ends = range(0, min(size_bytes, _SPANS_BYTES), _PIECE_BYTES)
    return [storage.Span(url, at, min(at + _PIECE_BYTES, size_bytes)) for at in ends]
