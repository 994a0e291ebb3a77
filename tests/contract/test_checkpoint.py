"""Checkpoints on every kind of storage: no damaged one is ever loaded, no good one lost."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import threading
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightship import cli, storage, versions
from lightship.checkpoint.loading import read_checkpoint
from lightship.checkpoint.record import CheckpointDamaged, Commit, Metric
from lightship.checkpoint.store import CheckpointStore
from lightship.errors import ConfigError, PeerLost, TimeoutExpired
from tests.support.faults import FaultProxy
from tests.support.s3 import S3Server


@pytest.fixture(params=["local", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder for checkpoints."""
    if request.param == "local":
        return f"{tmp_path}/checkpoints"
    if request.param == "memory":
        return f"memory://checkpoints-{uuid.uuid4().hex}"
    return request.getfixturevalue("s3").url("checkpoints")


def state(step: int, score: float | None = None) -> dict[str, Any]:
    """As Lightning hands one over; a weight tells the step."""
    weights = {"w": torch.full((500,), float(step)), "n": torch.tensor(step)}
    return {"global_step": step, "epoch": 0, "state_dict": weights, "lightship": {"score": score}}


def opened(url: str, **options: Any) -> CheckpointStore:
    store = CheckpointStore(url, **options)
    store.open_attempt()
    return store


def save(store: CheckpointStore, step: int, score: float | None = None) -> str:
    path = store.path_of_step(step)
    store.save_checkpoint(state(step, score), path)
    store.wait()
    return path


def steps(url: str) -> list[int]:
    return [commit.step for commit in CheckpointStore(url).commits()]


def record_url(payload_url: str) -> str:
    return payload_url.removesuffix(".ckpt") + ".commit.json"


def change(url: str, how: Callable[[bytes], bytes]) -> None:
    storage.write_bytes(url, how(storage.read_bytes(url)))


def flipped(share: float) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        at = min(len(data) - 1, int(share * len(data)))
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return flip


