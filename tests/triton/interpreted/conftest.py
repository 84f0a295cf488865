"""Tests for Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest tests/triton/interpreted`. Without the variable they
aren't collected; `tests/triton/test_interpreted.py` runs them with it."""

import pytest
import torch

from quamba_kernels import triton
from tests.kernels.agreement import poison

collect_ignore_glob = [] if triton.interpreting() else ["test_*.py"]


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison(monkeypatch)
