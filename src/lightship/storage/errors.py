"""Errors of a storage: which are permanent, and what is then raised."""

import errno
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from lightship.errors import ConfigError, DataError, LightshipError, TimeoutExpired
from lightship.redaction import excerpt
from lightship.storage.urls import base_name, is_remote, redact


class NotFound(LightshipError, FileNotFoundError):
    """No such file, folder or bucket (exit 65)."""

    exit_name = "data"


class Refused(ConfigError):
    """The storage refuses the request, maybe for this file alone (exit 78)."""


class Denied(ConfigError):
    """The storage denies access, maybe to this file alone (exit 78)."""


class BadCredentials(Denied):
    """Credentials are missing or not accepted, for any file (exit 78)."""


class NoCredentials(BadCredentials):
    """No service or file has given credentials, which it may do later (exit 78)."""


class StorageTimeout(TimeoutExpired):
    """Transient errors outlasted the deadline (exit 74)."""


class TooLarge(ConfigError):
    """A file of a run is larger than any that lightship writes (exit 78)."""


class WrongLength(OSError):
    """The number of bytes differs from what the storage itself reports. Transient."""


def is_file_error(error: BaseException) -> bool:
    """Whether only this file may be at fault, so that `on_error skip` may skip it."""
    if isinstance(error, (Denied, Refused)):
        return not isinstance(error, BadCredentials)
    return isinstance(error, LightshipError) and error.exit_name == DataError.exit_name


def http_answer(error: BaseException | None) -> tuple[int, str]:
    """(HTTP status, error code) behind an exception; (0, "") if no server answered."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return status, str(response.get("Error", {}).get("Code", ""))
        for status in (getattr(error, "status", 0), getattr(response, "status_code", 0)):
            if isinstance(status, int) and status:
                return status, ""
        error = error.__cause__
    return 0, ""


@dataclass(frozen=True)
class _Facts:
    error: Exception
    status: int
    code: str
    url: str

    def is_a(self, *kinds: type[Exception] | str) -> bool:
        """Whether it is one of these types, or of a type with one of these names."""
        types = tuple(kind for kind in kinds if not isinstance(kind, str))
        return isinstance(self.error, types) or type(self.error).__name__ in kinds

    @property
    def is_of_own_file(self) -> bool:
        """Whether a client of `url` could not open a file of this machine, as one of credentials.

        The operating system names the file; a client, of what is remote, none or the one it is of.
        """
        path = self.error.filename if isinstance(self.error, OSError) else None
        if not isinstance(path, str) or not os.path.isabs(path) or not is_remote(self.url):
            return False
        return self.is_a(FileNotFoundError, PermissionError, NotADirectoryError) and (
            base_name(path) != base_name(self.url)
        )

    def is_errno(self, *numbers: int) -> bool:
        return isinstance(self.error, OSError) and self.error.errno in numbers


_NETWORK_PACKAGES = {
    "botocore", "aiobotocore", "aiohttp", "requests", "urllib3", "httpx", "httpcore", "gcsfs",
    "google", "azure", "huggingface_hub",
}  # fmt: skip
_TRANSIENT_CODES = {  # although their status is a 4xx
    "RequestTimeout", "RequestTimeoutException", "IncompleteBody", "BadDigest", "OperationAborted",
    "Throttling", "ThrottlingException", "RequestLimitExceeded", "XAmzContentSHA256Mismatch",
}  # fmt: skip
_CREDENTIAL_CODES = {
    "AuthFailure", "AuthorizationHeaderMalformed", "ExpiredToken", "ExpiredTokenException",
    "InvalidAccessKeyId", "InvalidClientTokenId", "InvalidSecurity", "InvalidToken",
    "NotSignedUp", "RequestExpired", "RequestTimeTooSkewed", "SignatureDoesNotMatch",
    "TokenRefreshRequired", "UnrecognizedClientException",
}  # fmt: skip
_LOGGED_OUT = {
    "LoginInsufficientPermissions", "LoginRefreshRequired", "LoginTokenLoadError",
    "NoAuthTokenError", "RefreshWithMFAUnsupportedError", "SSOTokenLoadError",
    "UnauthorizedSSOTokenError",
}  # fmt: skip
_BAD_SETTING = re.compile(
    r"(Config|Invalid|Unknown|Unsupported)\w+|ProfileNotFound|InfiniteLoop\w+"
)
"""Errors of botocore that no server's answer and no failed connection has caused."""
_NO_CREDENTIALS = {"NoCredentialsError", "CredentialRetrievalError", "MetadataRetrievalError"}
_S3_HINT = "; credentials come from the environment (AWS_*; FSSPEC_S3_ANON=true for none)"
_DENIED = "{place}: access denied ({reason}){hint}"

_UNUSABLE_URL = (
    "InvalidURL", "InvalidUrlClientError", "InvalidUrlRedirectClientError", "NonHttpUrlClientError",
    "TooManyRedirects", "UnsupportedProtocol",
)  # fmt: skip

