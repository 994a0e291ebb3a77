"""Whether Weights & Biases will take this run."""

import base64
import json
import os
import re
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from lightship.config import RunConfig
from lightship.doctor.check import Finding, skipped
from lightship.tracking.key import find_key
from lightship.tracking.settings import read_settings
from lightship.tracking.start import run_id, start_tracking

_ASK_S = 5.0
_LEAST_LETTERS = 40
_JWT = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+")
_NEW_KEY = "make a key at the server's /authorize page and set WANDB_API_KEY to it"
_WRITABLE = (
    "set WANDB_DIR, WANDB_CACHE_DIR, WANDB_DATA_DIR and TMPDIR to folders that can be written, or "
    "say --run.tracking none"
)
_OFFLINE = "the run is kept offline, to be uploaded with wandb sync"


def wandb(run: RunConfig) -> Finding:
    """Whether a run can be started as a fit starts it, and as `wandb_key`. Blocks for seconds.

    Args:
        run: The run section.
    """
    key = wandb_key(run.tracking)
    is_off = run.tracking == "none" or os.environ.get("WANDB_MODE") == "disabled"
    problem = "" if is_off or key.status == "fail" else _trial(run)
    if problem:
        means = "the run goes on without tracking"
        return Finding("warn", problem, means, _WRITABLE)
    return key


def _trial(run: RunConfig) -> str:
    """Start and end a run that is kept nowhere; what went wrong, or ''."""
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="lightship-") as folder:
        scratch_path, name = Path(folder), str(run.output)
        tracker = start_tracking(
            "offline", run.project, run_id(), name, {}, scratch_path, note=lines.append
        )
        if tracker:
            tracker.log_metrics({"doctor": 1.0}, 1)
            tracker.finish(0)
    wrong = [line for line in lines if not line.startswith("W&B offline")]
    return "; ".join(wrong)


def wandb_key(mode: str) -> Finding:
    """Whether there is a key, it looks like one, and the server takes it. Blocks for seconds.

    Args:
        mode: `--run.tracking`.
    """
    if mode != "auto":
        return skipped(f"--run.tracking {mode}: no key is needed")
    known = read_settings(mode)
    if known.mode in ("disabled", "offline", "dryrun"):
        return skipped(f"WANDB_MODE is {known.mode}: no key is needed")
    key, missing = find_key(known.base_url, known.api_key or known.identity_token_file)
    if missing:
        return Finding(
            "warn",
            missing,
            _OFFLINE,
            f"{_NEW_KEY}, or say --run.tracking offline or none",
        )
    if key == known.identity_token_file:
        return Finding("ok", f"an identity's token in {key}", "wandb exchanges it for a key")
    if problem := _wrong_form(key):
        return Finding("fail", f"the key {problem}", _OFFLINE, _NEW_KEY)
    return _ask(known.base_url, key)


def _wrong_form(key: str) -> str:
    """What is wrong with a key, by the rules of wandb 0.31 (wbauth); '' if nothing."""
    secret = key.partition("-")[2] or key
    if _JWT.fullmatch(key):
        return ""
    if not re.fullmatch(r"[\w-]+", secret):
        return "has characters other than letters, digits and _ (a newline, a quote?)"
    if len(secret) < _LEAST_LETTERS:
        return f"has {len(secret)} characters; W&B's have {_LEAST_LETTERS} or more"
    return ""


def _ask(server: str, key: str) -> Finding:
    """Have the server say whose key it is."""
    login = base64.b64encode(f"api:{key}".encode()).decode()
    request = urllib.request.Request(
        f"{server.rstrip('/')}/graphql",
        data=json.dumps({"query": "query { viewer { username } }"}).encode(),
        headers={"Authorization": f"Basic {login}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=_ASK_S) as reply:
            answer = json.loads(reply.read(2**16))
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            return _silent(server, f"status {error.code}")
        return Finding("fail", f"{server} refuses the key ({error.code})", _OFFLINE, _NEW_KEY)
    except (OSError, ValueError) as error:
        return _silent(server, str(error))
    viewer = ((answer or {}).get("data") or {}).get("viewer")
    if not viewer:
        return Finding("fail", f"{server} knows nobody with this key", _OFFLINE, _NEW_KEY)
    return Finding("ok", f"{server} takes the key of {viewer.get('username')}", "the run is online")


def _silent(server: str, why: str) -> Finding:
    return Finding(
        "warn",
        f"{server} does not answer as W&B does ({why})",
        _OFFLINE,
        "let HTTPS to it through (HTTPS_PROXY, NetworkPolicy), correct WANDB_BASE_URL, or say "
        "--run.tracking offline",
    )
