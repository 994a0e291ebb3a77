"""Whether SIGTERM comes from a probe of k8s/base/job.yaml that has seen no step for too long.

Such a stop is a failure, which the Job counts; any other is none.
"""

import os
import time

VARIABLE = "LIGHTSHIP_HEARTBEAT_FILE"
MAX_SILENCE_S = 1800.0
"""The liveness probe's bound on the age of the file."""
MAX_START_S = 3600.0
"""The startup probe's bound on the time until there is a file."""
_SLACK_S = 60.0  # between the starts of the container and of this process
_began_s = time.monotonic()


def why_expired() -> str:
    """Why the probes have ended this process; "" if they had no reason to. Never blocks."""
    path = os.environ.get(VARIABLE)
    if not path:
        return ""
    try:
        is_silent = time.time() - os.stat(path).st_mtime > MAX_SILENCE_S
    except OSError:
        is_late = time.monotonic() - _began_s > MAX_START_S - _SLACK_S
        return "no first step within an hour: stopped by the startup probe" if is_late else ""
    return "no step for half an hour: stopped by the liveness probe" if is_silent else ""
