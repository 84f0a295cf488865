"""Single kernels beside their peers: products beside torch's, scans beside mamba-ssm's, all of them as graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_measure import Call, Clock, captured, first_line, floor, middle, ratios
from gpu_models import INV, Matrix
from gpu_shapes import ScanCase
from torch import Tensor

import quamba_kernels as kernels

Row = dict[str, Any]
FRESH = 300e6  # bytes of inputs that no cache holds
MOST_SETS = 64


def rows_of(clock: Clock, peaks: dict[str, float], common: Row, calls: list[Row], base: str) -> list[Row]:
    """A row for each call of {by, run, bytes, operations, kind, per}: what `run` makes does its work `per` times. Ratio: the
    time of the call `base` over its own. A call that fails has a row with its `problem`."""
    done, rows = [], []
    for call in calls:
        try:
            run = call["run"]()
            run()
            done.append((call, captured(run, clock.gpu)))
        except Exception as error:  # the others shall still be measured
            rows.append({**common, "by": call["by"], "problem": first_line(error)})
    found = clock.samples([run for _, run in done])
    times = {call["by"]: [s / call["per"] for s in samples] for (call, _), samples in zip(done, found, strict=True)}
    for call, _ in done:
        mine, against = times[call["by"]], times.get(base)
        least, by = floor(peaks, call["bytes"], call["operations"], call["kind"])
        row = common | {"by": call["by"], "ms": 1e3 * middle(mine), "spread": [1e3 * min(mine), 1e3 * max(mine)]}
        row |= {"tb_per_s": call["bytes"] / middle(mine) / 1e12, "top_per_s": call["operations"] / middle(mine) / 1e12}
        row |= {"floor_by": by, "percent": 100 * least / middle(mine) if least else None}
        row["ratio"] = middle(ratios(against, mine)) if against else None
        rows.append(row)
    return rows


def sets(bytes_: float, gpu: bool) -> int:
    """How many sets of inputs to go through, so that none is found in a cache."""
    return max(1, min(MOST_SETS, int(FRESH // max(bytes_, 1)))) if gpu else 1


def products(clock: Clock, peaks: dict[str, float], M: int, N: int, K: int) -> list[Row]:
    """x `[M, K]` times weights `[N, K]`: ours in every format, torch's in float16, int8 and float8."""
    device = clock.device
    token = torch.rand(M, 1, device=device)

    def x(dtype: torch.dtype) -> Tensor:
        if dtype == torch.int8:
            return torch.randint(-127, 128, (M, K), dtype=dtype, device=device)
        return torch.randn(M, K, device=device).to(dtype)

    def ours(
        by: str, bits: int, kind: str, function: Callable[[Tensor, Matrix], Tensor], weight: float, out: int
    ) -> Row:
        bytes_ = N * K * weight + M * K * (1 if kind == "int8" else 2) + M * N * out
        per = sets(bytes_, clock.gpu)

        def make() -> Call:
            matrices = [Matrix(N, K, bits, device) for _ in range(per)]
            given = x(torch.int8 if kind == "int8" else torch.float16)
            return lambda: [function(given, matrix) for matrix in matrices]

        return {"by": by, "run": make, "bytes": bytes_, "operations": 2 * M * N * K, "kind": kind, "per": per}

    def float8() -> Row:
        bytes_ = N * K + M * K + 2 * M * N
        per = sets(bytes_, clock.gpu)

        def make() -> Call:
            one, given = torch.ones((), device=device), x(torch.float32).to(torch.float8_e4m3fn)
            weights = [torch.randn(N, K, device=device).to(torch.float8_e4m3fn) for _ in range(per)]
            return lambda: [torch._scaled_mm(given, w.t(), one, one, out_dtype=torch.float16) for w in weights]

        # No peak of float8 is measured: its percent is of the bytes alone.
        return {
            "by": "torch._scaled_mm",
            "run": make,
            "bytes": bytes_,
            "operations": 2 * M * N * K,
            "kind": "",
            "per": per,
        }

    calls = [
        ours("torch float16", 16, "float16", lambda a, m: torch.mm(a, m.weight.T), 2, 2),
        ours("quamba int8_matmul", 8, "int8", lambda a, m: kernels.int8_matmul(a, m.weight), 1, 4),
        ours("torch._int_mm", 8, "int8", lambda a, m: torch._int_mm(a, m.weight.T), 1, 4),
        ours("quamba w8a8_linear", 8, "int8", lambda a, m: m(a, token), 1, 4),
        ours("quamba w4a8_linear", 4, "int8", lambda a, m: m(a, token), 0.53125, 4),
        ours("quamba w8_linear", 8, "float16", lambda a, m: m(a), 1, 4),
        ours("quamba w4_linear", 4, "float16", lambda a, m: m(a), 0.53125, 4),
        float8(),
    ]
    common = {"kind": "product", "rows": M, "outputs": N, "inputs": K}
    return rows_of(clock, peaks, common, calls, "torch float16")


