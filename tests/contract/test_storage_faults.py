"""Storage under faults: what passes is survived byte for byte, what stays ends within its bound."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lightship import storage
from lightship.errors import ConfigError, DataError
from lightship.storage import Denied, Limits, NotFound, ReadAhead, Span, StorageTimeout
from tests.support.faults import FaultProxy
from tests.support.s3 import S3Server, free_ports

pytestmark = pytest.mark.timeout(60)  # a hang is a failure, whatever else holds

DATA = os.urandom(100_000)
PASSING = ["status", "reset", "stall", "short", "long"]


@pytest.fixture(scope="module")
def stored(s3: S3Server) -> str:
    url = s3.url("data")
    storage.write_bytes(url, DATA)
    return url


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture(params=["obstore", "s3fs"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who reads ranges first."""
    monkeypatch.setenv("LIGHTSHIP_S3_CLIENT", request.param)
    return request.param


by_both = pytest.mark.usefixtures("client")


@pytest.fixture
def short_deadline(
    proxy: FaultProxy, stored: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.5 s, and clients that are built and connected: on a busy machine that may take longer.

    Ranges are read by one client, everything else by the other.
    """
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "1.5")
    calls: list[Callable[[], object]] = [
        lambda: storage.read_range(stored, 0, 1),
        lambda: storage.exists(stored),
        lambda: storage.write_bytes(s3.url("first"), b"1"),
    ]
    for call in calls:
        for _ in range(10):
            with suppress(StorageTimeout):
                call()
                break
        else:
            pytest.fail("no client within 15 s")
    proxy.requests.clear()


@pytest.mark.usefixtures("short_deadline")
@pytest.mark.parametrize("size_mib", [6, 20])
def test_a_file_may_take_longer_than_the_deadline(
    proxy: FaultProxy, s3: S3Server, size_mib: int
) -> None:
    """In pieces: each is progress."""
    url, data = s3.url("large"), os.urandom(size_mib * 2**20)
    bucket, _, key = url.removeprefix("s3://").partition("/")
    s3.client().put_object(Bucket=bucket, Key=key, Body=data)
    proxy.plan("trickle")
    assert storage.read_small(url, 2**30) == data
    assert proxy.requests["GET"] == -(-size_mib // 8)


@by_both
@pytest.mark.parametrize("fault", PASSING)
def test_passing_faults_are_survived_with_the_same_bytes(
    proxy: FaultProxy, stored: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = 3
    if fault == "stall":
        times = 1
        monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "9")  # and 3 s of silence
    proxy.plan(fault, times)
    assert storage.read_range(stored, 10, 90_000) == DATA[10:90_000]
    assert proxy.requests["GET"] == times + 1


def test_a_large_upload_that_nobody_takes_is_made_again(
    proxy: FaultProxy, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client waits without a bound for a server to ask for the body, and for it to take it."""
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "15")
    url, data = s3.url("large"), bytes(range(256)) * 2**13
    proxy.plan("deaf", 1, methods=("PUT",))
    storage.write_bytes(url, data)
    assert proxy.requests["PUT"] == 2
    assert storage.read_bytes(url) == data


@by_both
@pytest.mark.parametrize("fault", ["status", "reset", "short"])
def test_reads_ahead_survive_too_each_in_its_place(
    proxy: FaultProxy, stored: str, fault: str
) -> None:
    proxy.plan(fault, times=3)
    reads = ReadAhead()
    spans = [Span(stored, start, start + 700) for start in range(0, 70_000, 700)]
    futures = [reads.begin(span) for span in spans]
    for span, future in reversed(list(zip(spans, futures, strict=True))):
        assert reads.result(future) == DATA[span.start : span.end]
    assert proxy.requests["GET"] == len(spans) + 3
    reads.close()


@pytest.mark.usefixtures("client", "short_deadline")
@pytest.mark.parametrize("fault", ["status", "stall"])
def test_reads_ahead_end_in_a_time_out_too(proxy: FaultProxy, stored: str, fault: str) -> None:
    proxy.plan(fault)
    reads = ReadAhead()
    futures = [reads.begin(Span(stored, start, start + 10)) for start in (0, 10)]
    for future in futures:
        with pytest.raises(StorageTimeout, match=r"no success within .* last: "):
            reads.result(future)
    reads.close()


@by_both
def test_reads_ahead_name_what_is_not_there(stored: str) -> None:
    reads = ReadAhead()
    with pytest.raises(NotFound, match="none"):
        reads.result(reads.begin(Span(f"{stored}-none", 0, 10)))
    with pytest.raises(DataError, match=r"has 100000 bytes"):
        reads.result(reads.begin(Span(stored, 99_990, 100_010)))
    reads.close()


