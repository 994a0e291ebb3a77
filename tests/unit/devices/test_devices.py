"""Kinds of devices, and the names that torch does not promise."""

import pytest
import torch

from lightship import devices


@pytest.mark.parametrize("name", devices.PRIVATE_NAMES)
def test_torch_has_the_private_name(name: str) -> None:
    """Fails by the name when a version of torch no longer has it: bfloat16 then counts as slow."""
    assert isinstance(getattr(torch.cpu, name)(), bool)


def test_bfloat16_counts_as_slow_without_the_private_names(monkeypatch) -> None:
    for name in devices.PRIVATE_NAMES:
        monkeypatch.delattr(torch.cpu, name)
    assert not devices.has_bf16_units(torch.device("cpu"))
    assert devices.has_bf16_units(torch.device("cuda"))
