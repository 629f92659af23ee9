"""Hypothesis for fuzz tests: the same examples in every run, so that a failure is a change of the code; less memory."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fuzz",
    derandomize=True,
    deadline=None,
    max_examples=150,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fuzz")


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The process may take 1.5 GB more than it has, so that a large allocation fails instead of slowing the machine.

    What torch allocates is counted here, and not by `hostile.at_most`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 29), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
