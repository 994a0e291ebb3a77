"""Where a store listens."""

import logging
import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from lightship.distributed import store
from lightship.errors import TimeoutExpired
from tests.support.s3 import free_ports

TIMEOUT = timedelta(seconds=20)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost"])
def test_a_store_listens_at_the_address_of_its_name(host: str) -> None:
    (port,) = free_ports(1)
    served = store.serve(host, port, TIMEOUT, "")
    dist.TCPStore(host, port, is_master=False, timeout=TIMEOUT).set("key", "value")
    assert served.get("key") == b"value"
    elsewhere = "127.0.0.2" if host != "127.0.0.2" else "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((elsewhere, port), 5)


def test_a_taken_port_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TimeoutExpired) as error:
            store.serve("127.0.0.1", port, TIMEOUT, "set another")
    text = f"cannot listen at 127.0.0.1:{port} (Address already in use); set another"
    assert (str(error.value), error.value.exit_code) == (text, 74)


@pytest.mark.parametrize(
    "addresses",
    [
        ["10.1.2.3"],  # a service or a port mapping in front of this node
        ["127.0.1.1"],  # Debian's own name: the others resolve it to something else
        ["::1"],
        ["10.1.2.3", "127.0.0.9"],
        [],
    ],
)
def test_a_name_that_is_not_this_nodes_alone(
    addresses: list[str], monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(store, "addresses_of", lambda host: addresses)
    with caplog.at_level(logging.WARNING, "lightship"), store.listen("node-0", 0) as listener:
        assert listener.getsockname()[0] in ("::", "0.0.0.0")
    assert "node-0 is not an address of this node: listening on all interfaces" in caplog.text


def test_a_name_of_this_node(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(store, "addresses_of", lambda host: ["10.1.2.3", "192.168.7.8", "fd00::8"])
    monkeypatch.setattr(store, "is_local", lambda address: address != "10.1.2.3")
    assert store._address_here("node-0") == "192.168.7.8"
    assert not caplog.text
