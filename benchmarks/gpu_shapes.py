"""What gpu.py measures: shapes, formats, sizes, and the bars that numbers have to reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: hidden D, inner I = 2 D, states N; of Mamba1 the rank of dt, of Mamba2 heads of head_dim channels,
    which share B and C by groups. share: of the time, relative to the other models'."""

    family: str
    hidden: int
    layers: int
    vocabulary: int
    states: int
    share: float
    rank: int = 0
    head_dim: int = 64
    groups: int = 1
    tied: bool = True
    taps: int = 4

    @property
    def inner(self) -> int:
        return 2 * self.hidden

    @property
    def heads(self) -> int:
        return self.inner // self.head_dim

    @property
    def conv(self) -> int:
        """Channels of the convolution."""
        return self.inner + (2 * self.groups * self.states if self.family == "mamba2" else 0)

    @property
    def recurrent(self) -> tuple[int, ...]:
        """The shape of a sequence's recurrent state."""
        if self.family == "mamba2":
            return self.heads, self.head_dim, self.states
        return self.inner, self.states


# In the order in which they are measured. mamba2-8b: NVIDIA's Mamba2-8B.
SHAPES = {
    "mamba2-8b": Shape("mamba2", 4096, 56, 256000, 128, share=4, groups=8, tied=False),
    "mamba2-2.7b": Shape("mamba2", 2560, 64, 50288, 128, share=2.5),
    "mamba-2.8b": Shape("mamba1", 2560, 64, 50280, 16, share=2.5, rank=160),
    "mamba2-130m": Shape("mamba2", 768, 24, 50288, 128, share=1),
    "mamba-130m": Shape("mamba1", 768, 24, 50280, 16, share=1, rank=48),
    "mamba2-1.3b": Shape("mamba2", 2048, 48, 50288, 128, share=1.5),
    "mamba-1.4b": Shape("mamba1", 2048, 48, 50280, 16, share=1.5, rank=128),
}
TINY = {
    "mamba2-tiny": Shape("mamba2", 24, 1, 64, 16, share=1, head_dim=12, groups=2, tied=False),
    "mamba-tiny": Shape("mamba1", 24, 1, 64, 8, share=1, rank=3),
}


@dataclass(frozen=True)
class Format:
    """bits: of the projections' weights; integer: whether activations are int8."""

    name: str
    bits: int
    integer: bool

    def head_bits(self, shape: Shape) -> int:
        """Of embedding and head, as the presets have it (`configs/`)."""
        if self.bits == 16 or (self.name == "W8A8" and shape.family == "mamba1"):
            return 16
        return 4 if self.name == "W4A8" and shape.family == "mamba2" and shape.hidden >= 2048 else 8


FLOAT = Format("float16", 16, False)
FORMATS = {f.name: f for f in (FLOAT, Format("W8A8", 8, True), Format("W4A8", 4, True), Format("W4A16", 4, False))}


@dataclass(frozen=True)
class Variant:
    """A format, and the dtype of the recurrent state."""

    format: Format
    state: str

    def __str__(self) -> str:
        return f"{self.format.name}, {self.state} state"


BASE = Variant(FLOAT, "float32")
VARIANTS = [
    BASE,
    *[Variant(FORMATS[name], "float32") for name in ("W8A8", "W4A8")],
    *[Variant(FORMATS[name], "int8") for name in ("W8A8", "W4A8")],
    *[Variant(FORMATS["W4A16"], state) for state in ("float32", "int8")],
    Variant(FLOAT, "int8"),
]


@dataclass(frozen=True)
class Cell:
    """phase decode: one token for each of `batch` sequences; prefill: a prompt of so many tokens, in chunks."""

    phase: str
    batch: int
    tokens: int
    chunk: int

    def __str__(self) -> str:
        return f"decode at batch {self.batch}" if self.phase == "decode" else f"prefill of {self.tokens}"

    @property
    def variants(self) -> list[Variant]:
        """A prompt touches the state once a chunk: its dtype makes no difference."""
        return VARIANTS if self.phase == "decode" else [v for v in VARIANTS if v.state == "float32"]


CHUNK = 2048


def decode(batch: int) -> Cell:
    return Cell("decode", batch, 1, 1)


def prefill(tokens: int, chunk: int = CHUNK) -> Cell:
    return Cell("prefill", 1, tokens, min(tokens, chunk))


