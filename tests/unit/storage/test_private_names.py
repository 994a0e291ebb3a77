"""Names of fsspec and botocore that are no part of their interface: each is used in one place."""

from botocore.session import get_session
from fsspec.implementations.ftp import FTPFileSystem

from lightship.storage.fsspec_backend import url_options


def test_get_kwargs_from_urls_is_there() -> None:
    assert hasattr(FTPFileSystem, "_get_kwargs_from_urls"), "see fsspec_backend.url_options"
    assert url_options(FTPFileSystem, "ftp://me@host/x")["host"] == "host"


def test_without_it_urls_set_nothing() -> None:
    assert url_options(object, "ftp://me@host/x") == {}


def test_a_clients_credentials_can_be_seen() -> None:
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    client = get_session().create_client("s3", **keys)
    assert client._request_signer._credentials is not None, "see s3_clients._with_credentials"
