"""Whether a run can be kept at --run.output, and what is there already."""

import os
import time
import uuid

from lightship import storage
from lightship.config import Config
from lightship.doctor.check import Finding, skipped
from lightship.errors import ConfigError, LightshipError, TimeoutExpired
from lightship.storage import Denied

_FIX = (
    "give the pod's identity, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the rights to read, "
    "write and delete there; a local path must be on a writable volume; or give another "
    "--run.output"
)


def writable(url: str) -> Finding:
    """Write, read back and delete a small file at the output. Blocks."""
    told = storage.redact(url)
    try:
        storage.check_writable(probe_folder(url))
    except ConfigError as error:
        return Finding("fail", str(error), "a fit ends before its first step", _FIX)
    return Finding("ok", f"{told}: written, read back and deleted", "checkpoints can be kept there")


def run_there(config: Config) -> Finding:
    """What a fit finds at the output: nothing, a run to go on with, or one not to be touched.

    Reads only; blocks.
    """
    from lightship.run.folder import RunFolder

    said: list[str] = []
    output = RunFolder(config, said.append)
    try:
        is_done, commits = output.is_done(), output.checkpoints().commits()
    except (Denied, TimeoutExpired) as error:
        return skipped(f"it cannot be read, see output ({error})")
    if is_done:
        return Finding(
            "warn",
            f"{storage.redact(output.url)} holds a finished run",
            "the same command again says so and ends with 0",
            "give another --run.output to train anew",
        )
    if commits:
        output.refuse_another_run(f"a run at step {commits[-1].step}")
        told = f"a run at step {commits[-1].step} ({len(commits)} checkpoints)"
        return Finding("ok", told, "a fit goes on from there")
    if config.run.resume == "must":
        raise ConfigError("--run.resume must: no checkpoint is there")
    return Finding("ok", "no checkpoint is there", "a fit begins anew")


def clock(url: str) -> Finding:
    """This machine's clock against that of the output's storage, by a file's time. Blocks."""
    probe_url = storage.join(probe_folder(url), f".{uuid.uuid4().hex}.probe")
    try:
        before_s = time.time()
        storage.write_bytes(probe_url, b"what is the time?")
        after_s = time.time()
        there_s = storage.modified_s(probe_url)
        storage.remove(probe_url)
    except LightshipError as error:
        if "TimeTooSkewed" in str(error):
            return _skewed("more than 15 minutes apart, says the storage")
        return skipped(f"no file can be kept there, see output ({error})")
    # Stores count whole seconds.
    apart_s = max(there_s - after_s, before_s - there_s - 1, 0.0)
    way = "ahead of" if there_s > after_s else "behind"
    if apart_s < 5:
        return Finding(
            "ok", "less than 5 s apart", "logs and signed requests agree with the storage"
        )
    return _skewed(f"the storage is {apart_s:.0f} s {way} this machine", is_far=apart_s > 300)


def _skewed(told: str, is_far: bool = True) -> Finding:
    return Finding(
        "fail" if is_far else "warn",
        told,
        "S3 refuses requests signed 15 minutes apart; times in logs mislead",
        "set this machine's clock (chronyc makestep, timedatectl set-ntp true; a virtual machine "
        "that slept: restart its time service)",
    )


def probe_folder(url: str) -> str:
    """Where to write a trial file: at the output, or the folder that it will be made in.

    So that a doctor leaves no folders where no run has been.
    """
    if storage.is_remote(url):
        return url
    path = storage.local_path(url).absolute()
    return str(next(each for each in (path, *path.parents) if os.path.lexists(each)))
