"""Whether Weights & Biases accepts this run."""

import base64
import json
import os
import re
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from lightship.config import RunConfig
from lightship.console import log
from lightship.doctor.checks import Finding, skipped
from lightship.doctor.context import Context
from lightship.redaction import redact
from lightship.tracking.key import find_key
from lightship.tracking.settings import read_settings
from lightship.tracking.start import prepare_tracking, run_id, start_tracking

_REQUEST_S = 5.0
_MIN_KEY_LENGTH = 40
_NEW_KEY = "create a key at the server's /authorize page and set WANDB_API_KEY to it"
_REACH = (
    "allow HTTPS to it (HTTPS_PROXY, NetworkPolicy), correct WANDB_BASE_URL, or set --run.tracking "
    "offline"
)
_WRITABLE = (
    "set WANDB_DIR, WANDB_CACHE_DIR, WANDB_DATA_DIR and TMPDIR to writable folders, or set "
    "--run.tracking none"
)
_OFFLINE = "the run is kept offline, to upload with wandb sync"


def wandb(context: Context) -> Finding:
    """Whether the key is valid, and a run starts as a fit starts it. Blocks for seconds.

    Raises:
        ConfigError: wandb is not installed, or one of its settings is invalid.
    """
    run = context.config.run
    key = _check_key(run.tracking)
    if run.tracking == "none" or os.environ.get("WANDB_MODE") == "disabled" or key.status == "fail":
        return key
    if problems := _start_and_finish(run):
        return Finding("warn", problems, "the run continues without tracking", _WRITABLE)
    return key


def _start_and_finish(run: RunConfig) -> str:
    """Start and finish an offline run in a temporary folder; its problems, or ''."""
    with (
        tempfile.TemporaryDirectory(prefix="lightship-") as folder,
        log.captured("lightship.tracking") as warnings,
    ):
        name = redact(str(run.output))
        preparation = prepare_tracking("offline", Path(folder))
        tracker = start_tracking(preparation, run.project, run_id(), name, {})
        if tracker:
            tracker.log_metrics({"doctor": 1.0}, 1)
            tracker.finish(0)
    return "; ".join(warnings)


def _check_key(mode: str) -> Finding:
    """Whether there is a key, in W&B's format, that the server accepts. Blocks for seconds."""
    if mode != "auto":
        return skipped(f"--run.tracking {mode}: no key needed")
    settings = read_settings(mode)
    if settings.mode in ("disabled", "offline", "dryrun"):
        return skipped(f"WANDB_MODE is {settings.mode}: no key needed")
    key, missing = find_key(settings.base_url, settings.api_key or settings.identity_token_file)
    if missing:
        fix = f"{_NEW_KEY}, or set --run.tracking offline or none"
        return Finding("warn", missing, _OFFLINE, fix)
    if key == settings.identity_token_file:
        return Finding("ok", f"an identity token in {key}", "wandb exchanges it for a key")
    if problem := _malformed(key):
        return Finding("fail", problem, _OFFLINE, _NEW_KEY)
    server = settings.base_url
    try:
        owner = _owner(server, key)
    except (OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
            found = f"{server} rejects the key ({error.code})"
            return Finding("fail", found, _OFFLINE, _NEW_KEY)
        return Finding("warn", f"{server} does not answer as W&B does ({error})", _OFFLINE, _REACH)
    if owner is None:
        return Finding("fail", f"{server} knows no user with this key", _OFFLINE, _NEW_KEY)
    return Finding("ok", f"{server} accepts the key of {owner}", "the run is online")


def _malformed(key: str) -> str:
    """Why wandb does not take a key (the rules of wandb 0.31's wbauth), or ''."""
    secret = key.partition("-")[2] or key
    if re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+", key):  # a JWT
        return ""
    if not re.fullmatch(r"[\w-]+", secret):
        return "the key has characters other than letters, digits and _ (a newline, a quote?)"
    if len(secret) < _MIN_KEY_LENGTH:
        return f"the key has {len(secret)} characters; W&B's have {_MIN_KEY_LENGTH} or more"
    return ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would send the key to another host."""

    def redirect_request(self, *args: object) -> None:
        """None: the answer is an HTTPError of its status."""


def _owner(server: str, key: str) -> str | None:
    """The user whose key it is, by W&B's server. Raises OSError or ValueError."""
    login = base64.b64encode(f"api:{key}".encode()).decode()
    request = urllib.request.Request(
        f"{server.rstrip('/')}/graphql",
        data=json.dumps({"query": "query { viewer { username } }"}).encode(),
        headers={"Authorization": f"Basic {login}", "Content-Type": "application/json"},
    )
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=_REQUEST_S) as reply:
        answer = json.loads(reply.read(2**16))
    viewer = ((answer or {}).get("data") or {}).get("viewer")
    return viewer and str(viewer.get("username"))
