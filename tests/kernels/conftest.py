import pytest
import torch

from quamba_kernels import cpu


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
    """Outputs start as NaN or -77: an entry that isn't written shows."""
    empty = torch.empty

    def filled(*shape, **kwargs):
        t = empty(*shape, **kwargs)
        return t.fill_(float("nan") if t.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", filled)
