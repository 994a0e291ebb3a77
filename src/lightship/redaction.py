"""Secrets, kept out of what a run prints and writes: `redact`, called where text leaves a process.

Sinks: the standard streams (console/streams.py), log lines and events (console/screen.py), error
files of workers, config.yaml, the manifest, W&B, the report and the JSON files. A secret is found
in two ways: by its place in a URL or beside its name, wherever the text comes from; and by its
value, anywhere and in any encoding, if it came in by the command line, a config file (`learn`) or
the environment.

Texts come from anywhere and may be long, so the time is linear: a pattern that begins with a run of
characters begins where the run does, and looks through it once.

The redacted form of a URL is canonical: a new signature or password gives the same form, another
place another one. It is what a run's settings are compared and named by.
"""

import base64
import contextlib
import functools
import hashlib
import html
import json
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus

MARK = "***"
_URL = re.compile(
    r"(?<![\w+.-])((?:(?![A-Za-z])[\w+.-])*+)"
    r"([A-Za-z][\w+.-]*+://[^\s'\"<>`\x00-\x1f]+(?<![).,:;!\]}]))"
)
"""(what stands before it without a space, such as dots; the URL)."""
_IS_URL = re.compile(r"(?:[\w+.-]+::)?[A-Za-z][\w+.-]*://")
_NEXT_LINK = re.compile(r"::(?=[A-Za-z][\w+.-]*://)")
_PORT = re.compile(r"[^/?#@]*:\d{1,5}(?:[/?#]|$)")
_USER_AND_PASSWORD = re.compile(r"[^/?#@:]*:[^@]*@")
_WITHOUT_USER = {
    "github", "git", "hf", "zip", "tar", "libarchive", "file", "local", "memory", "gs", "gcs",
}  # fmt: skip
"""Schemes in which `@` is a part of the path, as a revision is (github://org:repo@main/path)."""
_SECRET_NAME = re.compile(
    r"(?i)(x-(amz|goog|ms|oss|cos|obs|tos|bce)-.*|q-.*|.*(token|secret|signature|passw|credential|"
    r"auth|api[-_]?key|access[-_]?key|access[-_]?id|session|jwt).*|(.*[-_.])?(sig|sign|key|pass|pwd|"
    r"hmac|hash|code|sas|ticket|nonce|policy|key-pair-id)|user(name)?|expir(es|y|ation)|exp|e|h|ts|"
    r"timestamp|s[eprstvd]|ss|sr|sip|spr|srt|sdd|scid|sk[a-z]{1,4}|[as]u?oid|rsc[cdelt]|response-.*)"
)
"""Parameters that sign a URL or belong to a signature: a new one for the same place differs."""
_PLAIN_NAME = re.compile(
    r"(?i)(ids?|v|version(-?id)?|generation|snapshot|rev(ision)?|ref|branch|file(name)?|name|path|"
    r"dir|folder|data-?set|split|config|format|type|raw|dl|download|export|page|part|offset|limit|"
    r"size|lang|prefix|alt)"
)
"""Parameters that name a place, and are kept. Of all others a check sum is kept."""
_IS_NO_SECRET = re.compile(
    r"(?i)x-\w+-(date|expires|algorithm|signedheaders)|expir.*|exp|e|h|ts|timestamp|s[eprstvd]|"
    r"response-.*|user(name)?"
)
"""Of these parameters only the URL is cleaned: their values are ordinary words and dates."""
_TOKEN = re.compile(
    r"(?<![\w-])(?=[\w-]*?\beyJ[\w-]{8})[\w-]++\.[\w-]+\.[\w-]*|"
    r"\b(?:A(?:KIA|SIA)[A-Z0-9]{16}|hf_\w{8,}|gh[opsru]_\w{16,}|github_pat_\w{16,}|"
    r"glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}|sk-[\w-]{16,}|ya29\.[\w-]{16,}|wandb_v\d+_\w{16,})|"
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
)
_SETTING = re.compile(
    r"(?i)((?<![\w-])(?:(?<![?&])|\w*-)[\w-]*(?:secret|passw(?:or)?d|pwd|token|signature|credentials?|"
    r"authorization|api[-_]?key|(?:access|account|private|secret)[-_]?key(?:[-_]?id)?)"
    r"(?:['\"]\s*:\s*|\s*=\s*)['\"]?|\b(?:proxy-)?authorization:\s*|\b(?:set-)?cookie:\s*|"
    r"(?<![\w-])(?=[\w-]*?\bx-)[\w-]*(?:token|key|signature):\s*|\b(?:secret|passw(?:or)?d|api[-_]?key):\s*)"
    r"(?:(?:bearer|basic|token)\s+)?[^\s,;&'\"]+"
)
"""A secret beside its name: `password=...`, `"token": "..."`, `Authorization: Bearer ...`."""
_SECRET_VARIABLE = re.compile(
    r"(?i)(.*[-_])?(\w*secret\w*|\w*(account|access|private|shared)_?key|sig|\w*password|\w*passwd|\w*token|\w*api_?key|key|key_?id|pass|pwd|"
    r"credentials?|auth|sas|sas_token|connection_string|dsn)"
)
_NO_SECRETS = {"PWD", "OLDPWD"}
_WORDS = {
    "default", "disabled", "enabled", "optional", "password", "required", "secret", "offline",
    "online", "streaming", "resident", "digits", "images", "predict", "validate", "lightship",
}  # fmt: skip
_MIN_LETTERS = 6
"""A shorter value is not looked for outside of its URL: it may be a part of any word."""
_MIN_UNNAMED = 16
"""Likewise, for a parameter that may be no secret."""
_EXCERPT, _MAX_TEXT = 300, 2**16
_learned: dict[str, str] = {}
"""What is replaced anywhere in a text, and by what."""