DAMAGES: dict[str, Callable[[str, str], None]] = {
    "empty": lambda payload, _: change(payload, lambda data: b""),
    "half": lambda payload, _: change(payload, lambda data: data[: len(data) // 2]),
    "one byte more": lambda payload, _: change(payload, lambda data: data + b"?"),
    "deleted payload": lambda payload, _: storage.remove(payload),
    "no record": lambda payload, _: storage.remove(record_url(payload)),
    "empty record": lambda payload, _: change(record_url(payload), lambda data: b""),
    "torn record": lambda payload, _: change(record_url(payload), lambda data: data[:-40]),
    "record nested deeply": lambda payload, _: change(
        record_url(payload), lambda data: b"[" * 20_000
    ),
    "record of other JSON": lambda payload, _: change(record_url(payload), lambda data: b"[1]"),
    "payload of another": lambda payload, before: storage.write_bytes(
        payload, storage.read_bytes(before)
    ),
    **{
        f"bit flipped at {share}": lambda payload, _, share=share: change(payload, flipped(share))
        for share in (0, 0.02, 0.3, 0.5, 0.7, 0.98, 1)
    },
    **{
        f"bit of the record flipped at {share}": lambda payload, _, share=share: change(
            record_url(payload), flipped(share)
        )
        for share in (0.1, 0.2, 0.4, 0.6, 0.8, 0.95)
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_passed_over_for_the_one_before(
    url: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    writer = opened(url, keep_last=3)
    _, before, newest = (save(writer, step) for step in (1, 2, 3))
    DAMAGES[damage](newest, before)

    reader = CheckpointStore(url)
    commit = reader.newest()
    assert commit is not None
    assert commit.step == 2
    assert reader.load_checkpoint(reader.url_of(commit))["state_dict"]["n"] == 2
    if damage != "no record":  # then there never was one
        [line] = caplog.messages
        assert "step-00000003-" in line
        assert line.endswith("using the previous checkpoint")
    with pytest.raises(CheckpointDamaged):
        CheckpointStore(url).load_checkpoint(newest)


def test_a_whole_record_of_another_checkpoint_does_not_vouch(url: str) -> None:
    """A well-formed record whose size and sum are of other bytes."""
    writer = opened(url)
    older, newest = save(writer, 1), save(writer, 2)
    other = Commit.from_bytes(storage.read_bytes(record_url(older)))
    fields = Commit.from_bytes(storage.read_bytes(record_url(newest))).__dict__
    for wrong in ({"size_bytes": fields["size_bytes"] + 1}, {"sha256": other.sha256}):
        forged = Commit(**{**fields, **wrong})
        storage.write_bytes(record_url(newest), forged.to_bytes())
        found = CheckpointStore(url).newest()
        assert found is not None
        assert found.step == 1


def test_nothing_good_is_nothing(url: str, caplog: pytest.LogCaptureFixture) -> None:
    assert CheckpointStore(url).newest() is None
    writer = opened(url)
    for step in (1, 2):
        change(save(writer, step), flipped(0.5))
    store = CheckpointStore(url)
    assert store.newest() is None
    assert store.best() is None
    assert len(caplog.messages) == 2


def test_best_passes_over_a_damaged_one(url: str) -> None:
    writer = opened(url, keep_last=9)
    paths = {step: save(writer, step, score) for step, score in ((1, 0.3), (2, 0.1), (3, 0.2))}
    best = CheckpointStore(url).best()
    assert best is not None
    assert best.step == 2
    change(paths[2], flipped(0.5))
    best = CheckpointStore(url).best()
    assert best is not None
    assert best.step == 3


def test_retention_keeps_the_last_the_best_and_the_one_resumed_from(url: str) -> None:
    store = opened(url, keep_last=2)
    save(store, 1, 0.5)
    first = store.newest()
    assert first is not None
    store.protect(first)
    for step, score in ((2, 0.4), (3, 0.1), (4, None), (5, 0.2), (6, 0.3), (7, None)):
        save(store, step, score)
    assert steps(url) == [1, 3, 6, 7]
    names = {item.path for item in storage.list_files(url)}
    assert len(names) == 2 * 4 + 1, "nothing but payloads, records and the attempt"


def test_nothing_is_deleted_before_the_newer_one_is_committed(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    write, remove = storage.write_bytes, storage.remove
    monkeypatch.setattr(
        storage, "write_bytes", lambda at, data: (write(at, data), done.append(f"+{at}"))
    )
    monkeypatch.setattr(storage, "remove", lambda at: (done.append(f"-{at}"), remove(at)))
    store = opened(url, keep_last=1)
    one, two = save(store, 1), save(store, 2)
    assert done[-4:] == [f"+{two}", f"+{record_url(two)}", f"-{record_url(one)}", f"-{one}"]


def test_of_two_saves_at_one_step_the_later_counts_and_only_it_is_kept(url: str) -> None:
    store = opened(url, keep_last=2)
    for step, score in ((1, 0.2), (2, None), (2, 0.3)):
        save(store, step, score)
    commits = CheckpointStore(url).commits()
    assert [(commit.step, commit.score) for commit in commits] == [(1, 0.2), (2, 0.3)]


def test_after_a_fallback_the_damaged_ones_go_and_not_the_new(url: str) -> None:
    """They have higher steps than what the run that fell back commits first."""
    before = opened(url, keep_last=9)
    change(save(before, 8), flipped(0.5))
    storage.write_bytes(record_url(save(before, 9)), b"torn")
    change(save(before, 7, score=0.001), flipped(0.5))  # the best, if it were good

    store = opened(url, keep_last=1)
    assert store.newest() is None
    save(store, 5, score=0.7)
    save(store, 6, score=0.8)
    assert steps(url) == [5, 6]
    assert len(storage.list_files(url)) == 2 * 2 + 1


def test_a_later_attempt_is_newer_even_at_a_lower_step(url: str) -> None:
    save(opened(url), 9)
    save(opened(url), 5)
    newest = CheckpointStore(url).newest()
    assert newest is not None
    assert newest.step == 5


def test_orphans_of_dead_attempts_go_once_a_newer_one_is_committed(url: str) -> None:
    save(opened(url), 1)
    orphan = f"{url}/step-00000002-00001-abcdef-2.ckpt"
    storage.write_bytes(orphan, b"half")
    storage.write_bytes(f"{url}/notes.txt", b"somebody else's")
    store = opened(url)
    store.newest()
    assert storage.exists(orphan)
    save(store, 3)
    assert not storage.exists(orphan)
    assert storage.exists(f"{url}/notes.txt")
    assert steps(url) == [1, 3]


def test_only_the_newest_attempt_commits(url: str) -> None:
    old = opened(url)
    save(old, 1)
    new = opened(url)
    with pytest.raises(PeerLost, match="has taken over") as caught:
        save(old, 2)
    assert caught.value.exit_code == 75
    save(new, 2)
    assert steps(url) == [1, 2]
    assert CheckpointStore(url).commits()[-1].attempt == new.attempt


def test_a_start_that_is_taken_over_deletes_nothing(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later one may have chosen what its last commit makes old."""
    old = opened(url, keep_last=1)
    first, write = save(old, 1), storage.write_bytes

    def taken_over_after_a_record(to_url: str, data: bytes) -> None:
        write(to_url, data)
        if to_url.endswith(".commit.json"):
            opened(url)

    monkeypatch.setattr(storage, "write_bytes", taken_over_after_a_record)
    with pytest.raises(PeerLost, match="has taken over"):
        save(old, 2)
    assert storage.exists(first)


def test_a_record_that_comes_late_goes_with_its_payload(url: str) -> None:
    """An earlier start may have been about to write it when it was taken over."""
    old = opened(url)
    save(old, 1)
    late = save(old, 2)
    record = storage.read_bytes(record_url(late))
    storage.remove(record_url(late))
    new = opened(url)
    new.newest()
    storage.write_bytes(record_url(late), record)
    save(new, 3)
    assert not storage.exists(late)
    assert not storage.exists(record_url(late))


def test_a_bit_that_flips_on_the_way_is_no_takeover(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = opened(s3.url("flips"))
        proxy.plan("flip", 1, ("GET",))
        store.check_fence()
        assert proxy.requests["GET"] == 2
        proxy.plan("flip", 1000, ("GET",))
        with pytest.raises(TimeoutExpired, match="attempt is damaged"):
            store.check_fence()
        proxy.clear()
        store.check_fence()


def test_no_single_bit_makes_another_attempt_of_the_file(tmp_path: Path) -> None:
    store = opened(str(tmp_path))
    written = (tmp_path / "attempt").read_bytes()
    for bit in range(8 * len(written)):
        flipped = bytearray(written)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "attempt").write_bytes(flipped)
        with pytest.raises(TimeoutExpired, match="attempt is damaged"):
            store.check_fence()


def test_an_attempt_of_an_older_version_takes_over_too(tmp_path: Path) -> None:
    store = opened(str(tmp_path))
    (tmp_path / "attempt").write_text("00002-abcdef")
    with pytest.raises(PeerLost, match="00002-abcdef"):
        store.check_fence()
    assert opened(str(tmp_path)).attempt.startswith("00003-")


def test_a_save_is_a_snapshot_and_one_is_in_flight_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, writing = threading.Event(), []
    write = storage.write_bytes

    def slow(url: str, data: Any) -> None:
        if url.endswith(".ckpt"):
            writing.append(url)
            assert gate.wait(30)
        write(url, data)

    monkeypatch.setattr(storage, "write_bytes", slow)
    store = opened(str(tmp_path))
    moving = state(1)
    store.save_checkpoint(moving, store.path_of_step(1))  # returns though nothing can be written
    moving["state_dict"]["w"].fill_(7)
    moving["lightship"]["score"] = 7.0
    assert store.is_saving

    second = threading.Thread(
        target=lambda: store.save_checkpoint(state(2), store.path_of_step(2)), daemon=True
    )
    second.start()
    second.join(0.3)
    assert second.is_alive(), "the second waits for the first"
    assert len(writing) == 1
    gate.set()
    second.join(30)
    store.wait()
    assert steps(str(tmp_path)) == [1, 2]
    first = CheckpointStore(str(tmp_path)).commits()[0]
    assert first.score is None
    loaded = store.load_checkpoint(store.url_of(first))
    assert torch.equal(loaded["state_dict"]["w"], torch.full((500,), 1.0))


def test_what_goes_wrong_in_the_background_is_raised(tmp_path: Path) -> None:
    url = f"{tmp_path}/checkpoints"

    def broken() -> CheckpointStore:
        store = opened(url)
        store.save_checkpoint(state(1), f"{tmp_path}/attempt-file/step.ckpt")
        return store

    Path(tmp_path, "attempt-file").write_text("a file where a folder is needed")
    for surfaces in (
        lambda store: store.wait(),
        lambda store: store.save_checkpoint(state(2), store.path_of_step(2)),
    ):
        with pytest.raises(Exception, match="attempt-file"):
            surfaces(broken())


class Malice:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def malicious(path: Path, kind: str) -> bytes:
    content = {**state(3), "hyper_parameters": {"x": Malice(path)}}
    buffer = io.BytesIO()
    if kind == "plain pickle":
        pickle.dump(content, buffer)
    else:
        torch.save(content, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "before torch 1.6", "plain pickle"])
@pytest.mark.parametrize("way", ["newest", "test --ckpt_path", "fit --ckpt_path", "fit"])
def test_a_checkpoint_that_needs_code_is_refused(
    kind: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    ran = tmp_path / "the-code-ran"
    data = malicious(ran, kind)
    output = f"{tmp_path}/run"
    url, alone = f"{output}/checkpoints", f"{tmp_path}/alone.ckpt"
    storage.write_bytes(alone, data)
    writer = opened(url)
    payload = save(writer, 3)
    if way in ("newest", "fit"):  # an attacker who writes checkpoints writes records, too
        fields = Commit.from_bytes(storage.read_bytes(record_url(payload))).__dict__
        sha256 = hashlib.sha256(data).hexdigest()
        forged = Commit(**{**fields, "size_bytes": len(data), "sha256": sha256})
        storage.write_bytes(payload, data)
        storage.write_bytes(record_url(payload), forged.to_bytes())
    elif way == "fit --ckpt_path":
        output = f"{tmp_path}/other"
    if way == "newest":
        with pytest.raises(ConfigError, match="needs code to be unpickled and is refused") as got:
            CheckpointStore(url).newest()
        assert got.value.exit_code == 78
    else:
        flags = [f"--run.output={output}", "--run.tracking=none"]
        printed = cli.main(["fit", *flags, "--print_config"])
        storage.write_bytes(f"{output}/config.yaml", capsys.readouterr().out.encode())
        assert printed == 0
        command, _, ckpt = way.partition(" ")
        assert cli.main([command, *flags, *([f"{ckpt}={alone}"] if ckpt else [])]) == 78
        told = capsys.readouterr().err
        assert "is refused" in told
        assert "Traceback" not in told
    assert not ran.exists()
    with contextlib.suppress(RuntimeError):  # the test can fail: this is malicious
        torch.load(io.BytesIO(data), weights_only=False)
    assert ran.exists()


def test_a_record_says_what_it_is_of(tmp_path: Path) -> None:
    store = opened(str(tmp_path), metric=Metric.of("val/acc"))
    path = save(store, 12, 0.25)
    record = json.loads(Path(record_url(path)).read_bytes())
    data = Path(path).read_bytes()
    assert record["size_bytes"] == len(data)
    assert record["sha256"] == hashlib.sha256(data).hexdigest()
    assert (record["step"], record["score"], record["version"]) == (12, 0.25, 1)
    assert (record["monitor"], record["mode"]) == ("val/acc", "max")
    assert record["attempt"] == store.attempt
    written = torch.load(path, weights_only=True)
    assert (written["global_step"], written["lightship"]["version"]) == (
        12,
        versions.VERSIONS["checkpoint"],
    )


def rewrite(payload: str, change: Callable[[dict[str, Any]], Any]) -> str:
    """Change a record as another version would have written it; its URL."""
    url = record_url(payload)
    fields = json.loads(storage.read_bytes(url))
    del fields["check"]
    change(fields)
    check = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
    storage.write_bytes(url, json.dumps({**fields, "check": check}).encode())
    return url


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.update(host="node-7", parts=[1, 2]),
        lambda fields: [fields.pop(name) for name in ("monitor", "mode", "version")],
        lambda fields: [fields.pop(name) for name in ("epoch", "mode")],
        lambda fields: fields.update(config_hash="abcd"),
    ],
)
def test_a_record_with_more_fields_or_fewer_is_read(
    url: str, change, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(url)
    save(store, 1, 0.5)
    rewrite(save(store, 2, 0.25), change)
    again = opened(url)
    newest, best = again.newest(), again.best()
    assert newest is not None
    assert newest == best
    assert (newest.step, newest.score, caplog.messages) == (2, 0.25, [])
    save(again, 3, 0.125)
    assert steps(url) == [2, 3], "it is never taken for a leftover"


def test_a_record_or_checkpoint_of_a_newer_version_is_refused_and_kept(url: str) -> None:
    payload = save(opened(url), 2)
    record = rewrite(payload, lambda fields: fields.update(version=99))
    names = {item.path for item in storage.list_files(url)}
    for use in (lambda store: store.newest(), lambda store: store.load_checkpoint(payload)):
        with pytest.raises(ConfigError, match=r"version 99 .* upgrade lightship") as error:
            use(CheckpointStore(url))
        assert error.value.exit_code == 78
    assert {item.path for item in storage.list_files(url)} == names
    assert storage.exists(record)

    newer = io.BytesIO()
    torch.save({**state(2), "lightship": {"version": 99}}, newer)
    storage.write_bytes(f"{url}/alone.ckpt", newer.getvalue())
    with pytest.raises(ConfigError, match=r"alone.ckpt has version 99 .* upgrade lightship"):
        read_checkpoint(f"{url}/alone.ckpt")


@pytest.mark.parametrize("error", [storage.Denied, storage.StorageTimeout, ConfigError])
def test_a_record_that_the_storage_does_not_give_is_no_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    url = str(tmp_path)
    payload = save(opened(url), 1)
    read = storage.read_small

    def failing(at: str, max_bytes: int) -> bytes:
        if at == record_url(payload):
            raise error(f"{at}: not now")
        return read(at, max_bytes)

    monkeypatch.setattr(storage, "read_small", failing)
    with pytest.raises(error, match="not now"):
        opened(url)
    assert Path(payload).exists()


def test_scores_of_two_metrics_are_not_compared(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Losses 0.4 and 0.9, and then accuracies: the highest loss is no high accuracy."""
    by_loss = opened(url, keep_last=1)
    for step, loss in ((1, 0.4), (2, 0.9)):
        save(by_loss, step, loss)
    by_acc = opened(url, keep_last=1, metric=Metric.of("val/acc"))
    best = by_acc.best()
    assert best is not None
    assert best.step == 1, "no score is of the accuracy: the best is that by the loss"
    assert caplog.messages == ["no checkpoint has a val/acc score; the best is chosen by val/loss"]
    for step, accuracy in ((3, 0.3), (4, 0.2), (5, 0.1)):
        save(by_acc, step, accuracy)
    assert steps(url) == [1, 3, 5], "of each metric its best, and the newest"
    best = CheckpointStore(url, metric=Metric.of("val/acc")).best()
    assert best is not None
    assert best.step == 3
    best = CheckpointStore(url).best()
    assert best is not None
    assert best.step == 1


def test_a_score_of_0_1_0_is_of_the_metric_that_the_run_had(url: str) -> None:
    def forget(payload: str) -> None:
        rewrite(payload, lambda f: [f.pop(name) for name in ("monitor", "mode", "version")])

    store = opened(url, keep_last=9)
    for step, loss in ((1, 0.4), (2, 0.9)):
        forget(save(store, step, loss))

    def best(**options: Any) -> int:
        found = CheckpointStore(url, **options).best()
        assert found is not None
        return found.step

    accuracy = Metric.of("val/acc")
    assert best(metric=accuracy, metric_before=lambda: Metric.of("val/loss")) == 1
    assert best(metric=accuracy) == 2, "nothing says that it was another"
    # A start that sets another metric leaves word of which these are of.
    now = CheckpointStore(url, metric=accuracy, metric_before=lambda: Metric.of("val/loss"))
    now.newest()
    now.open_attempt()
    assert best(metric=accuracy, metric_before=lambda: accuracy) == 1


@pytest.mark.parametrize("what", ["unmounted", "deleted"])
def test_an_output_that_is_gone_may_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    url = f"{tmp_path}/mount/checkpoints"
    store = opened(url)
    save(store, 1)
    Path(tmp_path, "mount").rename(tmp_path / "elsewhere")
    if what == "unmounted":
        (tmp_path / "mount").mkdir()
    with pytest.raises(TimeoutExpired, match=r"can no longer be read .*unmounted") as error:
        save(store, 2)
    assert error.value.exit_code == 74
    assert not Path(url).exists(), "nothing is written in its place"


def other_files() -> dict[str, bytes]:
    """Files that somebody may give for a checkpoint."""
    whole, archive = io.BytesIO(), io.BytesIO()
    torch.save(state(1), whole)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("notes.txt", "hi")
    return {
        "empty": b"",
        "text": b"run:\n  output: x\n",
        "zip": archive.getvalue(),
        "half": whole.getvalue()[: len(whole.getvalue()) // 2],
        "pickle cut off": pickle.dumps(state(1)["lightship"], 2)[:-3],
        "a list": (lambda f: (torch.save([1], f), f.getvalue())[1])(io.BytesIO()),
    }


@pytest.mark.parametrize("kind", other_files())
def test_a_file_of_another_kind_is_no_checkpoint(tmp_path: Path, capsys, kind: str) -> None:
    path = tmp_path / "given.ckpt"
    path.write_bytes(other_files()[kind])
    flags = [f"--ckpt_path={path}", f"--data.root={tmp_path}", "--run.tracking=none"]
    assert cli.main(["predict", *flags, f"--predictions={tmp_path}/t.csv"]) == 78
    assert cli.main(["fit", *flags, f"--run.output={tmp_path}/run"]) == 78
    told = capsys.readouterr().err
    assert told.count("given.ckpt") >= 2
    assert "Traceback" not in told
