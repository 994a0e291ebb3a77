"""What an error of S3's client means."""

import pytest
from botocore.exceptions import (
    ClientError,
    MetadataRetrievalError,
    NoCredentialsError,
    NoRegionError,
)

from lightship.errors import ConfigError
from lightship.storage.errors import Denied, NoCredentials, permanent


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
