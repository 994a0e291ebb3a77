"""What an error of S3's client means."""

import contextlib
import os
import re
from pathlib import Path

import pytest
from botocore.exceptions import (
    ClientError,
    MetadataRetrievalError,
    NoCredentialsError,
    NoRegionError,
)

from lightship import storage
from lightship.errors import ConfigError
from lightship.storage import retry
from lightship.storage.errors import Denied, NoCredentials, NotFound, permanent
from lightship.storage.obstore_s3 import FirstTryFailed, ObstoreS3
from lightship.storage.retry import Deadline


def answered(operation: str, code: str, status: int) -> Exception:
    """As s3fs raises it: an error of Python's, for that of the client."""
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = PermissionError(code)
    error.__cause__ = ClientError(response, operation)  # type: ignore[arg-type]
    return error


@pytest.mark.parametrize(
    "error",
    [
        NoCredentialsError(),
        MetadataRetrievalError(error_msg="timed out"),
        answered("AssumeRoleWithWebIdentity", "InvalidIdentityToken", 400),
        answered("AssumeRole", "AccessDenied", 403),
    ],
)
def test_credentials_that_did_not_come(error: Exception) -> None:
    assert isinstance(permanent(error, "s3://b/x"), NoCredentials)


@pytest.mark.parametrize(
    ("code", "status"), [("AccessDenied", 403), ("SignatureDoesNotMatch", 403), ("x", 401)]
)
def test_credentials_that_are_refused(code: str, status: int) -> None:
    found = permanent(answered("GetObject", code, status), "s3://b/x")
    assert isinstance(found, Denied)
    assert not isinstance(found, NoCredentials)


def test_a_region_that_is_not_set() -> None:
    found = permanent(NoRegionError(), "s3://b/x")
    assert isinstance(found, ConfigError)
    assert str(found).startswith("s3://b/x: set AWS_DEFAULT_REGION (")


KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}


@pytest.mark.parametrize("client", ["auto", "s3fs"])
@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({"AWS_PROFILE": "unknown"}, "unknown"),
        ({"AWS_CONFIG_FILE": "damaged", "AWS_PROFILE": "x"}, "damaged"),
        ({"AWS_ENDPOINT_URL": "minio:9000"}, "AWS_ENDPOINT_URL is 'minio:9000'; it must be http://"),
        ({"AWS_ENDPOINT_URL_S3": "http://minio:port"}, "AWS_ENDPOINT_URL_S3 is 'http://minio:port'"),
        ({"AWS_ENDPOINT_URL": "https://"}, "AWS_ENDPOINT_URL is 'https://'"),
        ({"AWS_CONFIG_FILE": "endpoint"}, "Invalid endpoint: minio:9000"),
        ({"AWS_DEFAULT_REGION": "eu west"}, "eu west"),
        ({"AWS_CA_BUNDLE": "/none.pem"}, "AWS_CA_BUNDLE is '/none.pem'"),
        ({"AWS_SECRET_ACCESS_KEY": "key\n"}, "AWS_SECRET_ACCESS_KEY contains a line break"),
        ({"AWS_ACCESS_KEY_ID": " key"}, "AWS_ACCESS_KEY_ID contains a line break, or begins"),
        ({"AWS_CONFIG_FILE": "none", "AWS_PROFILE": "x"}, "local file that its client needs"),
        ({"AWS_CONFIG_FILE": "text", "AWS_PROFILE": "x"}, "credential_process of ~/.aws/config"),
        ({"AWS_CONFIG_FILE": "sso", "AWS_PROFILE": "x"}, "SSOTokenLoadError"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_used_is_named_at_once(
    variables: dict[str, str], shown: str, client: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Not when the deadline has passed, by a Rust panic, or by a traceback."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    Path("damaged").write_text("[default\nregion=1\n")
    Path("endpoint").write_text("[default]\nendpoint_url = minio:9000\n")
    Path("none").write_text("[profile x]\ncredential_process = /none\n")
    Path("text").write_text("[profile x]\ncredential_process = echo key\n")
    Path("sso").write_text(
        "[profile x]\nsso_session = y\nsso_account_id = 1\nsso_role_name = r\nregion = eu-west-1\n"
        "[sso-session y]\nsso_region = eu-west-1\nsso_start_url = https://y.awsapps.com/start\n"
    )
    for name, value in (variables if "AWS_PROFILE" in variables else KEYS | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LIGHTSHIP_S3_CLIENT", client)
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "20")
    with pytest.raises(ConfigError, match=re.escape(shown)):
        storage.read_range("s3://bucket/x", 0, 1)


@pytest.mark.parametrize("url", ["https://host:port/x", "http:///x", "https://[::1/x"])
def test_a_web_address_that_cannot_be_one_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(url)):
        storage.read_range(url, 0, 1)


def test_credentials_are_looked_for_until_shortly_before_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not only until a pause would be too long: they may come within it."""
    now = 100.0
    monkeypatch.setattr(retry.time, "monotonic", lambda: now)
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: high)
    deadline = Deadline("s3://b/x", is_first=True)
    with contextlib.suppress(NoCredentials):
        while now < 110:
            now += deadline.pause_s(NoCredentialsError())
    assert 104 <= now < 105


def test_a_missing_token_is_no_missing_image() -> None:
    """The token of a cluster's identity is read when credentials are renewed: in any request."""
    missing = FileNotFoundError(2, "No such file or directory", "/var/run/secrets/token")
    found = permanent(missing, "s3://b/x.jpg")
    assert isinstance(found, ConfigError)
    assert "/var/run/secrets/token" in str(found)
    assert isinstance(permanent(FileNotFoundError("b/x.jpg"), "s3://b/x.jpg"), NotFound)
    local = FileNotFoundError(2, "No such file or directory", "/images/x.jpg")
    assert isinstance(permanent(local, "/images/x.jpg"), NotFound)
    remote = FileNotFoundError(2, "No such file or directory", "/images/x.jpg")
    assert isinstance(permanent(remote, "sftp://host/images/x.jpg"), NotFound)


def test_a_panic_is_left_to_s3fs(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As of pyo3."""

    client = ObstoreS3(lambda: None)

    def panics(path: str) -> None:
        raise PanicException

    monkeypatch.setattr(client, "_place", panics)
    with pytest.raises(FirstTryFailed, match="PanicException"):
        client.read(Deadline("s3://b/x"), "b/x", 0, 1)