# The first row that matches holds: (matches, what is raised at once, its text). None: transient,
# tried again; so is NoCredentials, for a while. An error of no row is a defect and raised as it is.
_TABLE: list[tuple[Callable[[_Facts], bool], type[LightshipError] | None, str]] = [
    (lambda e: e.is_of_own_file, ConfigError,
     "{place}: a local file that its client needs cannot be used ({reason})"),
    (lambda e: e.is_a(FileNotFoundError, NotADirectoryError) or e.status in (404, 410),
     NotFound, "{place} was not found ({reason})"),
    (lambda e: e.is_a(IsADirectoryError), NotFound, "{place} is a folder; a file was expected"),
    (lambda e: _is_without_credentials(e.error), NoCredentials, _DENIED),
    (lambda e: e.code in _TRANSIENT_CODES or e.status in (408, 429) or e.status >= 500, None, ""),
    (lambda e: e.code in _CREDENTIAL_CODES or e.status in (401, 407)
     or "Credential" in type(e.error).__name__ or e.is_a(*_LOGGED_OUT), BadCredentials, _DENIED),
    (lambda e: e.is_a(PermissionError) or e.status == 403, Denied, _DENIED),
    (lambda e: e.is_a("ClientConnectorCertificateError"),
     ConfigError, "{place}: its TLS certificate is not accepted ({reason}); name the file of an "
     "authority of your own in SSL_CERT_FILE"),
    (lambda e: 400 <= e.status < 500
     or e.is_a("ParamValidationError", *_UNUSABLE_URL)
     or _is_value_error(e.error, "Invalid.* ?URL"),
     Refused, "{place}: request refused by the storage ({reason})"),
    (lambda e: _is_bad_setting(e.error), ConfigError,
     "{place}: a setting of AWS is not valid ({reason}); they come from AWS_* and ~/.aws/config"),
    (lambda e: e.is_a("NoRegionError"), ConfigError, "{place}: set AWS_DEFAULT_REGION ({reason})"),
    (lambda e: e.is_a(zipfile.BadZipFile, zlib.error, EOFError),
     DataError, "{place}: the archive is damaged ({reason})"),
    (lambda e: e.is_a(NotImplementedError),
     ConfigError, "{place}: not supported by this kind of storage ({reason})"),
    (lambda e: e.is_errno(errno.ELOOP, errno.ENAMETOOLONG, errno.EILSEQ, errno.ENXIO, errno.ENODEV),
     NotFound, "{place} cannot be opened ({reason})"),
    (lambda e: e.is_a(UnicodeError) or (e.is_a(ValueError) and "null byte" in str(e.error)),
     NotFound, "{place} is not a valid file name ({reason})"),
    (lambda e: e.is_errno(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EINVAL, errno.EFBIG,
                          errno.ENOSYS, errno.ENOTEMPTY, errno.EEXIST),
     ConfigError, "{place}: {reason}"),
    (lambda e: e.is_a(OSError) or _is_network(e.error), None, ""),
]  # fmt: skip


def permanent(error: Exception, url: str) -> Exception | None:
    """What to raise for a permanent error; None for a transient one."""
    if isinstance(error, LightshipError):
        return error
    # fsspec's http reports any failure as "not found"; the cause is more precise.
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, LightshipError):
        return cause
    if isinstance(error, FileNotFoundError) and _is_network(cause):
        assert isinstance(cause, Exception)
        error = cause
    facts = _Facts(error, *http_answer(error), url)
    for matches, kind, text in _TABLE:
        if matches(facts):
            place = redact(url)
            hint = _S3_HINT if "s3" in place[:10] else ""
            return kind(text.format(place=place, reason=reason(error), hint=hint)) if kind else None
    return error


def reason(error: BaseException) -> str:
    """Kind and text of an error, redacted."""
    text = excerpt(str(error))
    kind = http_answer(error)[1] or type(error).__name__
    return f"{kind}: {text}" if text else kind


def _is_without_credentials(error: BaseException | None) -> bool:
    """Whether credentials were not found, or an identity service did not give them."""
    while error is not None:
        operation = str(getattr(error, "operation_name", ""))
        if type(error).__name__ in _NO_CREDENTIALS or operation.startswith("AssumeRole"):
            return True
        error = error.__cause__
    return False


def _is_bad_setting(error: Exception) -> bool:
    """Whether botocore cannot use a setting: a profile, an endpoint, a region."""
    kind = type(error)
    if kind.__module__ == "botocore.exceptions":
        return _BAD_SETTING.fullmatch(kind.__name__) is not None
    return _is_value_error(error, "Invalid endpoint")


def _is_value_error(error: Exception, pattern: str) -> bool:
    return type(error) is ValueError and re.match(pattern, str(error)) is not None


def _is_network(error: BaseException | None) -> bool:
    return type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES
