"""Two ranks that do the same piece of work, without a command around it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed import distributed_c10d

from lightship.distributed import comm
from lightship.errors import LightshipError
from tests.dist.conftest import BOUND_S
from tests.support.fork_server import FORK_SERVER
from tests.support.s3 import free_ports

TIMEOUT_S = 2.0


def run_rank(rank: int, port: int, work: Callable[[], Any], connection: Connection) -> None:
    """Send `work`'s result, or (class, exit code, text) of its error."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    comm.init_process_group(60, on_cuda=False)
    comm.barrier()  # the first collective connects, on a busy machine slowly
    timeout = timedelta(seconds=TIMEOUT_S)
    distributed_c10d._set_pg_timeout(timeout, distributed_c10d._get_default_group())
    try:
        connection.send(work())
    except BaseException as error:
        end = comm.translate_error(error)
        code = end.exit_code if isinstance(end, LightshipError) else None
        connection.send((type(end).__name__, code, str(end)))
    os._exit(0)


@contextmanager
def two_ranks(work: Callable[[], Any]) -> Iterator[list[tuple[Any, Connection]]]:
    port, ranks = free_ports(1)[0], []
    for rank in range(2):
        here, there = FORK_SERVER.Pipe()
        process = FORK_SERVER.Process(target=run_rank, args=(rank, port, work, there), daemon=True)
        process.start()
        there.close()
        ranks.append((process, here))
    try:
        yield ranks
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()


def received(connection: Connection) -> Any:
    assert connection.poll(BOUND_S), "no answer"
    return connection.recv()


def results(work: Callable[[], Any]) -> list[Any]:
    with two_ranks(work) as ranks:
        return [received(connection) for _, connection in ranks]