@pytest.mark.parametrize("fault", ["status", "reset"])
def test_whole_files_survive_too(proxy: FaultProxy, stored: str, fault: str) -> None:
    proxy.plan(fault, times=2)
    assert storage.read_bytes(stored) == DATA
    assert proxy.requests == {"GET": 3}


@pytest.mark.usefixtures("client", "short_deadline")
@pytest.mark.parametrize("fault", PASSING)
def test_faults_that_stay_end_in_a_time_out(proxy: FaultProxy, stored: str, fault: str) -> None:
    proxy.plan(fault)
    with pytest.raises(StorageTimeout, match=r"no success within .* last: ") as caught:
        storage.read_range(stored, 0, 1000)
    assert caught.value.exit_code == 74
    assert 0 < proxy.requests["GET"] <= Limits.attempts
    if fault == "status":  # neither s3fs nor botocore multiplies our tries with its own
        told = re.search(r"failed tries: (\d+);", str(caught.value))
        assert told
        # One may be under way when the deadline comes; one may fail on its way to the server.
        assert proxy.requests["GET"] <= int(told[1]) + 1


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (429, "TooManyRequests")])
def test_other_statuses_that_pass(proxy: FaultProxy, stored: str, status: int, code: str) -> None:
    proxy.plan("status", 2, status=status, code=code)
    assert storage.read_bytes(stored) == DATA


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (403, "AccessDenied", Denied),
        (403, "SignatureDoesNotMatch", Denied),
        (404, "NoSuchKey", NotFound),
        (404, "NoSuchBucket", NotFound),
        (400, "InvalidArgument", ConfigError),
    ],
)
def test_answers_that_will_not_change_are_asked_for_once(
    proxy: FaultProxy, stored: str, status: int, code: str, error: type[Exception]
) -> None:
    proxy.plan("status", status=status, code=code)
    with pytest.raises(error, match=code):
        storage.read_bytes(stored)
    assert proxy.requests == {"GET": 1}


@by_both
def test_many_spans_take_one_request_each_and_no_head(proxy: FaultProxy, stored: str) -> None:
    spans = [Span(stored, i * 900, i * 900 + 1000) for i in range(100)] + [Span(stored)] * 20
    results = storage.read_spans(spans)
    assert results == [DATA[i * 900 : i * 900 + 1000] for i in range(100)] + [DATA] * 20
    assert proxy.requests == {"GET": 120}


@by_both
def test_many_spans_survive_faults_among_them(proxy: FaultProxy, stored: str) -> None:
    for fault in ("status", "reset", "short"):
        proxy.plan(fault, times=20)
        spans = [Span(stored, i * 900, i * 900 + 1000) for i in range(100)]
        assert storage.read_spans(spans) == [DATA[s.start : s.end] for s in spans]
        assert proxy.requests["GET"] == 120


@pytest.mark.usefixtures("client", "short_deadline")
def test_a_dead_storage_ends_many_spans_together(proxy: FaultProxy, stored: str) -> None:
    proxy.plan("stall")
    results = storage.read_spans([Span(stored, i, i + 9) for i in range(500)], on_error="return")
    assert {type(result) for result in results} == {StorageTimeout}
    with pytest.raises(StorageTimeout):
        storage.read_spans([Span(stored, i, i + 9) for i in range(500)])


@by_both
def test_a_truncated_object_is_an_error_at_once(proxy: FaultProxy, stored: str) -> None:
    with pytest.raises(DataError, match="has 100000 bytes"):
        storage.read_range(stored, 0, 100_001)
    assert proxy.requests["GET"] == 1


def test_small_writes_survive(proxy: FaultProxy, s3: S3Server) -> None:
    url = s3.url("new")
    for fault in ("status", "reset"):
        proxy.plan(fault, 2, methods=("PUT", "HEAD"))
        storage.write_bytes(url, fault.encode())
        assert storage.read_bytes(url) == fault.encode()


def test_a_fault_in_one_part_repeats_that_part_alone(
    proxy: FaultProxy, s3: S3Server, tmp_path: Path
) -> None:
    data, url = os.urandom(2**20) * 40, s3.url("large")  # three parts of up to 16 MiB
    (tmp_path / "large").write_bytes(data)
    proxy.plan("status", 2, methods=("PUT",))
    storage.write_file(url, tmp_path / "large")
    assert proxy.requests["PUT"] == 3 + 2
    assert storage.read_bytes(url) == data


