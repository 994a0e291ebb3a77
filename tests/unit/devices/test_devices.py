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


@pytest.mark.parametrize(
    ("asked", "accelerator", "gpu", "cpu", "expected"),
    [
        ("auto", "auto", "bf16", False, "bf16-mixed"),
        ("auto", "gpu", "fp16", True, "16-mixed"),
        ("auto", "cpu", "bf16", False, "32-true"),
        ("auto", "auto", None, True, "bf16-mixed"),
        ("auto", "auto", None, False, "32-true"),
        ("auto", "mps", None, True, "32-true"),
        ("auto", "tpu", None, False, "bf16-mixed"),
        ("32-true", "auto", "bf16", True, "32-true"),
        ("16-mixed", "cpu", "bf16", False, "bf16-mixed"),
        ("16-mixed", "auto", None, False, "bf16-mixed"),
        ("16-mixed", "auto", "fp16", False, "16-mixed"),
    ],
)
def test_the_fastest_precision_is_one_that_the_device_computes(
    monkeypatch, asked: str, accelerator: str, gpu: str | None, cpu: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu == "bf16"
    )
    monkeypatch.setattr(devices, "has_bf16_units", lambda device: cpu)
    assert devices.fastest_precision(asked, accelerator) == expected
