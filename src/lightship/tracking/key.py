"""The Weights & Biases API key, without importing wandb."""

import netrc
import os
from urllib.parse import urlsplit


def find_key(server: str, given: str | None) -> tuple[str, str]:
    """The key for a W&B server, and why there is none (one of the two is empty).

    Args:
        server: URL of W&B's API.
        given: The key or the identity token file in wandb's settings, if any.
    """
    if given:
        return given, ""
    host = urlsplit(server).netloc
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except FileNotFoundError:
        found = None
    except (netrc.NetrcParseError, OSError) as error:
        return "", f"netrc cannot be read: {error}"
    missing = f"no key: WANDB_API_KEY is not set and netrc has no entry for {host}"
    return (found[2], "") if found else ("", missing)
