"""Pack: images of any layout as tar shards with an index; shard by shard, each of them committed.

DST holds `pack.json` (the plan), `classes.txt`, `SPLIT/shard-NNNNN.tar`, at the end the index, and
`skipped.txt` if images were skipped. While packing, `.packing/` holds a record of each finished
shard, written after it; the next start continues from these. A shard depends on the source and the
plan alone, so its bytes are the same after any number of restarts and in any order.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

from lightship import storage
from lightship.config import PackConfig
from lightship.data import table_cache
from lightship.data.manifest import Manifest
from lightship.data.manifest_table import write_table
from lightship.data.sample_reader import read_samples
from lightship.data.shards.index import (
    INDEX,
    INDEX_0_1,
    PLAN,
    SKIPPED,
    UNFINISHED,
    WORK,
    index_in,
    load_index,
)
from lightship.data.shards.plan import Plan, Shard, ShardRecord
from lightship.data.shards.write import SCRATCH, Packing, stored_form
from lightship.data.sources import layouts, roots
from lightship.data.sources.file_names import is_ignored
from lightship.errors import ConfigError, DataError, LightshipError
from lightship.safe_text import shown

logger = logging.getLogger(__name__)
_MAX_REMOVALS = 16
_RECORD_FILE = re.compile(rf"{re.escape(WORK)}/[^/]+/shard-[0-9]{{5,9}}\.json")
_SCRATCH_FILE = re.compile(
    rf"{re.escape(WORK)}/{SCRATCH}[a-z0-9_]{{8}}/[^/]+-shard-[0-9]{{5,9}}\.tar"
)
_PROBED = 64


def pack(
    source: str,
    destination: str,
    options: PackConfig,
    progress: Callable[[int, int], None],
) -> None:
    """Write the images at a source as shards, or those that are missing. One process; blocks.

    Memory holds the table of samples and, for each thread, the samples being read and written.

    Args:
        source: A root as `layouts.scan` takes it.
        destination: URL of a folder: new, empty, or an earlier pack of the same source.
        options: See its fields.
        progress: Called several times a second with (images done, all images).

    Raises:
        DataError: Nothing to pack, an image that cannot be read, or too many of them.
        ConfigError: DST cannot be written, holds something else, or lies in SRC.
    """
    url = destination.rstrip("/") or destination
    held = _list_destination(source, url)
    index = index_in(held)
    if not index:
        _check_writable(url)
    manifests = _scan(source, options)
    plan = _plan(source, url, manifests, options, PLAN in held)
    shards = plan.shards(manifests)
    for folder in {file.rpartition("/")[0] for s in shards for file in (s.file, s.record_file)}:
        storage.refuse_link(storage.join(url, folder))
    tars = {path for path in held if path.endswith(".tar") and not is_ignored(path)}
    if strange := tars - {shard.file for shard in shards}:
        raise ConfigError(
            f"DST {storage.redact(url)} holds {min(strange)}, which is not of this pack; remove it"
        )
    if index and _is_finished(url, index, held):
        return
    records = _load_records(url, shards, plan.key, held)
    _begin(url, plan, manifests, held)
    done = f", {len(records):,} of them already written" if records else ""
    images = sum(map(len, manifests.values()))
    logger.info(f"packing {images:,} images in {len(shards):,} shards{done}")
    packing = Packing(url, manifests, plan, options, records)
    packing.write([shard for shard in shards if shard not in records], progress)
    _finish(url, manifests, shards, packing, held)
    size_mib = sum(record.size for record in records.values()) / 2**20
    kept = sum(len(record.ids) for record in records.values())
    left_out = sum(len(bad.reasons) for bad in packing.bad.values())
    logger.info(
        f"packed {kept:,} images, {size_mib:,.1f} MiB: {storage.redact(url)}"
        + (f"; {left_out:,} could not be read and are listed in {SKIPPED}" * bool(left_out))
    )


def _list_destination(source: str, url: str) -> dict[str, int]:
    """File -> bytes of an earlier start; raises ConfigError for a place that is not ours."""
    place = f"DST {storage.redact(url)}"
    if _is_inside(url, source):
        raise ConfigError(f"{place} lies in SRC, to which it would add; give another place")
    storage.refuse_link(storage.join(url, WORK))
    try:
        held = {file.path: file.size_bytes for file in storage.list_files(url)}
    except storage.NotFound:
        return {}
    if "" in held:
        raise ConfigError(f"{place} is a file; give a folder that is new or empty")
    others = [path for path in held if not is_ignored(path)]
    if others and PLAN not in held:
        raise ConfigError(
            f"{place} holds {len(others)} files that are no pack, such as {others[0]}; give a "
            "folder that is new or empty"
        )
    return held


def _is_inside(url: str, source: str) -> bool:
    if source == "digits" or source in roots.NAMED_ROOTS:
        return False
    if not storage.is_remote(url) and not storage.is_remote(source):
        here, there = (storage.local_path(each).resolve() for each in (url, source))
        return here.is_relative_to(there)
    return f"{url}/".startswith(f"{source.rstrip('/')}/")


def _check_writable(url: str) -> None:
    probe = storage.join(url, WORK, "probe")
    try:
        storage.write_bytes(probe, b"lightship")
        storage.remove(probe)
        storage.remove_folder(storage.join(url, WORK))
    except (ConfigError, storage.NotFound) as error:
        raise ConfigError(f"DST {storage.redact(url)} cannot be written: {error}") from error


def _scan(source: str, options: PackConfig) -> dict[str, Manifest]:
    try:
        manifests = layouts.scan(source, options.src_md5)
    except LightshipError as error:
        raise type(error)(str(error).replace("--data.root", "SRC")) from error
    for name in next(iter(manifests.values())).class_names:
        if [name.strip()] != name.splitlines():
            raise DataError(f"the class name {name!r} cannot be a line of classes.txt; rename it")
    return {split: m.within(options.max_sample_mib) for split, m in manifests.items()}


def _plan(
    source: str, url: str, manifests: Mapping[str, Manifest], options: PackConfig, is_kept: bool
) -> Plan:
    """The plan of an earlier start, or a new one."""
    asked = Plan(
        source=storage.redact(source),
        fingerprint={split: manifest.fingerprint() for split, manifest in manifests.items()},
        shard_mib=options.shard_mib,
        short_side_px=options.short_side_px,
        quality=options.quality,
    )
    if not is_kept:
        growth = {split: _growth(manifest, options) for split, manifest in manifests.items()}
        return replace(asked, growth=growth)
    kept = Plan.load(url)
    if changed := kept.differences(asked):
        raise ConfigError(
            f"DST {storage.redact(url)} holds a pack of something else: {'; '.join(changed)}. "
            "Give another DST, or remove this one"
        )
    return kept


def _growth(manifest: Manifest, options: PackConfig) -> float:
    """Stored bytes per source byte, measured on a few images spread over the split."""
    if options.short_side_px is None and options.quality is None:
        return 1.0
    before = after = 0
    ids = np.unique(np.linspace(0, len(manifest) - 1, _PROBED).astype(np.int64))
    for i, data in read_samples(manifest, ids):
        try:
            stored, _ = stored_form(data, manifest, options)
        except DataError:
            continue  # is reported in its turn
        before, after = before + int(manifest.length[i]), after + len(stored)
    return round(after / before, 4) if before else 1.0


def _is_finished(url: str, index: str, held: Mapping[str, int]) -> bool:
    place = storage.redact(url)
    try:
        manifests = load_index(url, index, f"DST {place}", held)
    except DataError as error:
        logger.warning(f"packing again: {error}")
        return False
    _remove(url, _own_files(held))
    images = sum(map(len, manifests.values()))
    shards = sum(len(manifest.files) for manifest in manifests.values())
    logger.info(f"already packed: {images:,} images in {shards:,} shards: {place}")
    return True


def _begin(
    url: str, plan: Plan, manifests: Mapping[str, Manifest], held: Mapping[str, int]
) -> None:
    """Mark DST as unfinished, and write the plan and the class names."""
    storage.write_bytes(storage.join(url, UNFINISHED), b"Rerun lightship pack to continue.\n")
    for index in {INDEX, INDEX_0_1} & held.keys():
        storage.remove(storage.join(url, index))
    if PLAN not in held:
        plan.save(url)
    names = next(iter(manifests.values())).class_names
    storage.write_bytes(storage.join(url, "classes.txt"), "".join(f"{n}\n" for n in names).encode())
    for folder in ("", WORK, *manifests, *(f"{WORK}/{split}" for split in manifests)):
        storage.remove_temporaries(storage.join(url, folder))
    _remove_files(url, filter(_SCRATCH_FILE.fullmatch, held))


def _load_records(
    url: str, shards: list[Shard], key: str, held: Mapping[str, int]
) -> dict[Shard, ShardRecord]:
    """Records of the finished shards: those that have the recorded size."""
    recorded = [shard for shard in shards if shard.record_file in held]
    found = storage.read_spans([storage.Span(storage.join(url, s.record_file)) for s in recorded])
    records = {}
    for shard, data in zip(recorded, found, strict=True):
        assert isinstance(data, bytes)
        record = ShardRecord.parse(data, shard, key)
        if record is not None and record.size == held.get(shard.file, 0):
            records[shard] = record
    return records


def _finish(
    url: str,
    manifests: Mapping[str, Manifest],
    shards: list[Shard],
    packing: Packing,
    held: Mapping[str, int],
) -> None:
    """Write the index, which completes the pack, and remove the records."""
    skipped = [line for bad in packing.bad.values() for _, line in sorted(bad.reasons.items())]
    if skipped:
        text = "".join(f"{shown(line)}\n" for line in skipped)
        storage.write_bytes(storage.join(url, SKIPPED), text.encode())
    elif SKIPPED in held:
        storage.remove(storage.join(url, SKIPPED))
    packed = {}
    for split, manifest in manifests.items():
        full = [s for s in shards if s.split == split and packing.records[s].size]
        records = [packing.records[shard] for shard in full]
        sizes = [len(record.ids) for record in records]
        packed[split] = Manifest(
            root="",
            files=[shard.file for shard in full],
            file_index=np.repeat(np.arange(len(full), dtype=np.int32), sizes),
            offset=np.concatenate([record.offset for record in records]),
            length=np.concatenate([record.length for record in records]),
            crc32=np.concatenate([record.crc32 for record in records]),
            label=manifest.label[np.concatenate([record.ids for record in records])],
            class_names=manifest.class_names,
            container="bytes",
            encoding="image",
        )
    table = table_cache.store(lambda path: write_table(path, packed))
    table_cache.upload(table, storage.join(url, INDEX))
    _remove(url, {*_own_files(held), *(shard.record_file for shard in shards)})


def _remove(url: str, files: Iterable[str]) -> None:
    """Remove records, and last the mark of an unfinished pack."""
    _remove_files(url, files)
    storage.remove(storage.join(url, UNFINISHED))
    storage.remove_folder(storage.join(url, WORK))


def _own_files(held: Iterable[str]) -> list[str]:
    """The files below WORK with exactly the names of records and unfinished shards."""
    return [path for path in held if _RECORD_FILE.fullmatch(path) or _SCRATCH_FILE.fullmatch(path)]


def _remove_files(url: str, files: Iterable[str]) -> None:
    """Remove files of folders below WORK, and the folders if they are then empty."""
    paths = list(files)
    folders = [storage.join(url, folder) for folder in {p.rpartition("/")[0] for p in paths}]
    for folder in folders:
        storage.refuse_link(folder)
    urls = [storage.join(url, path) for path in paths]
    storage.parallel_map(storage.remove, urls, _MAX_REMOVALS)
    for folder in folders:
        storage.remove_folder(folder)