def learn(*values: Any) -> None:
    """Have `redact` remove the secrets of these values from any text.

    Args:
        values: Of flags and settings, also lists and dictionaries of them, or lines of a file: each
            text whole, so that a URL with raw spaces, quotes, `@` or `/` in its password is
            understood.
    """
    for value in values:
        if isinstance(value, dict):
            learn(*value, *value.values())
        elif isinstance(value, list):
            learn(*value)
        for url in _urls_in(value) if isinstance(value, str) else ():
            if (form := _redacted_chain(url)) != url:
                _learned[url] = form
                for secret in _secrets_of(url):
                    _learned.update(dict.fromkeys(_encodings(secret), MARK))


def _urls_in(value: str) -> Iterator[str]:
    """What may be meant as a URL: the whole value, or each up to a quotation mark or the end."""
    value = value.partition("=")[2] if value.startswith("--") else value
    if _IS_URL.match(value):
        yield value
        return
    for found in re.finditer(rf"(['\"]?)({_IS_URL.pattern})", value):
        mark, rest = found[1], value[found.start(2) :].rstrip()
        yield rest
        if mark in rest[1:]:
            yield from (rest.partition(mark)[0], rest.rpartition(mark)[0]) if mark else ()


def learn_secret(secret: str) -> None:
    """Have `redact` remove a secret that was read from a file, such as netrc, from any text."""
    _learned.update(dict.fromkeys(_encodings(secret), MARK))


def redact(text: str) -> str:
    """`text` without secrets. Keeps a text without any as it is, and is idempotent."""
    if not text:
        return text
    for value in sorted(_learned, key=len, reverse=True):  # whole URLs before their parts
        text = text.replace(value, _learned[value])
    if "://" in text:
        text = _URL.sub(lambda found: found[1] + _redacted_chain(found[2]), text)
    for value in _of_environment(tuple(os.environ.items())):
        text = text.replace(value, MARK)
    return _SETTING.sub(rf"\1{MARK}", _TOKEN.sub(MARK, text))


def excerpt(text: str) -> str:
    """The first 300 characters of `text` in one line, without secrets; of any error, however long.

    Only the beginning is looked at, up to the end of a word: half a secret would not be known.
    """
    words = " ".join(text[:_MAX_TEXT].split())
    if len(text) > _MAX_TEXT:
        words = words.rpartition(" ")[0] or "..."
    return redact(words)[:_EXCERPT]


def canonical(value: str) -> str:
    """The form of a setting that is stored and compared: `redact`, of the value as a whole."""
    learn(value)
    return redact(value)


def is_redacted(text: str | None) -> bool:
    """Whether a setting has lost its secrets, so that it can be compared but not used."""
    _, _, rest = (text or "").partition("://")
    return rest != "" and re.search(r"(?:^|://)\*\*\*@|[?&=]\*\*\*", rest) is not None


def _redacted_chain(url: str) -> str:
    """The canonical form of a URL, or of a chain of them (zip://a.png::https://...)."""
    links = _NEXT_LINK.split(url)
    return "::".join(_redacted_link(link) if "://" in link else link for link in links)


def _redacted_link(url: str) -> str:
    scheme, user, place, query = _split(url)
    shown = scheme + (f"{MARK}@" if _is_secret_user(scheme, user) else f"{user}@" if user else "")
    shown += place
    if query is None:
        return shown
    kept, is_signed = [], False
    for parameter in re.split("[&;]", query):
        name, is_named, _ = parameter.partition("=")
        if parameter == MARK or (is_named and _SECRET_NAME.fullmatch(name)):
            is_signed = True
        elif MARK in parameter or _PLAIN_NAME.fullmatch(name) or len(parameter) < _MIN_LETTERS:
            kept.append(parameter)
        else:
            digest = hashlib.sha256(parameter.encode("utf-8", "surrogatepass")).hexdigest()[:6]
            kept.append(f"{name}={MARK}{digest}" if is_named else f"{MARK}{digest}")
    return f"{shown}?{'&'.join([*kept, *[MARK] * is_signed])}"


