"""Files that ask for more than they hold, and honest ones."""

import io
import resource
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from lightship.checkpoint import content
from lightship.checkpoint.serialization import from_bytes
from lightship.errors import ConfigError
from lightship.host import Limits
from tests.support.forged import BOMBS, archive_of, saved

MIB = 2**20


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_that_asks_for_more_than_it_holds_is_refused(name: str) -> None:
    payload = BOMBS[name]()
    before = peak_mib()
    with pytest.raises(ConfigError, match=r"evil\.ckpt"):
        from_bytes(payload, "evil.ckpt")
    assert peak_mib() - before < 512 + 8 * len(payload) / MIB


def test_honest_files_are_read() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    net.append(net[0])  # two names of the same memory
    state = net.state_dict()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    whole = {"state_dict": state, "optimizer_states": [optimizer.state_dict()], "n": (1, 2.5, None)}
    read = from_bytes(saved(whole), "good.ckpt")
    assert isinstance(read["state_dict"], OrderedDict)
    assert read["state_dict"]._metadata == state._metadata, "by which old layers are converted"
    old = io.BytesIO()
    torch.save(state, old, _use_new_zipfile_serialization=False)
    for payload in (saved(state), old.getvalue()):
        read = from_bytes(payload, "good.pth")
        assert all(torch.equal(read[name], value) for name, value in state.items())
    part = torch.ones(100, 100)[:, ::3]  # less than its storage
    assert torch.equal(from_bytes(saved({"a": part}), "good.pth")["a"], part)


def test_a_pickle_that_could_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "read_limits", lambda: Limits(None, 100 * MIB, "cgroup v2"))
    payload = archive_of({"data.pkl": b"\x80\x02](" + b"}" * (2 * MIB) + b"e."})
    with pytest.raises(ConfigError, match="can take more memory than there is"):
        from_bytes(payload, "evil.ckpt")
    from_bytes(saved({"a": torch.ones(MIB)}), "good.ckpt")


def test_an_entry_that_is_said_to_be_far_away() -> None:
    buffer = io.BytesIO(saved({"a": torch.ones(3)}))
    with zipfile.ZipFile(buffer, "a") as archive:
        for entry in archive.infolist():
            entry.header_offset = 2**63
        archive.writestr("archive/more", b"")
    with pytest.raises(ConfigError, match=r"evil\.ckpt is not an archive"):
        from_bytes(buffer.getvalue(), "evil.ckpt")
