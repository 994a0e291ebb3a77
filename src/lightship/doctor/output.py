"""Whether a run can be kept at --run.output, and what is there already."""

import os
import time
import uuid

from lightship import storage
from lightship.doctor.checks import Finding, skipped
from lightship.doctor.context import Context
from lightship.errors import ConfigError, LightshipError, TimeoutExpired

_FIX = (
    "give the pod's identity, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, permission to read, "
    "write and delete there; a local path must be on a writable volume; or give another "
    "--run.output"
)
_SKEWED = "S3 rejects requests signed 15 minutes apart; timestamps in logs mislead"
_SET_CLOCK = (
    "set this machine's clock (chronyc makestep, timedatectl set-ntp true; a virtual machine that "
    "slept: restart its time service)"
)


def writable(context: Context) -> Finding:
    """Write, read back and delete a small file at the output. Blocks."""
    url = str(context.config.run.output)
    try:
        storage.check_writable(_probe_folder(url))
    except ConfigError as error:
        return Finding("fail", str(error), "fit exits before its first step", _FIX)
    return Finding("ok", f"{url}: write, read and delete OK", "checkpoints can be saved there")


def existing_run(context: Context) -> Finding:
    """What a fit finds at the output. Reads only; blocks.

    Raises:
        ConfigError: A run that a fit with these settings refuses, or none to resume.
    """
    from lightship.run.folder import RunFolder  # imports torch, which `writable` does not wait for

    folder = RunFolder(context.config)
    try:
        is_complete, commits = folder.completed() is not None, folder.checkpoints.commits()
    except (storage.Denied, TimeoutExpired) as error:
        return skipped(f"cannot be read, see output ({error})")
    if is_complete:
        means = "fit trains no more and exits with code 0"
        fix = "give another --run.output to train from scratch"
        return Finding("warn", f"{folder.url} holds a complete run", means, fix)
    if commits:
        found = f"a run at step {commits[-1].step}"
        folder.refuse_another_run(found)
        return Finding("ok", f"{found} ({len(commits)} checkpoints)", "fit resumes from it")
    if context.config.run.resume == "must":
        raise ConfigError("--run.resume must: no checkpoint to resume from")
    return Finding("ok", "no checkpoint", "fit starts from scratch")


def clock(context: Context) -> Finding:
    """This machine's clock against the storage's, by a file's modification time. Blocks."""
    folder = _probe_folder(str(context.config.run.output))
    probe_url = storage.join(folder, f".{uuid.uuid4().hex}.probe")
    try:
        before_s = time.time()
        storage.write_bytes(probe_url, b"time?")
        after_s = time.time()
        stored_s = storage.modified_s(probe_url)
        storage.remove(probe_url)
    except LightshipError as error:
        if "TimeTooSkewed" in str(error):
            found = "the storage rejects requests: more than 15 minutes apart"
            return Finding("fail", found, _SKEWED, _SET_CLOCK)
        return skipped(f"no file can be kept there, see output ({error})")
    # Stores count whole seconds.
    apart_s = max(stored_s - after_s, before_s - stored_s - 1, 0.0)
    if apart_s < 5:
        return Finding("ok", "less than 5 s apart", "logs and signatures match the storage's clock")
    way = "ahead of" if stored_s > after_s else "behind"
    found = f"the storage is {apart_s:.0f} s {way} this machine"
    return Finding("fail" if apart_s > 300 else "warn", found, _SKEWED, _SET_CLOCK)


def _probe_folder(url: str) -> str:
    """The output, or the closest folder above it that exists: the doctor leaves none behind."""
    if storage.is_remote(url):
        return url
    path = storage.local_path(url).absolute()
    return str(next(each for each in (path, *path.parents) if os.path.lexists(each)))
