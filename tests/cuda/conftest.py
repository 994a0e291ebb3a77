"""The device of these tests, and what is skipped without it."""

import os
from collections.abc import Iterator

import pytest
import torch

from lightship.commands import fit

DEVICE = os.environ.get("DEVICE", "cuda")
_NO_CUDA = "no CUDA device (torch.cuda.is_available() is False); DEVICE=cpu rehearses the tests"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in (each for each in items if str(each.path).startswith(here)):
        only_cuda = item.get_closest_marker("only_cuda")
        if DEVICE == "cuda" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=_NO_CUDA))
        elif DEVICE == "cpu" and only_cuda:
            item.add_marker(pytest.mark.skip(reason=f"DEVICE=cpu: {only_cuda.args[0]}"))


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits without the report's page, which is most of so short a run's time."""
    monkeypatch.setattr(fit, "write_report", lambda *_: None)


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """What one test leaves in torch's cache is not missing in the next one's processes."""
    yield
    torch._dynamo.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
