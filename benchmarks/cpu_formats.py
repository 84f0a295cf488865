"""What cpu.py measures: models, formats, and the bars that numbers have to reach."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """shape: of the random weights, None for a bundled model; rounds: at most; slow: (prompt, decoded tokens) at most of
    transformers, whose scan is a loop in Python."""

    family: str
    shape: dict[str, int] | None
    rounds: int = 7
    slow: tuple[int, int] = (512, 32)


MODELS = {
    "mamba1-nano": Model("mamba1", None, slow=(512, 128)),
    "mamba2-nano": Model("mamba2", None, slow=(512, 128)),
    "mamba-130m": Model("mamba1", {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280}),
    "mamba2-130m": Model("mamba2", {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50288}),
    "mamba-370m": Model("mamba1", {"hidden_size": 1024, "num_hidden_layers": 48, "vocab_size": 50280}, 5, (128, 16)),
    "mamba-1.4b": Model("mamba1", {"hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 50280}, 3, (64, 8)),
}


@dataclass(frozen=True)
class Format:
    """source: the file it reads, by default its own; dtype: that the engine is asked for; recipe: preset and, unless it is
    the preset's own, whether embedding and head are quantized; against: what its ratios are taken to; fewer: the divisor
    of what it is given to read and to decode, being slower still."""

    engine: str
    name: str
    source: str = ""
    dtype: str = ""
    recipe: tuple[str, bool | None] | None = None
    against: tuple[str, ...] = ()
    families: tuple[str, ...] = ("mamba1", "mamba2")
    fewer: int = 1

    @property
    def key(self) -> str:
        return f"{self.engine} {self.name}"

    @property
    def file(self) -> str:
        return self.source or self.name


WHOLE = "W8A8+head"  # head and embedding in int8, too; Mamba2's published layout is this one
FLOAT = "quamba float32"
FORMATS = [
    Format("quamba", "float32", dtype="float32", against=("transformers float32",)),
    Format("quamba", "bf16", dtype="bfloat16", against=("transformers bf16", "llama.cpp F16")),
    Format("quamba", "W8A8", recipe=("w8a8", False), against=("llama.cpp Q8_0", FLOAT), families=("mamba1",)),
    Format("quamba", WHOLE, recipe=("w8a8", True), against=("llama.cpp Q8_0", FLOAT)),
    Format("quamba", "W4A8", recipe=("w4a8", None), against=("llama.cpp Q4_0", "llama.cpp Q4_K_M", FLOAT)),
    Format("quamba", "W4A16", recipe=("w4a16", None), against=("llama.cpp Q4_0", "llama.cpp Q4_K_M", FLOAT)),
    Format("transformers", "float32", dtype="float32"),
    Format("transformers", "bf16", dtype="bfloat16", fewer=4),
    *[Format("llama.cpp", kind) for kind in ("F16", "Q8_0", "Q4_0", "Q4_K_M")],
]
INTEGER = (WHOLE, "W4A8")  # all large products are calls of the C++ library
STARTS = {"first token": "s", "first token and imports": "s", "peak memory": "bytes"}
UNITS = STARTS | {"load": "s", "file": "s", "outside C++": "share"}
FLAT = ("mamba-130m", f"quamba {WHOLE}", (2048, 8192))
NEEDS = {"llama.cpp": ("llama_cpp", "gguf"), "transformers": (), "quamba": ()}


@dataclass(frozen=True)
class Bar:
    """What a number has to reach at the most threads: a row's `field`, at least or at most `limit`."""

    text: str
    model: str
    format: str
    phase: str
    field: str
    limit: float
    against: str | None = None
    at_most: bool = False


BARS = [
    Bar("Mamba1 W8A8 prefill / Q8_0", "mamba-130m", WHOLE, "prefill 512", "ratio", 9, "llama.cpp Q8_0"),
    Bar("Mamba1 W8A8 decode / Q8_0", "mamba-130m", WHOLE, "decode 128", "ratio", 2, "llama.cpp Q8_0"),
    Bar("Mamba2 W8A8 prefill / Q8_0", "mamba2-130m", WHOLE, "prefill 512", "ratio", 4, "llama.cpp Q8_0"),
    Bar("Mamba2 W8A8 decode / Q8_0", "mamba2-130m", WHOLE, "decode 128", "ratio", 2, "llama.cpp Q8_0"),
    Bar("Mamba1 W4A8 decode / Q4_0", "mamba-130m", "W4A8", "decode 128", "ratio", 2, "llama.cpp Q4_0"),
    Bar("Mamba2 W4A8 decode / Q4_0", "mamba2-130m", "W4A8", "decode 128", "ratio", 2, "llama.cpp Q4_0"),
    Bar("1.4b W8A8 decode, % of read bandwidth", "mamba-1.4b", WHOLE, "decode 128", "percent", 75),
    Bar("prefill, cost a token at 8192 / at 512", "mamba-130m", WHOLE, "prefill 8192", "cost", 1.1, at_most=True),
    Bar("loading W8A8 1.4b / reading its file", "mamba-1.4b", WHOLE, "load", "ratio", 2, "file", at_most=True),
    Bar("time outside C++ of a decoded token", "mamba-130m", WHOLE, "outside C++", "value", 0.15, at_most=True),
]


FORMAT_NAMES = list(dict.fromkeys(format.name for format in FORMATS))
