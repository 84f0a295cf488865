"""Loading the compiled library: a missing, broken or foreign one is an answer, never a crash."""

import pytest
import torch

import quamba_kernels
from quamba_kernels import cpu
from quamba_kernels.cpu import library


@pytest.fixture
def fresh(monkeypatch):
    for name in ("_library", "_problem", "_one_thread"):
        monkeypatch.setattr(library, name, None)
    quamba_kernels._resolve.cache_clear()
    yield monkeypatch
    quamba_kernels._resolve.cache_clear()


def test_missing(fresh):
    fresh.setattr(library, "_find", lambda: None)
    assert not cpu.available() and cpu.variants() == [] and cpu.instruction_set() == "none"
    assert "not found" in cpu.why_not() and "C++ compiler" in cpu.why_not()
    assert "not found" in quamba_kernels.describe()
    assert quamba_kernels.quantize(torch.ones(3), torch.tensor(2.0)).tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="not found"), quamba_kernels.backend("cpu"):
        pass


def test_elsewhere(fresh, tmp_path):
    fresh.setenv("QUAMBA_CPU_LIBRARY", str(tmp_path / "gone.so"))
    assert not cpu.available() and "gone.so" in cpu.why_not()


def test_broken(fresh, tmp_path):
    (tmp_path / "libquamba_cpu.so").write_bytes(b"not a library")
    fresh.setattr(library, "_find", lambda: tmp_path / "libquamba_cpu.so")
    assert not cpu.available() and "can't be loaded" in cpu.why_not()


@pytest.mark.skipif(library._find() is None, reason="no C++ kernels: compiled library not found")
def test_other_abi(fresh):
    fresh.setattr(library, "ABI", 999)
    assert not cpu.available() and "ABI" in cpu.why_not()


@pytest.mark.skipif(library._find() is None, reason="no C++ kernels: compiled library not found")
def test_two_openmp_runtimes(fresh):
    fresh.setattr(library, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    assert cpu.available() and library.threads() == 1
    assert "single-threaded" in cpu.instruction_set() and "libiomp5.so" in quamba_kernels.describe()


@pytest.mark.skipif(library._find() is None, reason="no C++ kernels: compiled library not found")
def test_one_openmp_runtime(fresh):
    assert cpu.available() and len(library.openmp_runtimes()) == 1
    assert library.threads() == torch.get_num_threads()