PAPER = "mamba2-8b"


def cells(name: str, quick: bool) -> list[Cell]:
    """What to measure of a model, the most important first."""
    if name in TINY:
        return [decode(1), prefill(4, 2)] if TINY[name].family == "mamba2" else [decode(1)]
    if quick:
        return [decode(1), prefill(2048), decode(64)]
    paper = [prefill(1024)] if name == PAPER else []
    return [decode(1), prefill(2048), *paper, decode(64), decode(16), prefill(512), decode(256), prefill(8192)]


# rows, outputs and inputs of single products: the bar's, and in_proj of the 8b shape
PRODUCTS = [(4096, 4096, 8192), (1, 18560, 4096), (16, 18560, 4096), (64, 18560, 4096), (2048, 18560, 4096)]
TINY_PRODUCTS = [(32, 32, 64), (1, 24, 40)]


@dataclass(frozen=True)
class ScanCase:
    """A scan with the sizes of one layer of a shape."""

    model: str
    batch: int
    tokens: int

    @property
    def shape(self) -> Shape:
        return (SHAPES | TINY)[self.model]

    def __str__(self) -> str:
        name = "SSD" if self.shape.family == "mamba2" else "selective scan"
        return f"{name} of {self.model}, batch {self.batch}, {self.tokens} token{'s' * (self.tokens > 1)}"


SCANS = [
    ScanCase("mamba2-8b", 1, 2048),
    ScanCase("mamba-2.8b", 1, 2048),
    ScanCase("mamba2-8b", 64, 1),
    ScanCase("mamba-2.8b", 64, 1),
    ScanCase("mamba2-2.7b", 1, 8192),
]
TINY_SCANS = [ScanCase("mamba2-tiny", 1, 20), ScanCase("mamba-tiny", 2, 1)]


@dataclass(frozen=True)
class Bar:
    """What a number has to reach on an H200: the `field` of the row in which all of `where` stands, at least `limit`."""

    text: str
    limit: float
    field: str
    where: dict[str, Any]


def _step(text: str, limit: float, field: str, model: str, format: str, cell: Cell, state: str = "float32") -> Bar:
    where = {"kind": "step", "model": model, "format": format, "state": state, "phase": cell.phase}
    size = f"batch {cell.batch}" if cell.phase == "decode" else f"{cell.tokens} tokens"
    label = f"{model}, {cell.phase}, {size}: {format}{', int8 state' if state == 'int8' else ''} {text}"
    return Bar(label, limit, field, where | {"batch": cell.batch, "tokens": cell.tokens})


TIMES, OF_FLOOR = ("/ float16", "ratio"), ("% of the floor", "percent")
BARS = [
    _step(TIMES[0], 1.7, TIMES[1], "mamba2-8b", "W8A8", decode(1)),
    _step(TIMES[0], 2.6, TIMES[1], "mamba2-8b", "W4A8", decode(1)),
    _step(OF_FLOOR[0], 65, OF_FLOOR[1], "mamba2-8b", "W8A8", decode(1)),
    _step(TIMES[0], 1.45, TIMES[1], "mamba2-2.7b", "W8A8", decode(1)),
    _step(TIMES[0], 1.9, TIMES[1], "mamba2-2.7b", "W4A8", decode(1)),
    _step(OF_FLOOR[0], 45, OF_FLOOR[1], "mamba2-2.7b", "W8A8", decode(1)),
    _step(OF_FLOOR[0], 60, OF_FLOOR[1], "mamba2-8b", "W8A8", decode(64), "int8"),
    _step(OF_FLOOR[0], 60, OF_FLOOR[1], "mamba2-2.7b", "W8A8", decode(64), "int8"),
    _step(TIMES[0], 1.4, TIMES[1], "mamba2-8b", "W8A8", prefill(2048)),
    _step(TIMES[0], 1.4, TIMES[1], "mamba2-2.7b", "W8A8", prefill(2048)),
    Bar(
        "int8 product, 4096 x 4096 x 8192: % of the int8 peak",
        60,
        "percent",
        {"kind": "product", "by": "quamba int8_matmul", "rows": 4096, "outputs": 4096, "inputs": 8192},
    ),
    *[
        Bar(f"{case}: mamba-ssm's time / ours", 1, "ratio", {"kind": "scan", "case": str(case), "by": "quamba float16"})
        for case in SCANS
    ],
]
