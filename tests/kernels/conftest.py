import pytest
import torch

from quamba_kernels import cpu
from tests.kernels.agreement import poison


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=cpu.variants() or ["none"])
def variant(request):
    """Each variant of the C++ kernels that this machine runs."""
    with cpu.force_variant(request.param):
        yield request.param


@pytest.fixture
def poisoned(monkeypatch):
    poison(monkeypatch)
