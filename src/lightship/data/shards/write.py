"""The shards of a pack: written by several threads, each shard by one of them, and recorded."""

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from itertools import islice, pairwise
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic

import numpy as np

from lightship import storage
from lightship.config import PackConfig
from lightship.data.bad_samples import BadSamples
from lightship.data.checksum import crc32
from lightship.data.images.limits import ImageLimits
from lightship.data.manifest import Manifest
from lightship.data.sample_reader import Sample, read_samples
from lightship.data.shards.index import WORK, ShardWriter
from lightship.data.shards.plan import Plan, Shard, ShardRecord
from lightship.data.shards.recode import recode
from lightship.distributed import comm
from lightship.errors import ConfigError, DataError, LightshipError

SCRATCH = "scratch-"
"""Prefix of the folder under WORK where shards for a local DST are written."""
_MAX_THREADS = 16
_LOOK_EVERY_S, _STOP_S = 0.2, 10.0


def stored_form(data: Sample, manifest: Manifest, options: PackConfig) -> tuple[bytes, str]:
    """`recode` of a sample of a split. Raises DataError for a bad one."""
    if isinstance(data, DataError):
        raise data
    limits = ImageLimits.of(options, "--")
    return recode(data, manifest.encoding, options.short_side_px, options.quality, limits)


class _Stopped(Exception):
    """Another thread has failed, or the process is asked to stop."""


class Packing:
    """The writing of shards. See `pack` for what is raised."""

    def __init__(
        self,
        url: str,
        manifests: Mapping[str, Manifest],
        plan: Plan,
        options: PackConfig,
        records: dict[Shard, ShardRecord],
    ):
        self.url, self.manifests, self.plan, self.options = url, manifests, plan, options
        self.records = records
        """Of the finished shards, to which `write` adds."""
        max_bad_fraction = options.max_bad_fraction if options.on_error == "skip" else None
        self.bad = {
            split: BadSamples(manifest, len(manifest), max_bad_fraction, flags="--")
            for split, manifest in manifests.items()
        }
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._done = sum(shard.stop - shard.start for shard in records)
        for shard, record in records.items():
            for i, reason in record.bad.items():
                self.bad[shard.split].add(i, DataError(reason))

    def write(self, todo: list[Shard], progress: Callable[[int, int], None]) -> None:
        """Write and record these shards. Blocks; raises the first error of a thread."""
        threads = self.options.threads or min(_MAX_THREADS, 2 * comm.cores())
        jobs = self._jobs(todo, threads)
        total = sum(map(len, self.manifests.values()))
        ended: SimpleQueue[BaseException | None] = SimpleQueue()
        shared = iter(jobs)
        local = None if storage.is_remote(self.url) else storage.local_path(self.url) / WORK

        def work(scratch: Path) -> None:
            try:
                for job in shared:
                    self._write_job(job, scratch)
                ended.put(None)
            except BaseException as error:  # raised again by the thread that waits
                ended.put(error)

        with tempfile.TemporaryDirectory(
            prefix=SCRATCH, dir=local, ignore_cleanup_errors=True
        ) as scratch:
            workers = [
                threading.Thread(target=work, args=(Path(scratch),), daemon=True)
                for _ in range(min(threads, len(jobs)))
            ]
            try:
                for worker in workers:
                    worker.start()
                left = len(workers)
                while left:
                    progress(self._done, total)
                    try:
                        error = ended.get(timeout=_LOOK_EVERY_S)
                    except Empty:
                        continue
                    if error is not None:
                        raise error
                    left -= 1
                progress(self._done, total)
            finally:
                self._stop.set()
                ends = monotonic() + _STOP_S
                for worker in workers:
                    if worker.ident is not None:
                        worker.join(max(0.0, ends - monotonic()))

    def _jobs(self, todo: list[Shard], threads: int) -> list[list[Shard]]:
        """Shards that one thread writes one after the other."""
        jobs = []
        for split, manifest in self.manifests.items():
            mine = [shard for shard in todo if shard.split == split]
            lanes = len(mine)
            if manifest.container == "gzip":  # reading any of a file unpacks all of it
                lanes = min(threads, len(manifest.files), lanes)
            edges = [len(mine) * lane // max(1, lanes) for lane in range(lanes + 1)]
            jobs += [mine[start:stop] for start, stop in pairwise(edges)]
        return jobs

    def _write_job(self, job: list[Shard], scratch: Path) -> None:
        manifest = self.manifests[job[0].split]
        ids = np.concatenate([np.arange(shard.start, shard.stop) for shard in job])
        with closing(read_samples(manifest, ids)) as samples:  # type: ignore[type-var]
            for shard in job:
                path = scratch / shard.file.replace("/", "-")
                shard_url = storage.join(self.url, shard.file)
                some = islice(samples, shard.stop - shard.start)
                try:
                    record = self._write_shard(shard, some, path)
                    if record.size:
                        storage.write_file(shard_url, path)
                    else:
                        storage.remove(shard_url)
                finally:
                    path.unlink(missing_ok=True)
                record.save(self.url, shard, self.plan.key)
                with self._lock:
                    self.records[shard] = record

    def _write_shard(
        self, shard: Shard, samples: Iterator[tuple[int, Sample]], path: Path
    ) -> ShardRecord:
        manifest, rows, bad = self.manifests[shard.split], [], {}
        try:
            with path.open("wb") as file:
                tar = ShardWriter(file)
                for i, data in samples:
                    if self._stop.is_set():
                        raise _Stopped
                    try:
                        stored, extension = stored_form(data, manifest, self.options)
                    except DataError as error:
                        self.bad[shard.split].add(i, error)
                        bad[i] = self.bad[shard.split].reasons[i]
                    else:
                        offset = tar.add(f"{i:09d}", int(manifest.label[i]), stored, extension)
                        rows.append((i, offset, len(stored), crc32(stored)))
                    with self._lock:
                        self._done += 1
                size = tar.close() if rows else 0
        except OSError as error:
            if isinstance(error, LightshipError):
                raise
            raise ConfigError(
                f"{path.parent} cannot hold a shard of --shard_mib {self.options.shard_mib:g} "
                f"({error}); TMPDIR names another place"
            ) from error
        ids, offsets, lengths, sums = np.array(rows, dtype=np.int64).reshape(-1, 4).T
        return ShardRecord(size, ids, offsets, lengths, sums, bad)
