"""Secrets are found by their place, by their names and by their values; places stay apart."""

import base64
import json
from typing import Any
from urllib.parse import quote

import pytest

from lightship import redaction
from lightship.redaction import canonical, excerpt, is_redacted, learn, learn_secret, redact
from tests.support.bounded_child import call_each

S = "PLANTED7secret"
"""What must never be left of any text below."""


@pytest.fixture(autouse=True)
def nothing_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_learned", {})


IN_URLS = [
    f"https://user:{S}@host/x.zip",
    f"https://{S}@host/x.zip",
    f"https://user:a@{S}@host/x.zip",
    f"https://user:a/{S}@host/x.zip",
    f"https://user:a:{S}@host/x.zip",
    f"https://user:a?{S}@host/x.zip",
    f"https://user:a#{S}@host/x.zip",
    f"https://user:%2F{S}@[::1]:8080/x.zip",
    f"s3://KEYID:a/{S}@bucket/x.zip",
    f"ftp://user:{S}@host:21/x.zip",
    f"zip://::https://user:{S}@host/x.zip",
    f"zip::https://user:a/{S}@host/x.zip",
    f"zip://a@b:c.png::https://host/x.zip?sig={S}",
    f"https://host/x.zip#access_token={S}",
    *(
        f"https://host/x.zip?{name}={S}&id=7"
        for name in (
            "X-Amz-Signature", "X-Amz-Credential", "X-Amz-Security-Token", "X-Goog-Signature",
            "sig", "Signature", "AWSAccessKeyId", "token", "access_token", "key", "api_key",
            "password", "x-oss-signature", "q-signature", "hmac", "Policy", "auth", "unheard-of",
        )
    ),
    f"https://host/x.zip?{S}",
    f"abfs://container@account.dfs.core.windows.net/x.zip?sv=2022&se=2026-01-01&sp=r&sig={S}",
]  # fmt: skip


@pytest.mark.parametrize("url", IN_URLS)
def test_a_secret_in_a_url_is_left_out_wherever_the_url_stands(url: str) -> None:
    for text in (url, f"cannot read '{url}': refused", f"see ({url}, {url}) and {url}\n"):
        assert S not in redact(text)
        assert redact(redact(text)) == redact(text)
    assert canonical(url) == redact(url)
    assert is_redacted(redact(url))
    assert any(place in redact(url) for place in ("host", "bucket", "account", "::1"))


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a@b/c?.png", "https://host:8080/img@2x/a.png", "https://[::1]:80/a@b.png",
        "github://org:repo@main/x", "hf://datasets/org/name@main/x", "sftp://me@host/x",
        "abfs://container@account.dfs.core.windows.net/x", "/data/a@b:c/x?sig=1", "zip://a:b@c::x.zip",
        "https://host/x.zip?id=7&version=a", "data::v2", "s3://b/***.png",
        "file:///a/b:c@d", "digits", "",
    ],
)  # fmt: skip
def test_a_url_without_a_secret_stays_and_can_be_used(url: str) -> None:
    assert canonical(url) == url
    assert not is_redacted(url)


def test_a_new_signature_is_the_same_place_and_another_place_another() -> None:
    def signed(path: str, query: str, signature: str, user: str = "u:p") -> str:
        return (
            f"https://{user}@host/{path}?{query}X-Amz-Date={signature}&X-Amz-Signature={signature}"
        )

    one = canonical(signed("x.zip", "id=1&", "aaaaaaaaaaaa"))
    assert one == canonical(signed("x.zip", "id=1&", "bbbbbbbbbbbb", "u:other"))
    queries = ["", "id=2&", "unheard-of=cats&", "unheard-of=dogs&"]
    others = {canonical(signed("x.zip", query, "a")) for query in queries}
    assert len({one, canonical(signed("y.zip", "id=1&", "a")), *others}) == 6


@pytest.mark.parametrize("raw", ["pa ss/w@rd'\"7", "<p&a>ss-word", "päss-wörd/7", "tab\tinside7"])
def test_a_learned_secret_is_left_out_in_every_form(raw: str) -> None:
    url = f"https://user:{raw}@host/x.zip"
    learn(f"--data.root={url}")
    forms = [
        raw, quote(raw), quote(raw, safe=""), repr(raw), f"cannot parse {url}", f"{url}/a.png",
        "Basic " + base64.b64encode(f"user:{raw}".encode()).decode(),
    ]  # fmt: skip
    for form in forms:
        shown = redact(f"before {form} after")
        assert raw not in shown
        assert repr(raw)[1:-1] not in shown
        assert form.strip("'") not in shown
        assert shown.startswith("before")
        assert shown.endswith("after")
    assert canonical(url) == "https://***@host/x.zip"


@pytest.mark.parametrize(
    "value",
    [
        ["https://u:pw <S>@h/x.zip"], {"data": {"root": "https://u:pw <S>@h/x.zip"}},
        {"https://u:pw <S>@h/x.zip": 1}, "['https://u:pw <S>@h/x', 'b']",
        "url: 'https://u:pw <S>@h/x'", 'root: "https://u:pw"<S>@h/x.zip"',
        "{a: https://u:pw <S>@h/x}",
    ],
)  # fmt: skip
def test_a_url_is_found_within_a_value(value: Any) -> None:
    value = json.loads(json.dumps(value).replace("<S>", S))
    learn(value)
    assert S not in redact(f"wrong: {value}")
    assert S not in redact(f"pw {S}")


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD", "AZURE_SAS",
     "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "SIGNING_KEY"],
)  # fmt: skip
def test_a_secret_of_the_environment_is_left_out(name: str, monkeypatch) -> None:
    text = "login swordfish-7/+= failed"
    assert redact(text) == text
    monkeypatch.setenv(name, "swordfish-7/+=")
    assert redact(text) == "login *** failed"
    assert "swordfish" not in redact(quote("swordfish-7/+=", safe=""))


