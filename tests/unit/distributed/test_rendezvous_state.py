"""The state of the rendezvous: only what a node of this run has signed comes through."""

import base64
import json
import pickle
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

from lightship.distributed import rendezvous_state
from lightship.distributed.rendezvous_state import SignedState, StateRefused, run_secret
from lightship.errors import ConfigError
from tests.unit.distributed.test_messages import Bomb

SECRET = "a secret of this run"
KEY = "torch.rendezvous.run"


def backend(store: dist.Store, secret: str = SECRET, run_id: str = "run") -> SignedState:
    return SignedState(C10dRendezvousBackend(store, "run"), run_id, secret, "node-0:29500")


def full_state() -> Any:
    state, now = dynamic_rendezvous._RendezvousState(), datetime(2026, 1, 2, 3, 4, 5, 678, UTC)
    nodes = [dynamic_rendezvous._NodeDesc(f"node-{i}", 100 + i, i) for i in range(3)]
    state.round, state.complete, state.closed, state.deadline = 3, True, False, now
    state.participants, state.wait_list = {nodes[1]: 0, nodes[0]: 1}, {nodes[2]}
    state.redundancy_list = {nodes[2]}
    state.last_heartbeats = dict.fromkeys(nodes, now)
    return state


def fields(pickled: bytes) -> dict[str, Any]:
    return vars(pickle.loads(pickled))


@pytest.mark.parametrize("secret", [SECRET, ""])
def test_nodes_with_the_same_secret_share_a_state(secret: str) -> None:
    store = dist.HashStore()
    one, other = backend(store, secret), backend(store, secret)
    assert one.get_state() is None
    for state in (dynamic_rendezvous._RendezvousState(), full_state()):
        before = one.get_state()
        written = one.set_state(pickle.dumps(state), before and before[1])
        assert written is not None
        assert written[2] is True
        read = other.get_state()
        assert read is not None
        assert fields(read[0]) == vars(state) == fields(written[0])
    outdated = other.set_state(pickle.dumps(dynamic_rendezvous._RendezvousState()), b"no token")
    assert outdated is not None
    assert outdated[2] is False
    assert fields(outdated[0]) == vars(full_state())


def test_the_store_holds_no_pickle() -> None:
    store = dist.HashStore()
    backend(store).set_state(pickle.dumps(full_state()))
    held = base64.b64decode(store.get(KEY))
    assert json.loads(held[64:])["participants"][0][0] == ["node-0", 100, 0]


@pytest.mark.parametrize("secret", [SECRET, ""])
def test_a_pickle_in_the_store_is_refused_unread(tmp_path: Path, secret: str) -> None:
    store = dist.HashStore()
    node = backend(store, secret)
    bomb = pickle.dumps(Bomb(tmp_path / "mark"))
    for bad in (bomb, b"0" * 64 + bomb, node._signature(bomb) + bomb, b"", b"0" * 64):
        store.set(KEY, base64.b64encode(bad).decode())
        with pytest.raises(StateRefused, match="node-0:29500 holds"):
            node.get_state()
        with pytest.raises(StateRefused):
            node.set_state(pickle.dumps(full_state()), b"another token")
    assert not (tmp_path / "mark").exists()


def test_another_secret_or_run_is_refused() -> None:
    store = dist.HashStore()
    backend(store).set_state(pickle.dumps(full_state()))
    for other in (backend(store, "b secret of this run"), backend(store, run_id="another")):
        with pytest.raises(StateRefused, match="LIGHTSHIP_RENDEZVOUS_SECRET differs"):
            other.get_state()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("round", "1"), ("round", True), ("complete", 1), ("closed", None), ("deadline", 5),
        ("deadline", "tomorrow"), ("participants", [["node-0", 1]]), ("participants", 3),
        ("participants", [[["a", 1, 0], "0"]]), ("wait_list", [["a", "1", 0]]),
        ("wait_list", [["a", 1]]), ("redundancy_list", {"a": 1}), ("last_heartbeats", [[1]]),
    ],
)  # fmt: skip
def test_fields_of_other_types_are_refused(name: str, value: Any) -> None:
    """By a stranger where no secret is set: the signature is then no hindrance."""
    store = dist.HashStore()
    node = backend(store, "")
    plain = json.loads(node._sealed(pickle.dumps(full_state()))[64:])
    text = json.dumps({**plain, name: value}).encode()
    store.set(KEY, base64.b64encode(node._signature(text) + text).decode())
    with pytest.raises(StateRefused, match="no valid state"):
        node.get_state()


def test_torch_has_the_fields_that_are_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set(vars(dynamic_rendezvous._RendezvousState()))
    assert found == rendezvous_state.STATE_FIELDS
    monkeypatch.setattr(rendezvous_state, "STATE_FIELDS", {*found, "a_new_one"})
    with pytest.raises(ConfigError, match=r"other fields \(a_new_one\)"):
        backend(dist.HashStore())


def test_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (rendezvous_state.SECRET, rendezvous_state.SECRET_FILE):
        monkeypatch.delenv(name, raising=False)
    assert run_secret() == ""
    path = tmp_path / "secret"
    monkeypatch.setenv(rendezvous_state.SECRET_FILE, str(path))
    with pytest.raises(ConfigError, match=r"SECRET_FILE .* cannot be read"):
        run_secret()
    for text in ("", "short\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"SECRET_FILE has . characters; it must have 16"):
            run_secret()
    path.write_text(SECRET + "\n")
    assert run_secret() == SECRET
    monkeypatch.setenv(rendezvous_state.SECRET, "the other secret")
    assert run_secret() == "the other secret"
    assert run_secret() == SECRET, "what the agent has read, its children do not see"
