"""A bad sample is one wherever the fault lies: named, skipped, counted once, not retried."""

import dataclasses
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightship.data import sample_reader
from lightship.data.bad_samples import BadSamples, News
from lightship.data.manifest import Manifest
from lightship.data.shares import EvalShare
from lightship.data.sources import layouts
from lightship.data.streaming.prefetch import BatchRange, Fetcher
from lightship.errors import ConfigError, DataError, LightshipError
from tests.support.faults import FaultProxy
from tests.support.images import little_set, put, zipped
from tests.support.s3 import S3Server

BAD = 5


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read what nobody may; within this block the process is nobody."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where anybody may read."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def no_time_for_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an error that is retried ends as a time-out, not as the bad sample's."""
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "2")


def by_groups(manifest: Manifest) -> dict[int, bytes | DataError]:
    """Each sample, as a resident split is read."""
    return dict(sample_reader.read_samples(manifest, range(len(manifest))))


def by_fetcher(manifest: Manifest) -> dict[int, bytes | DataError]:
    """Each sample, as a streamed split is read."""
    share = EvalShare(len(manifest), len(manifest), 0, 1)
    wanted = BatchRange(0, 0, 1, 1)
    fetcher = Fetcher(manifest, manifest.blocks(), share, wanted, 2**30, 0)
    [batch] = list(fetch_all(fetcher))
    fetcher.close()
    return batch


def fetch_all(fetcher: Fetcher) -> Iterator[dict[int, bytes | DataError]]:
    for batch in fetcher:
        yield {
            int(batch.ids[row]): raw if isinstance(raw, DataError) else bytes(raw)
            for row, raw in batch.samples
        }


no_retries = pytest.mark.usefixtures("no_time_for_retries")
both_ways = pytest.mark.parametrize("reader", [by_groups, by_fetcher])
Reader = Callable[[Manifest], dict[int, bytes | DataError]]


def assert_one_is_bad(got: dict[int, bytes | DataError], manifest: Manifest, truth: dict) -> None:
    for i, data in got.items():
        if i == BAD:
            assert isinstance(data, DataError)
            assert manifest.name(i) in str(data)
        else:
            assert data == truth[manifest.name(i)]


def replaced_by_link(path: Path, to: str) -> None:
    path.unlink()
    path.symlink_to(to)


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@both_ways
@no_retries
@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.chmod(0),
        lambda path: replaced_by_link(path, path.name),
        lambda path: replaced_by_link(path, "nowhere"),
        replaced_by_folder,
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[:9]),
    ],
    ids=["no permission", "link to itself", "link to nowhere", "folder", "gone", "cut"],
)
def test_one_file_of_a_folder(reader: Reader, spoil: Callable, folder: Path) -> None:
    files = little_set(("train",))
    manifest = layouts.scan(put(str(folder), files))["train"]
    spoil(folder / manifest.name(BAD))
    with unprivileged():
        got = reader(manifest)
    assert_one_is_bad(got, manifest, files)


@both_ways
@no_retries
@pytest.mark.parametrize("name", ["x" * 300, "nul\0.png", "\ud800.png", "train/ant/000.png/x"])
def test_one_name_that_no_file_can_have(reader: Reader, name: str, folder: Path) -> None:
    files = little_set(("train",))
    manifest = layouts.scan(put(str(folder), files))["train"]
    names = list(manifest.files)
    names[int(manifest.file_index[BAD])] = name
    got = reader(dataclasses.replace(manifest, files=names))
    assert isinstance(got[BAD], DataError)
    assert sum(isinstance(data, DataError) for data in got.values()) == 1


def with_entry(archive: bytes, member: str, at: int, form: str, change: Callable) -> bytes:
    """A zip whose central directory says something else of a member."""
    data, name = bytearray(archive), member.encode()
    entry = data.rindex(name) - 46
    assert data[entry : entry + 4] == b"PK\x01\x02"
    [value] = struct.unpack_from(form, data, entry + at)
    struct.pack_into(form, data, entry + at, change(value))
    return bytes(data)