def test_variables_that_hold_no_secret_do_not_blacken_the_log(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token")
    monkeypatch.setenv("GOOGLE_CREDENTIALS", str(tmp_path))
    monkeypatch.setenv("SOME_TOKEN", "disabled")
    monkeypatch.setenv("API_KEY", "abc")
    text = f"reading /var/run/token in {tmp_path}: disabled, abc"
    assert redact(text) == text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTPS_PROXY", f"http://user:{S}@proxy:3128"),
        ("http_proxy", f"user:{S}@proxy:3128"),
        ("WANDB_BASE_URL", f"user:{S}@host"),
        ("FSSPEC_S3", json.dumps({"key": f"id{S}", "client_kwargs": {"secret": S}})),
        ("AZURE_STORAGE_CONNECTION_STRING", f"AccountName=me;AccountKey={S}==;EndpointSuffix=x"),
    ],
)
def test_a_secret_within_a_variable_is_left_out(name: str, value: str, monkeypatch) -> None:
    monkeypatch.setenv(name, value)
    assert S not in redact(f"refused for {value}, that is {S}, at the proxy")
    assert redact("as me at x: host, AccountName, proxy:3128") == (
        "as me at x: host, AccountName, proxy:3128"
    )


def test_a_secret_read_from_a_file_is_left_out() -> None:
    learn_secret(S)
    assert redact(f"key {S}!") == "key ***!"


@pytest.mark.parametrize(
    "text",
    [
        "AKIAABCDEFGHIJKLMNOP", f"hf_{S}", f"ghp_{S}abcdefgh", f"Authorization: Bearer {S}",
        f"{{'X-Api-Key': '{S}'}}", f'"aws_secret_access_key": "{S}"', f"password={S}",
        f"Cookie: {S}", f"x-amz-security-token: {S}", f"AccountKey={S};EndpointSuffix=x",
        f"eyJhbGciOiJIUzI1NiJ9.{S}.{S}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{S}\n-----END RSA PRIVATE KEY-----",
    ],
)  # fmt: skip
def test_a_secret_is_known_by_what_stands_beside_it(text: str) -> None:
    assert S not in redact(f"x {text} y")
    assert "AKIAABC" not in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "size mismatch for cls_token: copying a param with shape [1, 197, 768]",
        "training litcnn (0.1 M parameters) on s3://bucket/a b/c.jpg: 3 images, 2 classes",
        "net.token_embedding.weight, net.key.bias, 'keys': 3; the key data.root",
        "KeyError: 'state_dict'", "step 10/20  loss 0.5000", "the class names are password, secret",
    ],
)  # fmt: skip
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


LONG_BYTES = 300_000
REPEATED = [
    "a-", "x-", "-", "token-", "token ", "'a", "eyJ", "-eyJaaaaaaaa", "eyJaaaaaaaa.", "a://", "a.",
    "a+", "://", ":", "a://u:", "a://x?a&", "b://b@", "h/:", "::a", "?", "cookie: ", "token = ,",
    "-----BEGIN ", "-----END ", "é",
]  # fmt: skip


def clean(text: str) -> None:
    redact(text)
    is_redacted(text)


def test_the_time_for_a_text_that_is_made_to_be_slow_is_linear() -> None:
    """Of quadratic time one alone takes an hour."""
    texts = {
        start + unit: (start + unit * (LONG_BYTES // len(unit)),)
        for unit in REPEATED
        for start in ("", "a://")
    }
    call_each(clean, texts, max_mib=200, max_s=60)


@pytest.mark.parametrize("before", ["", "a-", "...", "2", "_", "my-", "'", "x.", "(", "(é"])
def test_a_secret_is_found_behind_other_characters(before: str) -> None:
    secrets = [f"https://user:{S}@host/x", f"my-token={S}", f"'token': '{S}'"]
    if not before[-1:].isalnum() and before != "_":
        secrets += [f"x-my-key: {S}", f"eyJhbGciOiJI.{S}.{S}"]
    for secret in secrets:
        assert S not in redact(f"at {before}{secret} now")
    assert redact(f"at {before}https://host/x") == f"at {before}https://host/x"
    assert redact(f"at?my-token={S}") == "at?my-token=***"


def test_an_excerpt_of_a_long_text_ends_in_no_half_of_a_secret() -> None:
    learn_secret(S)
    for shift in range(1, len(S) + 4):
        long = "token=" + "a" * (2**16 - 7 - shift)  # *** in the excerpt: what follows is seen
        assert excerpt(f"{long} {S} {'b ' * 99}") in ("token=***", "token=*** ***")
    assert excerpt("a" * 2**20) == "..."
    assert excerpt("one\n two") == "one two"
    assert excerpt("a " * 2**20) == ("a " * 150)
