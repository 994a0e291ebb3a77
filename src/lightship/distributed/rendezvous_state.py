"""The state of torch's rendezvous as signed JSON (private names of torch elastic: `STATE_FIELDS`).

Torch keeps it as a pickle in its store, and unpickles whatever anyone who reaches the store's port
has put in its place.
"""

import hashlib
import hmac
import json
import os
import pickle
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.rendezvous import RendezvousStateError, dynamic_rendezvous
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend, Token

from lightship.errors import ConfigError

SECRET, SECRET_FILE = "LIGHTSHIP_RENDEZVOUS_SECRET", "LIGHTSHIP_RENDEZVOUS_SECRET_FILE"
STATE_FIELDS = {
    "round", "complete", "deadline", "closed", "participants", "wait_list", "redundancy_list",
    "last_heartbeats",
}  # fmt: skip
"""Attributes of torch's _RendezvousState."""
_MIN_LETTERS = 16
_MAX_BYTES = 2**22
_SIGNATURE_LETTERS = 64


class StateRefused(ConfigError, RendezvousStateError):
    """What the store holds was not written by a node of this run (exit 78)."""


def run_secret() -> str:
    """The secret that the nodes of a run share; "" without one. Children do not inherit it.

    Raises:
        ConfigError: It is too short, or its file cannot be read.
    """
    given, path = os.environ.pop(SECRET, ""), os.environ.get(SECRET_FILE, "")
    if not given and path:
        try:
            given = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{SECRET_FILE} {path} cannot be read: {error}") from None
    if (given or path) and len(given) < _MIN_LETTERS:
        name = SECRET if given and not path else SECRET_FILE
        raise ConfigError(
            f"{name} has {len(given)} characters; it must have {_MIN_LETTERS} or more"
        )
    return given


class SignedState(RendezvousBackend):
    """A backend of torch whose state nobody without the run's secret can write.

    Without a secret anybody can, but it is still no more than JSON of known fields.

    Args:
        backend: Keeps the bytes.
        run_id: Of the rendezvous; a state of another run is refused.
        secret: Of the run.
        place: Where the nodes meet, for errors.

    Raises:
        ConfigError: This version of torch has another state.
    """

    def __init__(self, backend: RendezvousBackend, run_id: str, secret: str, place: str) -> None:
        if (found := set(vars(dynamic_rendezvous._RendezvousState()))) != STATE_FIELDS:
            raise ConfigError(
                f"torch {torch.__version__} cannot be used on several nodes: its rendezvous state "
                f"has other fields ({', '.join(sorted(found ^ STATE_FIELDS))})"
            )
        self._backend, self._place = backend, place
        self._key = hashlib.sha256(f"{run_id}\n{secret}".encode()).digest()

    @property
    def name(self) -> str:
        """Of the backend."""
        return self._backend.name

    def get_state(self) -> tuple[bytes, Token] | None:
        """See RendezvousBackend; raises StateRefused."""
        found = self._backend.get_state()
        return found and (self._opened(found[0]), found[1])

    def set_state(
        self, state: bytes, token: Token | None = None
    ) -> tuple[bytes, Token, bool] | None:
        """See RendezvousBackend; raises StateRefused."""
        found = self._backend.set_state(self._sealed(state), token)
        return found and (self._opened(found[0]), found[1], found[2])

    def _sealed(self, state: bytes) -> bytes:
        """Signature and JSON of what torch has pickled in this process."""
        fields = vars(pickle.loads(state))
        text = json.dumps({name: _plain(fields[name]) for name in sorted(fields)}).encode()
        return self._signature(text) + text

    def _opened(self, sealed: bytes) -> bytes:
        """A pickle, for torch, of a state made here of the fields that were signed."""
        signature, text = sealed[:_SIGNATURE_LETTERS], sealed[_SIGNATURE_LETTERS:]
        if len(text) > _MAX_BYTES or not hmac.compare_digest(signature, self._signature(text)):
            raise StateRefused(
                f"the rendezvous at {self._place} holds a state that is not signed with this "
                f"node's secret: {SECRET} differs between the nodes, or a stranger has written to "
                "that port"
            )
        try:
            return pickle.dumps(_state(json.loads(text)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise StateRefused(
                f"the rendezvous at {self._place} holds no valid state ({error!r:.100}): a "
                "stranger has written to that port"
            ) from None

    def _signature(self, text: bytes) -> bytes:
        return hmac.new(self._key, text, hashlib.sha256).hexdigest().encode()


def _plain(value: Any) -> Any:
    """A field in JSON's types: a node is [address, pid, local id], a time its ISO text."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dynamic_rendezvous._NodeDesc):
        return [value.addr, value.pid, value.local_id]
    if isinstance(value, dict):
        return [[_plain(key), _plain(item)] for key, item in sorted(value.items())]
    return [_plain(each) for each in sorted(value)] if isinstance(value, set) else value


def _state(fields: dict[str, Any]) -> Any:
    """Torch's state of plain fields. Raises ValueError, TypeError or KeyError for others."""
    state = dynamic_rendezvous._RendezvousState()
    state.round = _of(int, fields["round"])
    state.complete, state.closed = _of(bool, fields["complete"]), _of(bool, fields["closed"])
    state.deadline = None if fields["deadline"] is None else _time(fields["deadline"])
    state.participants = {_node(node): _of(int, rank) for node, rank in fields["participants"]}
    state.wait_list = {_node(each) for each in fields["wait_list"]}
    state.redundancy_list = {_node(each) for each in fields["redundancy_list"]}
    state.last_heartbeats = {_node(node): _time(at) for node, at in fields["last_heartbeats"]}
    return state


def _node(parts: Any) -> Any:
    address, pid, local_id = parts
    return dynamic_rendezvous._NodeDesc(_of(str, address), _of(int, pid), _of(int, local_id))


def _time(text: Any) -> datetime:
    return datetime.fromisoformat(_of(str, text))


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r:.40} is no {kind.__name__}")
    return value