@both_ways
@no_retries
@pytest.mark.parametrize(
    ("at", "form", "change"),
    [
        (10, "<H", lambda _: 99),
        (8, "<H", lambda flags: flags | 1),
        (16, "<I", lambda crc: crc ^ 1),
        (24, "<I", lambda size: size + 100),
        (24, "<I", lambda size: size - 9),
        (20, "<I", lambda size: size // 2),
        (42, "<I", lambda offset: offset + 7),
    ],
    ids=["method", "encrypted", "checksum", "longer", "shorter", "packed shorter", "elsewhere"],
)
def test_one_member_of_a_zip(
    reader: Reader, at: int, form: str, change: Callable, folder: Path
) -> None:
    files = little_set(("train",))
    spoilt = with_entry(zipped(files), sorted(files)[BAD], at, form, change)
    put(str(folder), {"x.zip": spoilt})
    manifest = layouts.scan(f"zip://::{folder}/x.zip")["train"]
    assert manifest.name(BAD) == sorted(files)[BAD]
    assert_one_is_bad(reader(manifest), manifest, files)


@both_ways
def test_one_object_that_is_denied(
    reader: Reader, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = little_set(("train",))
    manifest = layouts.scan(put(s3.url("denied"), files))["train"]
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.plan("status", status=403, code="AccessDenied", path=manifest.name(BAD))
        assert_one_is_bad(reader(manifest), manifest, files)


@both_ways
def test_credentials_that_are_refused_are_no_samples_fault(
    reader: Reader, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = layouts.scan(put(s3.url("expired"), little_set(("train",))))["train"]
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.plan("status", status=403, code="InvalidAccessKeyId", path=manifest.name(BAD))
        with pytest.raises(ConfigError, match="InvalidAccessKeyId"):
            reader(manifest)


# ---- counting ----------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    files = little_set(("train",), per_class=40)
    return layouts.scan(put(str(tmp_path), files))["train"]


def bad() -> DataError:
    return DataError("no image")


def denied() -> DataError:
    error = DataError("access denied")
    error.exit_name = "config"
    return error


def test_a_line_is_shown_when_there_are_more(manifest: Manifest) -> None:
    counted = BadSamples(manifest, 120, 1.0)
    assert counted.take_line() is None
    for i in range(5):
        counted.add(i, DataError("no image"))
    line = counted.take_line()
    assert line is not None
    assert line.startswith("5 of 120 images could not be read and are skipped (train/ant/000.png:")
    assert line.endswith("; ...)")
    counted.add(4, DataError("no image"))
    assert counted.take_line() is None
    counted.add(5, DataError("no image"))
    assert "6 of 120" in str(counted.take_line())


def test_each_sample_counts_once(manifest: Manifest) -> None:
    counted = BadSamples(manifest, len(manifest), 2 / len(manifest))
    for epoch in range(3):
        for i in (3, 4):
            counted.add(i, DataError(f"no image in epoch {epoch}"))
    with pytest.raises(DataError, match=r"at least 3 of 120 images are bad.*max_bad_fraction"):
        counted.add(5, DataError("no image"))


def test_ranks_count_what_any_of_them_has_found(manifest: Manifest) -> None:
    ranks = [BadSamples(manifest, len(manifest), 3 / len(manifest)) for _ in range(2)]
    for rank, found in zip(ranks, [(1, 2), (2, 3)], strict=True):
        for i in found:
            rank.add(i, DataError("no image"))
    news = [rank.take_news() for rank in ranks]
    for rank in ranks:
        rank.merge(news)
        assert rank.reasons.keys() == {1, 2, 3}
        assert rank.take_news().reasons == {}
    with pytest.raises(DataError, match="at least 4 of 120"):
        ranks[0].merge([News({7: "seven: no image"}, is_denied=False), ranks[0].take_news()])


def test_a_restart_counts_on_and_not_twice(manifest: Manifest) -> None:
    before, after = (BadSamples(manifest, 120, 2 / 120) for _ in range(2))
    before.add(1, DataError("no image"))
    before.add(2, DataError("no image"))
    after.load_state_dict(before.state_dict())
    after.add(1, DataError("no image"))
    assert len(after.reasons) == 2
    with pytest.raises(DataError, match="at least 3 of 120"):
        after.add(3, DataError("no image"))
    other = BadSamples(manifest.take(range(100)), 100, 0.0)
    other.load_state_dict(before.state_dict())
    assert not other.reasons, "of another set"


@pytest.mark.parametrize(
    ("errors", "kind"), [([denied, denied], ConfigError), ([denied, bad], DataError)]
)
def test_access_denied_to_all_is_no_matter_of_data(
    manifest: Manifest, errors: list[Callable[[], DataError]], kind: type[LightshipError]
) -> None:
    counted = BadSamples(manifest, len(manifest), 1 / len(manifest))
    counted.add(0, errors[0]())
    with pytest.raises(kind, match="at least 2 of 120"):
        counted.add(1, errors[1]())
