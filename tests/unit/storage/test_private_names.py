"""Names of fsspec that are not part of its interface: each is used in one place."""

from fsspec.implementations.ftp import FTPFileSystem

from lightship.storage.fsspec_backend import url_options


def test_get_kwargs_from_urls_is_there() -> None:
    assert hasattr(FTPFileSystem, "_get_kwargs_from_urls"), "see fsspec_backend.url_options"
    assert url_options(FTPFileSystem, "ftp://me@host/x")["host"] == "host"


def test_without_it_urls_set_nothing() -> None:
    assert url_options(object, "ftp://me@host/x") == {}