def _split(url: str) -> tuple[str, str, str, str | None]:
    """(scheme with ://, user and password or "", host and path, query and fragment or None).

    A password may hold a raw `@`, `/`, `:`, `?` or `#`, as people write it.
    """
    scheme, _, rest = url.partition("://")
    name = scheme.lower()
    scheme += "://"
    user = ""
    if name not in _WITHOUT_USER and not rest.startswith("["):
        if _USER_AND_PASSWORD.match(rest) and not _PORT.match(rest):
            first = rest.index("@")
            query = re.search(r"[?#]", rest[first:])
            at = rest.rindex("@", 0, first + query.start() if query else len(rest))
            user, rest = rest[:at], rest[at + 1 :]
        elif "@" in (first_part := re.split(r"[/?#]", rest, maxsplit=1)[0]):
            at = first_part.rindex("@")
            user, rest = rest[:at], rest[at + 1 :]
    is_web = "http" in name or "dav" in name
    if mark := re.search(r"[?#]" if is_web else r"\?(?=[^?]*=)", rest):
        return scheme, user, rest[: mark.start()], rest[mark.end() :].replace("#", "&")
    return scheme, user, rest, None


def _is_secret_user(scheme: str, user: str) -> bool:
    """Whether what stands before the host is secret: a password, or on the web a token."""
    return ":" in user or (bool(user) and ("http" in scheme.lower() or "dav" in scheme.lower()))


def _secrets_of(url: str) -> Iterator[str]:
    """The values that `_redacted_chain` leaves out."""
    for link in _NEXT_LINK.split(url):
        scheme, user, _, query = _split(link)
        if _is_secret_user(scheme, user):
            yield user
            password = user.partition(":")[2]
            yield password
            yield from re.split("[@/:?#'\"]", password)  # errors of parsers quote a part
            yield base64.b64encode(unquote(user).encode()).decode()  # HTTP's basic authorization
        for parameter in re.split("[&;]", query or ""):
            name, is_named, value = parameter.partition("=")
            if is_named and _IS_NO_SECRET.fullmatch(name):
                continue
            if _SECRET_NAME.fullmatch(name) or len(parameter) >= _MIN_UNNAMED:
                yield "" if _PLAIN_NAME.fullmatch(name) else value if is_named else name


def _encodings(secret: str) -> set[str]:
    """The forms in which a secret may appear, if it is long enough to be told from other text."""
    plain = unquote(secret)
    forms = {secret, plain, unquote_plus(secret), secret.rstrip("=")}
    forms |= {form(plain) for form in (quote, quote_plus, html.escape)}
    forms |= {quote(plain, safe=""), json.dumps(plain)[1:-1], repr(plain)[1:-1]}
    return {form for form in forms if _is_telling(form)}


def _is_telling(value: str) -> bool:
    return len(value) >= _MIN_LETTERS and value.lower() not in _WORDS and MARK not in value


@functools.lru_cache(maxsize=8)
def _of_environment(variables: tuple[tuple[str, str], ...]) -> list[str]:
    """Values of environment variables that are secrets, longest first."""
    secrets = {secret for name, value in variables for secret in _of_variable(name, value)}
    return sorted({form for each in secrets for form in _encodings(each)}, key=len, reverse=True)


def _of_variable(name: str, value: Any) -> Iterator[str]:
    """The secrets of a variable, or of a field of one (JSON as in FSSPEC_S3, or `name=value;`)."""
    if isinstance(value, dict):
        for key, field in value.items():
            yield from _of_variable(str(key), field)
    elif not isinstance(value, str) or name in _NO_SECRETS:
        return
    elif _IS_URL.match(value):
        yield from _secrets_of(value)
    elif "@" in value and re.search(r"(?i)(url|uri|proxy|endpoint|host)$", name):
        yield from _secrets_of(f"http://{value}")
    elif value.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            yield from _of_variable(name, json.loads(value))
    elif _SECRET_VARIABLE.fullmatch(name) and not _is_path(value):
        yield value
        for part in value.split(";") if ";" in value else ():
            key, _, field = part.partition("=")
            yield from _of_variable(key, field)


def _is_path(value: str) -> bool:
    return value.startswith(("/", "~")) and os.path.lexists(os.path.expanduser(value))
