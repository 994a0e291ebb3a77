"""obstore as the first to read ranges of S3: used where it may be, given up where it cannot."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from lightship import storage
from lightship.data.bad_samples import BadSamples
from lightship.data.sample_decoder import SampleDecoder
from lightship.data.sources import layouts
from lightship.data.streaming.loaders import StreamedSplit, read_all
from lightship.data.streaming.worker_process import Worker
from lightship.errors import ConfigError
from lightship.storage import Span
from lightship.storage import s3 as s3_module
from lightship.storage.obstore_s3 import FirstTryFailed, ObstoreS3
from lightship.storage.registry import resolve
from lightship.storage.s3 import S3
from lightship.storage.s3_clients import S3fs
from tests.support.faults import FaultProxy
from tests.support.images import little_set
from tests.support.s3 import S3Server

ODD_NAMES = [
    "a b.jpg",
    "a%20b.jpg",
    "a+b&c=d.jpg",
    "\N{SNOWMAN}/#?.jpg",
    "~$@,;'().jpg",
    "a::b.jpg",
]


@pytest.fixture
def by_s3fs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of which s3fs was asked."""
    asked: list[str] = []
    read = S3fs.read

    def asking(self, deadline, path: str, start: int, end: int | None):
        asked.append(path)
        return read(self, deadline, path, start, end)

    monkeypatch.setattr(S3fs, "read", asking)
    return asked


def test_ranges_come_by_obstore(s3: S3Server, by_s3fs: list[str]) -> None:
    url = s3.url("x")
    storage.write_bytes(url, b"0123456789")
    assert storage.read_range(url, 2, 5) == b"234"
    assert by_s3fs == []


def test_without_obstore_they_come_by_s3fs(
    s3: S3Server, by_s3fs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTSHIP_S3_CLIENT", "s3fs")
    url = s3.url("x")
    storage.write_bytes(url, b"0123456789")
    assert storage.read_range(url, 2, 5) == b"234"
    assert len(by_s3fs) == 1


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_mean_the_same_to_both(s3: S3Server, by_s3fs: list[str], name: str) -> None:
    url = s3.url(name)
    storage.write_bytes(url, name.encode())
    assert storage.read_range(url, 0, len(name.encode())) == name.encode()
    assert by_s3fs == []


def test_it_reads_as_whoever_s3fs_reads_as(
    s3: S3Server, by_s3fs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not as somebody else whom only its own variables name."""
    url = s3.url("x")
    storage.write_bytes(url, b"0123456789")
    for name, value in s3.environment("reader").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_TOKEN", "of another session")
    assert storage.read_range(url, 2, 5) == b"234"
    assert by_s3fs == []


def test_it_is_given_up_where_s3fs_alone_succeeds(
    s3: S3Server, by_s3fs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = 0

    def fail(self, *args):
        nonlocal tried
        tried += 1
        raise FirstTryFailed("a certificate that it does not know")

    monkeypatch.setattr(ObstoreS3, "read", fail)
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "31")  # a client of its own
    url = s3.url("x")
    storage.write_bytes(url, b"0123456789")
    for _ in range(20):
        assert storage.read_range(url, 2, 5) == b"234"
    assert tried == 8
    assert len(by_s3fs) == 20


def test_an_outage_does_not_make_it_given_up(
    s3: S3Server, by_s3fs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3.url("x")
    storage.write_bytes(url, b"0123456789")
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert storage.read_range(url, 2, 5) == b"234"
        proxy.plan("status", 40)
        storage.read_spans([Span(url, i % 9, 10) for i in range(100)])
        assert by_s3fs, "tried again by s3fs"
        by_s3fs.clear()
        assert storage.read_range(url, 2, 5) == b"234"
        assert by_s3fs == []


@pytest.mark.parametrize(
    ("settings", "may"),
    [
        ({}, True),
        ({"client_kwargs": {"region_name": "eu-west-1"}}, True),
        ({"client_kwargs": {"verify": "/etc/own-ca.pem"}}, False),
        ({"config_kwargs": {"proxies": {"https": "proxy:3128"}}}, False),
        ({"config_kwargs": {"s3": {"addressing_style": "virtual"}}}, False),
        ({"requester_pays": True}, False),
        ({"s3_additional_kwargs": {"SSECustomerKey": "k"}}, False),
    ],
)
def test_it_keeps_away_from_what_it_cannot_follow(settings: dict, may: bool) -> None:
    from s3fs import S3FileSystem

    fs = S3FileSystem(skip_instance_cache=True, **settings)
    assert (ObstoreS3.where_possible(fs) is not None) == may


def test_an_unknown_client_is_named(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSHIP_S3_CLIENT", "boto")
    with pytest.raises(ConfigError, match="LIGHTSHIP_S3_CLIENT is 'boto'; it must be auto, s3fs"):
        resolve(s3.url("x"))


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "with folder markers"])
def test_both_list_the_same(s3: S3Server, monkeypatch: pytest.MonkeyPatch, marked: bool) -> None:
    url = s3.url()
    for name in [*ODD_NAMES, "train/cat/1.jpg", "train/cat.jpg"]:
        storage.write_bytes(f"{url}/{name}", name.encode())
    if marked:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        s3.client().put_object(Bucket=bucket, Key=f"{prefix}/train/cat/", Body=b"")
    pages: list[str] = []
    call = S3fs.call

    def counting(self, deadline, size, method, **args):
        pages.append(method)
        return call(self, deadline, size, method, **args)

    monkeypatch.setattr(S3fs, "call", counting)
    by_default = storage.list_files(url)
    assert pages == (["list_objects_v2"] if marked else [])
    monkeypatch.setenv("LIGHTSHIP_S3_CLIENT", "s3fs")
    assert storage.list_files(url) == by_default
    assert len(by_default) == len(ODD_NAMES) + 2


def test_an_empty_file_is_listed(s3: S3Server) -> None:
    url = s3.url()
    storage.write_bytes(f"{url}/a.jpg", b"a")
    storage.write_bytes(f"{url}/b.jpg", b"")
    assert [(file.path, file.size_bytes) for file in storage.list_files(url)] == [
        ("a.jpg", 1),
        ("b.jpg", 0),
    ]


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
@pytest.mark.parametrize("marked", [False, True], ids=["plain", "with folder markers"])
def test_a_large_bucket_is_listed_folder_by_folder(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, client: str, marked: bool
) -> None:
    """Many at once, wherever in them the objects lie; a small one as a whole."""
    monkeypatch.setenv("LIGHTSHIP_S3_CLIENT", client)
    url = s3.url()
    folders = ["train/cat", "train/dog", "train/dog-big", "train/\N{SNOWMAN}#", "train", "val", ""]
    names = sorted(
        f"{folder}/{i}.jpg".lstrip("/") for folder in folders for i in range(20 if folder else 2)
    )
    for name in names:
        storage.write_bytes(f"{url}/{name}", b"x")
    if marked:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        s3.client().put_object(Bucket=bucket, Key=f"{prefix}/train/dog/", Body=b"")
    asked: list[str] = []
    pages = S3._pages

    def small_pages(self, deadline, bucket, prefix, max_keys=None):
        asked.append(f"s3://{bucket}/{prefix}".removeprefix(f"{url}/"))
        for page in pages(self, deadline, bucket, prefix, max_keys):
            items = list(page.items())
            yield from (dict(items[start : start + 5]) for start in range(0, len(items), 5))

    monkeypatch.setattr(S3, "_pages", small_pages)
    assert [file.path for file in storage.list_files(url)] == names
    assert asked == [""]
    monkeypatch.setattr(s3_module, "_PAGES_ALONE", 3)
    assert [file.path for file in storage.list_files(url)] == names
    assert asked == ["", ""], "too few in a folder"
    monkeypatch.setattr(s3_module, "_MIN_IN_A_FOLDER", 5)
    monkeypatch.setattr(s3_module, "_MAX_FOLDERS_AT_ONCE", 4)
    assert [file.path for file in storage.list_files(url)] == names
    assert set(asked[3:]) == {f"{folder}/" for folder in folders[:4]}, "the others on the way"
    assert len(asked) == 3 + 4
    flat = f"{url}/train/cat"
    monkeypatch.setattr(S3, "_by_folders", None)  # is not asked
    assert len(storage.list_files(flat)) == 20


_ADOPTING = """
import pickle, sys
from lightship import storage
access = pickle.load(sys.stdin.buffer)
storage.adopt(sys.argv[1], access)
print(storage.read_range(sys.argv[1], 2, 5).decode(), "s3fs" in sys.modules)
"""


def adopting(url: str, access: storage.Access | None, environment: dict[str, str]) -> str:
    """What a process that is given `access` reads, and whether it has imported s3fs."""
    done = subprocess.run(
        [sys.executable, "-c", _ADOPTING, url],
        input=pickle.dumps(access), env=environment, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return done.stdout.decode().strip()


@pytest.fixture
def digits_url(s3: S3Server) -> str:
    """Of a file with ten digits."""
    url = s3.url("x")
    storage.write_bytes(url, b"0123456789")
    return url


def without_keys() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}


def test_a_process_reads_as_another_one_does(digits_url: str) -> None:
    """Without s3fs, and without settings and credentials of its own."""
    access = storage.access(digits_url)
    assert access is not None
    assert access.until is None
    assert adopting(digits_url, access, without_keys()) == "234 False"


def test_it_finds_out_itself_what_it_is_not_given(
    digits_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTSHIP_S3_CLIENT", "s3fs")
    assert storage.access(digits_url) is None
    assert adopting(digits_url, None, dict(os.environ)) == "234 True"


def test_what_the_given_client_cannot_read_s3fs_reads(digits_url: str) -> None:
    access = storage.access(digits_url)
    assert access is not None
    elsewhere = dataclasses.replace(access, endpoint_url="http://127.0.0.1:1")
    assert adopting(digits_url, elsewhere, dict(os.environ)) == "234 True"


def test_expired_keys_are_asked_for_again(digits_url: str) -> None:
    access = storage.access(digits_url)
    assert access is not None
    until = datetime.now(UTC) - timedelta(seconds=1)
    expired = dataclasses.replace(access, keys=("another", "secret", None), until=until)
    assert adopting(digits_url, expired, dict(os.environ)) == "234 True"
    valid = dataclasses.replace(access, until=until + timedelta(hours=1))
    assert adopting(digits_url, valid, without_keys()) == "234 False"


def test_keys_that_change_are_given_for_a_while(
    digits_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As those of a cluster's identity: here a program of ~/.aws/config gives them."""
    until = datetime.now(UTC) + timedelta(hours=1)
    own = {"Version": 1, "Expiration": until.isoformat()}
    for name, key in [
        ("AWS_ACCESS_KEY_ID", "AccessKeyId"),
        ("AWS_SECRET_ACCESS_KEY", "SecretAccessKey"),
    ]:
        own[key] = os.environ[name]
        monkeypatch.delenv(name)
    (tmp_path / "keys.json").write_text(json.dumps(own))
    config = f"[profile renewed]\ncredential_process = cat {tmp_path}/keys.json\n"
    (tmp_path / "config").write_text(config)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "renewed")
    access = storage.access(digits_url)
    assert access is not None
    assert access.until is not None
    assert datetime.now(UTC) < access.until < until
    assert adopting(digits_url, access, without_keys()) == "234 False"


def test_an_error_is_left_to_the_first_read(
    digits_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "unknown")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert storage.access(digits_url) is None
    with pytest.raises(ConfigError, match="unknown"):
        storage.read_range(digits_url, 2, 5)


def test_secrets_of_access_are_not_shown(s3: S3Server) -> None:
    access = storage.access(s3.url("x"))
    assert access is not None
    assert access.keys is not None
    assert access.keys[1] not in repr(access)


@pytest.mark.parametrize("url", ["s3://key:secret@b/x", "s3://arn:aws:s3:::b/x", "gs://b/x", "x"])
def test_what_is_not_handed_over(url: str) -> None:
    assert not storage.may_hand_over(url)
    assert storage.access(url) is None


def test_a_data_worker_does_without_s3fs(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = s3.url()
    for name, data in little_set(("train",), per_class=4).items():
        storage.write_bytes(f"{url}/{name}", data)
    manifest = layouts.scan(url)["train"]
    (tmp_path / "s3fs.py").write_text("raise ImportError('not in a worker')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    Worker.stop()
    split = StreamedSplit(
        SampleDecoder(manifest, 8), threads=1, budget_bytes=2**20, cache_bytes=0,
        bad=BadSamples(manifest, len(manifest), None), device=torch.device("cpu"),
    )  # fmt: skip
    try:
        assert read_all(split, np.arange(len(manifest))).any(axis=(1, 2, 3)).all()
    finally:
        Worker.stop()
