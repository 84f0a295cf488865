"""Loading the compiled library: a missing, broken or foreign one is an answer, never a crash."""

import ctypes
import os
import subprocess
import sys

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
def test_one_openmp_runtime(forks):
    """torch's. In a process of its own, because other libraries may have brought theirs here."""
    script = "import torch; from quamba_kernels.cpu import available, library; assert available()"
    script += "; print(len(library.openmp_runtimes()), library.threads() - torch.get_num_threads())"
    assert forks.run("-c", script).stdout == "1 0\n"


@pytest.mark.skipif(library._find() is None, reason="no C++ kernels: compiled library not found")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="another allocator may be preloaded")
def test_freed_memory_is_kept():
    """What a layer frees isn't faulted in again for the next."""
    script = """if True:
        import ctypes, resource
        from quamba_kernels import cpu
        {load}
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        pieces = (ctypes.c_void_p * 8)()
        def layer():
            for i in range(8):
                pieces[i] = libc.malloc(6 << 20)
                ctypes.memset(pieces[i], 1, 6 << 20)
            for i in reversed(range(8)):
                libc.free(pieces[i])
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        layer(), layer()
        before = faults()
        layer(), layer()
        print((faults() - before) * resource.getpagesize() >> 20)
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}

    def megabytes(load, **variables):
        out = subprocess.run(
            [sys.executable, "-c", script.replace("{load}", load)],
            env={**environment, **variables}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return int(out.stdout)

    assert megabytes("pass") > 40  # or this test shows nothing
    assert megabytes("cpu.available()") < 10
    assert megabytes("cpu.available()", MALLOC_TOP_PAD_="0") > 40  # the user's settings stand
