"""Which backend an op runs on, with and without triton and its interpreter. No GPU is needed."""

import pytest
import torch

import quamba_kernels
from quamba_kernels import triton


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(triton, "_problem", lambda: "triton can't be imported (gone): pip install triton")


@pytest.mark.skipif(not triton.available(), reason=triton.why_not())
def test_gpus_get_triton():
    assert quamba_kernels.backend_name("cuda") == "triton"
    assert quamba_kernels.describe("cuda").startswith("Triton kernels")
    with quamba_kernels.backend("reference"):
        assert quamba_kernels.backend_name("cuda") == "reference"
    with quamba_kernels.backend("triton"):
        assert quamba_kernels.backend_name("cuda") == "triton"


@pytest.mark.skipif(not triton.available() or triton.interpreting(), reason="needs triton without its interpreter")
def test_main_memory_needs_the_interpreter():
    with quamba_kernels.backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        quamba_kernels.quantize(torch.zeros(2, 3), torch.tensor(1.0))


def test_gpus_without_triton_get_the_reference(without_triton):
    assert quamba_kernels.backend_name("cuda") == "reference"
    assert "pip install triton" in quamba_kernels.describe("cuda")
    with pytest.raises(RuntimeError, match="pip install triton"), quamba_kernels.backend("triton"):
        pass


def test_every_op_is_in_the_contract():
    assert set(triton.OPS) <= set(quamba_kernels.__all__)
    with pytest.raises(AttributeError, match="abacus"):
        _ = triton.abacus


@pytest.mark.skipif(not triton.available(), reason=triton.why_not())
def test_an_old_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "8.0 or more, this one has 7.5" in triton._problem.__wrapped__()
