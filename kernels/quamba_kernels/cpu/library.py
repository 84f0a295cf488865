"""Finding, loading and calling the compiled library. Its C ABI is documented in `csrc/quamba_cpu.h`."""

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from ctypes import c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch  # loaded first: the library then shares torch's OpenMP runtime

from quamba_kernels.recording import listening

ABI = 6
FILES = ("libquamba_cpu.so", "libquamba_cpu.dylib")
OPS = (
    "int8_linear",
    "int8_epilogue",
    "float_linear",
    "expand_int4",
    "causal_conv1d",
    "selective_scan",
    "ssd_scan",
    "quantize",
    "rms_norm",
    "gated_rms_norm",
    "hadamard",
    "elementwise",
    "embedding",
)

KINDS = {torch.int8: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}

_library: ctypes.CDLL | None = None
_problem: str | None = None  # None until loading was tried and whenever it went well
_one_thread: str | None = None  # why only one thread may run


def _structure(name: str, pointers_and_sizes: str) -> Any:
    """Fields in the order of the header; `*name` is a pointer, `.name` a double, any other an int64."""
    kinds = {"*": c_void_p, ".": c_double}
    fields = [(f.lstrip("*."), kinds.get(f[0], c_int64)) for f in pointers_and_sizes.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


LinearArgs = _structure(
    "LinearArgs",
    "*x *weight weight_kind group *group_scale group_scale_is_float *x_scale x_scale_stride *weight_scale *bias *inv inv_stride"
    " *acc *y *codes rows outputs inputs threads",
)
ConvArgs = _structure(
    "ConvArgs",
    "*x x_batch_stride x_token_stride *weight is_int8 *x_scale x_scale_stride *weight_scale *bias *inv inv_stride"
    " *state *mask *y *codes batch length channels taps threads",
)
ScanArgs = _structure(
    "ScanArgs",
    "*u u_batch_stride u_token_stride u_is_int8 *u_scale u_scale_stride"
    " *z z_batch_stride z_token_stride z_is_int8 *z_scale z_scale_stride"
    " *dt dt_batch_stride dt_token_stride *A *B B_batch_stride B_token_stride *C C_batch_stride C_token_stride"
    " *D *dt_bias *state *mask *y batch length channels states threads",
)
SsdArgs = _structure(
    "SsdArgs",
    "*x x_batch_stride x_token_stride x_is_int8 *x_scale x_scale_stride"
    " *B B_batch_stride B_token_stride B_is_int8 *B_scale B_scale_stride"
    " *C C_batch_stride C_token_stride C_is_int8 *C_scale C_scale_stride"
    " *dt dt_batch_stride dt_token_stride *A *D D_per_channel *dt_bias .dt_min .dt_max"
    " *state *mask *y batch length heads width groups states threads",
)
GatedNormArgs = _structure(
    "GatedNormArgs",
    "*x x_row_stride *z z_row_stride z_is_int8 *z_scale z_scale_stride *weight *y"
    " .eps groups norm_before_gate rows width threads",
)
_AXES = [f"{name}{axis}" for name in ("size", "a_stride", "b_stride", "y_stride") for axis in range(4)]
ElementwiseArgs = _structure("ElementwiseArgs", f"*a *b *y op a_kind b_kind y_kind {' '.join(_AXES)} threads")
EmbeddingArgs = _structure(
    "EmbeddingArgs", "*ids *table kind *scale group *group_scale group_scale_is_float *y rows entries width threads"
)
Launch = _structure("Launch", "*op *args")
RowsArgs = _structure("RowsArgs", "*x *weight *inv inv_stride *y *codes *scale .eps blocks order rows width threads")


def _find() -> Path | None:
    if elsewhere := os.environ.get("QUAMBA_CPU_LIBRARY"):  # for tests of other builds
        return Path(elsewhere)
    # An editable install keeps the library in site-packages and the sources in the checkout: __path__ has both.
    package = sys.modules[__package__] if __package__ else None
    folders = [Path(__file__).parent, *map(Path, getattr(package, "__path__", []))]
    return next((folder / file for folder in folders for file in FILES if (folder / file).is_file()), None)


def openmp_runtimes() -> list[str]:
    """The OpenMP runtimes mapped into this process; empty where the system doesn't tell."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted({p for p in re.findall(r"(/\S.*)$", maps, re.M) if re.search(r"/lib(gomp|iomp5?|omp)\b[^/]*$", p)})


def _load() -> ctypes.CDLL | None:
    global _library, _problem, _one_thread
    if _library is not None or _problem is not None:
        return _library
    path = _find()
    if path is None:
        _problem = "compiled library not found: reinstall with a C++ compiler (g++) present"
        return None
    try:
        library = ctypes.CDLL(str(path))
        abi = library.quamba_cpu_abi()
    except (OSError, AttributeError) as e:
        _problem = f"{path} can't be loaded ({e}): reinstall with a C++ compiler (g++) present"
        return None
    if abi != ABI:
        _problem = f"{path} has ABI {abi}, this package needs {ABI}: reinstall with a C++ compiler (g++) present"
        return None
    for name in ("variants", "isa"):
        getattr(library, f"quamba_cpu_{name}").restype = c_char_p
    library.quamba_cpu_set_isa.argtypes = [c_char_p]
    floats = ctypes.POINTER(c_float)
    library.quamba_elementary.argtypes = [c_char_p, floats, floats, c_int64]
    for op in OPS:
        getattr(library, f"quamba_{op}").restype = c_int
    if not library.quamba_cpu_openmp():
        _one_thread = "built without OpenMP"
    elif len(runtimes := openmp_runtimes()) > 1:
        _one_thread = f"{len(runtimes)} OpenMP runtimes in this process: {', '.join(Path(r).name for r in runtimes)}"
    _keep_freed_memory()
    _library = library
    return library


def _keep_freed_memory() -> None:
    """Have glibc hold on to what is freed, unless the user has set its allocator: it gives the end of the heap back to the
    system after every layer, and faulting it in again is a quarter of a prompt's time."""
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, limit in ((-1, 256 << 20), (-3, 32 << 20)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (its maximum)
            mallopt(c_int(option), c_int(limit))


def library() -> ctypes.CDLL:
    """The loaded library; RuntimeError with the reason when there is none."""
    loaded = _load()
    if loaded is None:
        raise RuntimeError(f"the cpu backend is not available: {why_not()}")
    return loaded


def available() -> bool:
    """Whether the compiled library is there and fits. Never raises."""
    return _load() is not None


def why_not() -> str:
    """Why `available()` is False, and what to do; empty when it is True."""
    _load()
    return _problem or ""


def instruction_set() -> str:
    """The variant in use ("avx2", "portable", ...), with a note when only one thread may run; "none" without a library."""
    loaded = _load()
    if loaded is None:
        return "none"
    return loaded.quamba_cpu_isa().decode() + (f", single-threaded: {_one_thread}" if _one_thread else "")


def variants() -> list[str]:
    """The variants that this machine can run, best first."""
    loaded = _load()
    return [] if loaded is None else loaded.quamba_cpu_variants().decode().split()


@contextlib.contextmanager
def force_variant(name: str) -> Iterator[None]:
    """Run the enclosed calls on one of `variants()`; ValueError for any other name. Not per thread."""
    before = library().quamba_cpu_isa()
    if library().quamba_cpu_set_isa(name.encode()) != 0:
        raise ValueError(f"this machine doesn't run the variant {name!r}: choose one of {', '.join(variants())}")
    try:
        yield
    finally:
        library().quamba_cpu_set_isa(before)


def threads() -> int:
    """Threads for the next call."""
    return 1 if _one_thread else torch.get_num_threads()


def call(op: str, args: ctypes.Structure) -> None:
    """Run `quamba_<op>`; the caller keeps the tensors behind `args` alive."""
    check_status(op, getattr(library(), f"quamba_{op}")(ctypes.byref(args)))
    if (listener := listening.to) is not None:
        listener.note(op, args)


def check_status(op: str, status: int) -> None:
    """Raise what a status other than 0 means."""
    if status == 2:
        raise MemoryError(f"{op}: no working memory")
    if status == 3:
        raise IndexError("index out of range: an id is not in the table")
    if status:
        raise ValueError(f"{op}: the library refused the arguments (status {status})")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory for C to write to, whatever torch's defaults are."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


def tokens(t: torch.Tensor) -> torch.Tensor:
    """`[B, L, C]` as the library takes it: float32 or int8, the last stride 1, the others as they are."""
    t = t if t.dtype == torch.int8 else t.float()
    return t if t.stride(-1) == 1 else t.contiguous()


def pointer(t: torch.Tensor | None) -> int | None:
    """The address of `t`'s first entry, for a structure; who records this call keeps the tensor."""
    if t is None:
        return None
    if (listener := listening.to) is not None:
        listener.keep(t)
    return t.data_ptr()