def scans(clock: Clock, peaks: dict[str, float], case: ScanCase) -> list[Row]:
    """Our scan on float16 and on int8 inputs, and mamba-ssm's on the same float16 ones. A single token goes on from a
    float32 state; a prompt starts from none, as mamba-ssm's do."""
    shape, batch, length, gpu = case.shape, case.batch, case.tokens, clock.gpu
    make = _ssd if shape.family == "mamba2" else _selective
    entries = batch * shape.inner * shape.states
    io = batch * length * (2 * shape.inner * 2 + 4 * shape.inner)  # roughly: two inputs in float16, y in float32
    per = sets(io + 8 * entries * (length == 1), gpu)
    given = [make(case, clock.device) for _ in range(per)]
    bytes_ = float(sum(t.nbytes for t in given[0].values()) + 4 * batch * length * shape.inner)
    state = [torch.randn(batch, *shape.recurrent, device=clock.device) for _ in range(per if length == 1 else 0)]
    bytes_ += 8 * entries * (length == 1)
    op = kernels.ssd_scan if shape.family == "mamba2" else kernels.selective_scan

    def ours(inputs: list[dict[str, Tensor]]) -> Call:
        pairs = list(zip(inputs, state or [None] * per, strict=True))
        return lambda: [op(**i, state=s) for i, s in pairs]

    def peer() -> Call:
        if not gpu:
            raise RuntimeError("mamba-ssm's kernels need a GPU")
        function = _their_token if length == 1 else _their_ssd if shape.family == "mamba2" else _their_selective
        calls = [function(case, i, s) for i, s in zip(given, state or [None] * per, strict=True)]
        return lambda: [call() for call in calls]

    coded = [_codes(i) for i in given]
    coded_bytes = (
        sum(t.nbytes for t in coded[0].values()) + 4 * batch * length * shape.inner + 8 * entries * (length == 1)
    )
    calls: list[Row] = [{"by": "quamba float16", "run": lambda: ours(given), "bytes": bytes_}]
    calls.append({"by": "quamba int8", "run": lambda: ours(coded), "bytes": float(coded_bytes)})
    calls.append({"by": "mamba-ssm float16", "run": peer, "bytes": bytes_})
    calls = [call | {"operations": 0, "kind": "", "per": per} for call in calls]
    common = {"kind": "scan", "case": str(case), "model": case.model, "batch": batch, "tokens": length}
    return rows_of(clock, peaks, common, calls, "mamba-ssm float16")


def _selective(case: ScanCase, device: torch.device) -> dict[str, Tensor]:
    shape, size = case.shape, (case.batch, case.tokens)
    half = {name: torch.randn(*size, shape.inner, device=device).half() for name in ("u", "dt", "z")}
    half |= {name: torch.randn(*size, shape.states, device=device).half() for name in ("B", "C")}
    A = -torch.arange(1, shape.states + 1, device=device).float().expand(shape.inner, -1).contiguous()
    D, bias = torch.ones(shape.inner, device=device), torch.full((shape.inner,), -4.0, device=device)
    return half | {"A": A, "D": D, "dt_bias": bias}


def _ssd(case: ScanCase, device: torch.device) -> dict[str, Tensor]:
    shape, size = case.shape, (case.batch, case.tokens)
    shapes = {"x": (shape.heads, shape.head_dim), "dt": (shape.heads,)}
    shapes |= {name: (shape.groups, shape.states) for name in ("B", "C")}
    half = {name: torch.randn(*size, *rest, device=device).half() for name, rest in shapes.items()}
    A, D = -torch.linspace(1, 16, shape.heads, device=device), torch.ones(shape.heads, device=device)
    return half | {"A": A, "D": D, "dt_bias": torch.full((shape.heads,), -4.0, device=device)}


def _codes(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values rounded to int8, where the scans take codes."""
    wanted = ("u", "z") if "u" in inputs else ("x", "B", "C")
    scale = torch.tensor(1 / INV, device=inputs["dt"].device)
    rounded = {name: (inputs[name].float() * INV).round().clamp(-128, 127).to(torch.int8) for name in wanted}
    return inputs | rounded | {f"{name}_scale": scale for name in wanted}


def _their_selective(case: ScanCase, i: dict[str, Tensor], state: None) -> Call:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, dt, B, C, z = (i[name].transpose(1, 2).contiguous() for name in ("u", "dt", "B", "C", "z"))  # tokens last
    return lambda: selective_scan_fn(u, dt, i["A"], B, C, i["D"], z, i["dt_bias"], delta_softplus=True)


def _their_ssd(case: ScanCase, i: dict[str, Tensor], state: None) -> Call:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    options = {"chunk_size": 256, "D": i["D"], "dt_bias": i["dt_bias"], "dt_softplus": True}
    return lambda: mamba_chunk_scan_combined(i["x"], i["dt"], i["A"], i["B"], i["C"], **options)


def _their_token(case: ScanCase, i: dict[str, Tensor], state: Tensor) -> Call:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    shape = case.shape
    token = {name: t[:, 0] for name, t in i.items() if name not in ("A", "D", "dt_bias")}
    if shape.family == "mamba1":
        rest = {"D": i["D"], "z": token["z"], "dt_bias": i["dt_bias"]}
        return lambda: selective_state_update(
            state, token["u"], token["dt"], i["A"], token["B"], token["C"], **rest, dt_softplus=True
        )
    wide = (shape.heads, shape.head_dim)
    A = i["A"][:, None, None].expand(*wide, shape.states)
    dt = token["dt"][:, :, None].expand(-1, *wide)
    rest = {name: i[name][:, None].expand(wide) for name in ("D", "dt_bias")}
    return lambda: selective_state_update(state, token["x"], dt, A, token["B"], token["C"], **rest, dt_softplus=True)
