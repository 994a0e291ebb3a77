"""Reading a checkpoint: verified against its commit record, and holding what the reader needs.

Any rank may call these functions; they block.
"""

import hashlib
import sys
from typing import Any

from lightship import storage, versions
from lightship.checkpoint.record import MAX_RECORD_BYTES, CheckpointDamaged, Commit, record_of
from lightship.checkpoint.resumable import check_resumable
from lightship.checkpoint.serialization import from_bytes
from lightship.errors import ConfigError
from lightship.host import read_limits, usable_memory_bytes

MODEL_KEYS = frozenset({"state_dict", "hyper_parameters"})
"""What a model is rebuilt from."""
RESUME_KEYS = MODEL_KEYS | {"loops", "optimizer_states", "lr_schedulers", "lightship"}
"""What training is resumed from."""


def load_ckpt_path(url: str, keys: frozenset[str], store_url: str = "") -> dict[str, Any]:
    """The checkpoint at the URL that `--ckpt_path` gives.

    Args:
        url: Of the checkpoint.
        keys: What it must hold.
        store_url: Folder whose checkpoints must have a commit record; empty: there is none.

    Raises:
        ConfigError: There is no such checkpoint, it is damaged, or it lacks a key.
    """
    where = f"--ckpt_path {storage.redact(url)}"
    try:
        checkpoint = read_checkpoint(url, bool(store_url) and url.startswith(f"{store_url}/"))
    except CheckpointDamaged as error:
        raise ConfigError(f"{where}: {error}") from None
    if missing := keys - set(checkpoint):
        raise ConfigError(
            f"{where} is not a lightship checkpoint (it lacks {min(missing)}); to train from its "
            "weights, pass it as --model.weights"
        )
    if keys >= RESUME_KEYS:
        check_resumable(checkpoint)
    return checkpoint


def read_checkpoint(url: str, must_be_committed: bool = False) -> dict[str, Any]:
    """A checkpoint on the CPU, verified if it has a commit record beside it.

    Raises:
        CheckpointDamaged: It is missing, does not match its record, or has none and must.
        ConfigError: Not a checkpoint, or one that needs code to be unpickled.
    """
    try:
        data = storage.read_small(record_of(url), MAX_RECORD_BYTES)
    except (storage.NotFound, storage.Denied):  # how S3 says it to who may not list
        if must_be_committed:
            raise CheckpointDamaged(f"{storage.redact(url)} was never committed") from None
        return read_verified(url, None)
    where = f"the record of {storage.redact(url)}"
    return read_verified(url, Commit.from_bytes(data, where))


def read_verified(url: str, commit: Commit | None) -> dict[str, Any]:
    """A checkpoint on the CPU, verified against `commit`, if that is given.

    Raises:
        CheckpointDamaged: It is missing or does not match.
        ConfigError: Not a checkpoint, or one that needs code to be unpickled.
        NewerVersion: A newer lightship wrote it.
    """
    name = f"checkpoint {storage.base_name(url)}"
    try:
        payload = read_payload(url, name, commit)
        if commit and hashlib.sha256(payload).hexdigest() != commit.sha256:
            payload = read_payload(url, name, commit)  # it may have happened on the way
    except storage.NotFound:
        raise CheckpointDamaged(f"{name} is gone") from None
    except storage.StorageTimeout as error:
        if type(error.__cause__).__name__ != "FlexibleChecksumError":
            raise
        # S3's client compares with a sum that the server keeps, and that will never agree.
        raise CheckpointDamaged(f"{name} does not match the storage's checksum") from None
    if commit and hashlib.sha256(payload).hexdigest() != commit.sha256:
        raise CheckpointDamaged(f"{name} does not match its sha256")
    checkpoint = from_bytes(payload, name)
    about = checkpoint.get("lightship")
    version = about.get("version") if isinstance(about, dict) else None
    versions.check("checkpoint", version, name)
    return checkpoint


def read_payload(url: str, name: str, commit: Commit | None = None) -> bytes:
    """The bytes of a checkpoint or a file of weights, which may come from anywhere.

    Args:
        url: Of the file.
        name: Names it in errors.
        commit: Its record, if it has one.

    Raises:
        CheckpointDamaged: It has another size than its record.
        ConfigError: It is larger than memory.
        NotFound: There is none, or it is no plain file.
    """
    memory = usable_memory_bytes(read_limits()) or sys.maxsize
    size = commit.size_bytes if commit else memory
    if size > memory:
        raise ConfigError(f"{name} has {size:,} bytes, and this machine {memory:,} of memory")
    try:
        payload = storage.read_small(url, size)
    except storage.TooLarge as error:
        raise (CheckpointDamaged if commit else ConfigError)(str(error)) from None
    if commit and len(payload) != size:
        raise CheckpointDamaged(f"{name} has {len(payload)} of {commit.size_bytes} bytes")
    return payload