def test_a_completed_upload_whose_answer_is_lost_is_written(
    proxy: FaultProxy, s3: S3Server
) -> None:
    data, url = os.urandom(2**20) * 40, s3.url("large")
    proxy.plan("reset", 1, methods=("POST",), after=1)  # the first begins the upload
    storage.write_bytes(url, data)
    assert proxy.requests["POST"] == 3
    assert storage.read_bytes(url) == data


@pytest.mark.parametrize("is_there", [True, False])
def test_an_upload_that_the_server_knows_no_more(
    proxy: FaultProxy, s3: S3Server, is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the answer to its completion was lost, some servers say so to the next try."""
    url = s3.url("large")
    before, data = bytes(40 * 2**20), os.urandom(2**20) * 40
    storage.write_bytes(url, before)  # of the same size: that tells nothing
    take, completions = proxy.take_fault, 0

    def fault(method: str, path: str = "") -> str:
        nonlocal completions
        take(method, path)
        if method != "POST" or "uploadId=" not in path:
            return ""
        completions += 1
        return "reset" if is_there and completions == 1 else "status"

    proxy.status, proxy.code = 404, "NoSuchUpload"
    monkeypatch.setattr(proxy, "take_fault", fault)
    if is_there:
        storage.write_bytes(url, data)
        assert completions == 2
    else:
        with pytest.raises(NotFound, match="NoSuchUpload"):
            storage.write_bytes(url, data)
    assert storage.read_bytes(url) == (data if is_there else before)


def test_a_failed_upload_leaves_nothing(proxy: FaultProxy, s3: S3Server) -> None:
    proxy.plan("status", methods=("PUT",), status=403, code="AccessDenied")
    url = s3.url("large")
    with pytest.raises(Denied):
        storage.write_bytes(url, bytes(40 * 2**20))
    assert not storage.exists(url)
    assert proxy.requests["DELETE"] == 1
    assert not s3.client().list_multipart_uploads(Bucket=s3.bucket).get("Uploads")


def test_an_upload_that_cannot_be_aborted_keeps_its_first_error(
    proxy: FaultProxy, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"PUT": (403, "AccessDenied"), "DELETE": (404, "NoSuchUpload")}

    def fault(method: str, path: str = "") -> str:
        proxy.status, proxy.code = answers.get(method, (0, ""))
        return "status" if method in answers else ""

    monkeypatch.setattr(proxy, "take_fault", fault)
    with pytest.raises(Denied):
        storage.write_bytes(s3.url("large"), bytes(40 * 2**20))


@pytest.mark.usefixtures("short_deadline")
def test_writes_that_cannot_succeed_end(proxy: FaultProxy, s3: S3Server) -> None:
    url = s3.url("new")
    proxy.plan("status", methods=("PUT",))
    with pytest.raises(StorageTimeout, match=r"last: SlowDown: .*broken here"):
        storage.write_bytes(url, b"1")


def test_listing_and_lookups_survive(proxy: FaultProxy, stored: str) -> None:
    folder = stored.removesuffix("/data")
    for fault in ("status", "reset"):
        proxy.plan(fault, 2, methods=("GET", "HEAD"))
        assert [file.path for file in storage.list_files(folder)] == ["data"]
        proxy.plan(fault, 2, methods=("HEAD",))
        assert storage.size_bytes(stored) == len(DATA)
        proxy.plan(fault, 2, methods=("HEAD", "GET"))
        assert storage.exists(stored)


@pytest.mark.usefixtures("short_deadline")
def test_an_outage_is_not_taken_for_absence(proxy: FaultProxy, stored: str) -> None:
    proxy.plan("status", methods=("GET", "HEAD"))
    for call in (storage.exists, storage.list_files):
        with pytest.raises(StorageTimeout):
            call(stored)


def test_downloads_and_open_files_survive(proxy: FaultProxy, stored: str, tmp_path: Path) -> None:
    proxy.plan("reset", 2)
    storage.download(stored, tmp_path / "data")
    assert (tmp_path / "data").read_bytes() == DATA
    proxy.plan("status", 2)
    with storage.open_binary(stored) as file:
        file.seek(-1000, os.SEEK_END)
        assert file.read() == DATA[-1000:]


def test_a_dead_endpoint_is_worth_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any-key-of-tests")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "1")
    with pytest.raises(StorageTimeout, match="s3://bucket/run"):
        storage.check_writable("s3://bucket/run")
