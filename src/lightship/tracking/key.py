"""The Weights & Biases API key, without importing wandb."""

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from lightship.redaction import learn_secret


def read_key_file() -> tuple[str, str]:
    """The key in the file that WANDB_API_KEY_FILE names, and why there is none.

    Without the variable both are empty, as they are if WANDB_API_KEY is set, which wins.
    """
    path = os.environ.get("WANDB_API_KEY_FILE")
    if not path or os.environ.get("WANDB_API_KEY"):
        return "", ""
    try:
        key = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        return "", f"WANDB_API_KEY_FILE {path} cannot be read ({why})"
    learn_secret(key)
    return key, "" if key else f"WANDB_API_KEY_FILE {path} is empty"


def find_key(server: str, given: str | None) -> tuple[str, str]:
    """The key for a W&B server, and why there is none (one of the two is empty).

    Args:
        server: URL of W&B's API.
        given: The key or the identity token file in wandb's settings, if any (`known_settings`).
    """
    if given:
        return given, ""
    host = urlsplit(server).netloc.rpartition("@")[2]
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except FileNotFoundError:
        found = None
    except (netrc.NetrcParseError, OSError) as error:
        return "", f"netrc cannot be read: {error}"
    if found:
        learn_secret(found[2])
    why = read_key_file()[1] or "WANDB_API_KEY is not set"
    missing = f"no key: {why} and netrc has no entry for {host}"
    return (found[2], "") if found else ("", missing)
