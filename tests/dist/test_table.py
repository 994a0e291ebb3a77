"""The table of samples: each node has a copy of its own, which all its processes map."""

import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lightship.data import table_cache
from lightship.data.manifest_table import write_table
from lightship.data.sources import layouts
from lightship.data.table_copies import copy_to_node
from lightship.distributed import comm
from tests.dist.conftest import Job
from tests.dist.two_ranks import results
from tests.support.images import little_set, put


def copies(folder: Path) -> list[str]:
    return [path.name for path in (folder / "tables").iterdir()]


def on_two_nodes(run: Job, *flags: str, workers: str = "1", **options: str) -> list[list[str]]:
    """What lies in each node's cache at the end."""
    agents = [
        run.start_node(
            *flags, LIGHTSHIP_CACHE=str(run.folder / f"cache-{node}"), PET_NPROC_PER_NODE=workers,
            **options,
        )
        for node in range(2)
    ]  # fmt: skip
    for agent in agents:
        assert agent.wait() == 0, agent.said
    return [copies(run.folder / f"cache-{node}") for node in range(2)]


def test_two_nodes_of_two_processes_share_what_rank_0_has_listed(job: Callable[..., Job]) -> None:
    """Each has a copy of the run's table; no process but rank 0 has listed the images."""
    run = job("--trainer.max_epochs=1")
    first, second = on_two_nodes(run, workers="2")
    assert first == second
    assert len(first) == 1
    [kept] = (run.output / "data").glob("manifest-*.table")
    for node in range(2):
        copy = run.folder / f"cache-{node}" / "tables" / first[0]
        assert copy.read_bytes() == kept.read_bytes()


def test_without_a_run_to_keep_it_in_the_table_is_sent_in_pieces(job: Callable[..., Job]) -> None:
    """Predictions on two nodes are those of one process."""
    run = job("--trainer.max_epochs=1")
    assert run.start("--trainer.devices=1").wait() == 0
    tables = {}
    for nodes in (1, 2):
        table = run.folder / f"table-{nodes}.csv"
        flags = [f"--predictions={table}", "--data.root=" + run.flags[0].partition("=")[2]]
        predict = {"command": "predict", "hook": "plain"}
        if nodes == 1:
            agent = run.start(*flags, "--trainer.devices=1", **predict)
            assert agent.wait() == 0, agent.said
        else:
            first, second = on_two_nodes(run, *flags, **predict)
            assert len(first) == 1
            assert first == second
        tables[nodes] = table.read_text()
    assert tables[1] == tables[2]


def received_where_little_can_be_written(folder: Path, size_bytes: int) -> None:
    """As on two nodes, of which the second can write files of `size_bytes` only."""
    rank = os.environ["RANK"]
    os.environ |= {"LIGHTSHIP_CACHE": str(folder / rank), "LOCAL_RANK": "0"}
    manifests = layouts.scan(str(folder / "images"))
    table = comm.broadcast_from_rank_0(
        lambda: table_cache.store(lambda path: write_table(path, manifests))
    )
    if rank == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))
    copy_to_node(table)


def test_a_node_without_room_ends_all_with_its_text(tmp_path: Path) -> None:
    put(str(tmp_path / "images"), little_set(("train",), per_class=2))
    found = results(partial(received_where_little_can_be_written, tmp_path, 100))
    assert [code for _, code, _ in found] == [78, 78]
    for _, _, text in found:
        assert text.startswith(f"{tmp_path / '1' / 'tables'} cannot hold the table of images")
        assert "LIGHTSHIP_CACHE names another place" in text
    assert not copies(tmp_path / "1"), "nothing is left there"
