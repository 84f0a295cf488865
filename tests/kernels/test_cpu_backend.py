"""The C++ kernels against the reference, in the contract's agreement classes, for every variant this machine runs."""

import importlib
import time

import pytest
import torch

from quamba_kernels import cpu, reference
from quamba_kernels.hadamard_matrices import outer_matrix
from tests.kernels.agreement import close, codes, normal, on_threads, same_codes

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason=f"no C++ kernels: {cpu.why_not()}"),
    pytest.mark.usefixtures("variant", "poisoned"),
]


# ---- int8 linear

SHAPES = [(1, 768, 259), (1, 1, 1), (2, 31, 5), (3, 16, 4), (4, 333, 131), (13, 257, 70), (37, 999, 300), (2, 20000, 9)]
SHAPES += [(17, 7000, 33), (97, 65, 50), (113, 700, 131)]  # enough rows to pack the weight


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_accumulators(rng, m, k, n):
    x, w = codes(rng, m, k), codes(rng, n, k)
    got = on_threads(lambda: cpu.int8_matmul(x, w))
    assert got.dtype == torch.int32 and torch.equal(got.long(), x.long() @ w.long().T)


@pytest.mark.parametrize(("x", "w"), [(-128, -128), (-128, 127), (127, -128), (127, 127)])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 20000, 5), (5, 131071, 3), (2, 33, 2)])
def test_extreme_accumulators(x, w, m, k, n):
    got = cpu.int8_matmul(torch.full((m, k), x, dtype=torch.int8), torch.full((n, k), w, dtype=torch.int8))
    assert got.tolist() == [[k * x * w] * n] * m


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("per_token", [False, True])
def test_w8a8_linear(rng, m, k, n, per_token):
    x, w, w_scale, bias = codes(rng, m, k), codes(rng, n, k), torch.rand(n, generator=rng) / k, normal(rng, n)
    x_scale = torch.rand(m, 1, generator=rng) if per_token else torch.tensor(0.03)
    for b in (None, bias):
        got = on_threads(lambda b=b: cpu.w8a8_linear(x, x_scale, w, w_scale, b))
        # Equal, not close: the same roundings in the same order.
        assert torch.equal(got, reference.w8a8_linear(x, x_scale, w, w_scale, b))
    for inv in (torch.tensor(9.0), torch.rand(n, generator=rng) * 30):
        got = on_threads(lambda inv=inv: cpu.w8a8_linear(x, x_scale, w, w_scale, bias, inv))
        assert torch.equal(got, reference.w8a8_linear(x, x_scale, w, w_scale, bias, inv))


def test_w8a8_linear_views_and_batches(rng):
    x, w = codes(rng, 2, 3, 80)[:, :, ::2], codes(rng, 40, 24).T
    assert not x.is_contiguous() and not w.is_contiguous()
    xs, ws = torch.rand(2, 3, 1, generator=rng), torch.rand(24, generator=rng)
    assert torch.equal(cpu.w8a8_linear(x, xs, w, ws), reference.w8a8_linear(x, xs, w, ws))
    assert cpu.w8a8_linear(x[:0], xs[:0], w, ws).shape == (0, 3, 24)


def test_unaligned_pointers(rng):
    x, w = codes(rng, 1 + 5 * 48)[1:].view(5, 48), codes(rng, 3 + 7 * 48)[3:].view(7, 48)
    assert torch.equal(cpu.int8_matmul(x, w), reference.int8_matmul(x, w))


# ---- convolution


def conv_case(rng, batch, length, channels, taps, dtype):
    if dtype == torch.int8:
        x, w = codes(rng, batch, length, channels), codes(rng, channels, taps)
        state = codes(rng, batch, channels, taps - 1)
        scales = {"x_scale": torch.tensor(0.02), "weight_scale": torch.rand(channels, generator=rng) / 100}
    else:
        x, w = normal(rng, batch, length, channels).to(dtype), normal(rng, channels, taps).to(dtype)
        state, scales = normal(rng, batch, channels, taps - 1).to(dtype), {}
    return x, w, normal(rng, channels), state, scales


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "taps"),
    [(2, 1, 70, 4), (1, 2, 64, 4), (2, 67, 131, 4), (1, 5, 3, 1), (1, 40, 17, 9)],
)
def test_conv(rng, dtype, batch, length, channels, taps):
    x, w, bias, state, scales = conv_case(rng, batch, length, channels, taps, dtype)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, : length // 2] = False
    for b, m in ((bias, None), (None, mask)):
        mine, theirs = state.clone(), state.clone()
        want = reference.causal_conv1d(x, w, b, state=theirs, mask=m, **scales)
        first = state.clone()

        def run(first=first, mine=mine, b=b, m=m):
            mine.copy_(first)
            return cpu.causal_conv1d(x, w, b, state=mine, mask=m, **scales), mine.clone()

        got, _ = on_threads(run)
        close(got, want, max(1e-6, torch.finfo(want.dtype).eps))
        assert torch.equal(mine, theirs)
        inv = torch.rand(channels, generator=rng) * 40
        mine.copy_(state), theirs.copy_(state)
        same_codes(
            cpu.causal_conv1d(x, w, b, state=mine, mask=m, inv=inv, **scales),
            reference.causal_conv1d(x, w, b, state=theirs, mask=m, inv=inv, **scales),
        )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
@pytest.mark.parametrize("split", [1, 2, 3, 31, 32, 33, 69])
def test_conv_hand_off_is_exact(rng, dtype, split):
    x, w, bias, state, scales = conv_case(rng, 2, 70, 19, 4, dtype)
    whole, parts = state.clone(), state.clone()
    want = cpu.causal_conv1d(x, w, bias, state=whole, **scales)
    got = [cpu.causal_conv1d(p, w, bias, state=parts, **scales) for p in (x[:, :split], x[:, split:])]
    assert torch.equal(torch.cat(got, 1), want) and torch.equal(parts, whole)


def test_conv_views(rng):
    x, w, bias, state, scales = conv_case(rng, 2, 9, 40, 4, torch.int8)
    wide = torch.cat([x, x], -1)[:, :, :40]
    turned = state.transpose(1, 2).contiguous().transpose(1, 2)
    mine = turned.clone()
    got = cpu.causal_conv1d(wide, w, bias, state=turned, **scales)
    want = cpu.causal_conv1d(x, w, bias, state=state, **scales)
    assert torch.equal(got, want) and torch.equal(turned, state) and not torch.equal(mine, state)


# ---- scan


def scan_case(rng, batch, length, inner, states, integer=False):
    i = {
        "u": normal(rng, batch, length, inner),
        "dt": normal(rng, batch, length, inner),
        "A": -torch.rand(inner, states, generator=rng) * 16,
        "B": normal(rng, batch, length, states),
        "C": normal(rng, batch, length, states),
        "D": normal(rng, inner),
        "z": normal(rng, batch, length, inner) * 3,
        "dt_bias": normal(rng, inner) - 3,
    }
    if integer:
        i.update(u=codes(rng, batch, length, inner), z=codes(rng, batch, length, inner))
        i.update(u_scale=torch.rand(inner, generator=rng) / 30, z_scale=torch.tensor(0.04))
    return i


SCANS = [(2, 33, 50, 16), (1, 1, 1536, 16), (3, 2, 16, 1), (1, 9, 5, 3), (1, 5, 33, 256), (2, 130, 17, 7)]
SCANS += [(2, 33, 150, 16)]  # several blocks of channels and of tokens


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize(("batch", "length", "inner", "states"), SCANS)
def test_scan(rng, batch, length, inner, states, integer):
    i = scan_case(rng, batch, length, inner, states, integer)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, : length // 2] = False
    start = normal(rng, batch, inner, states)
    for m in (None, mask):
        theirs, mine = start.clone(), start.clone()
        want = reference.selective_scan(**i, state=theirs, mask=m)

        def run(mine=mine, m=m):
            mine.copy_(start)
            return cpu.selective_scan(**i, state=mine, mask=m), mine.clone()

        got, _ = on_threads(run)
        close(got, want)
        close(mine, theirs)
    close(cpu.selective_scan(**i), reference.selective_scan(**i))


@pytest.mark.parametrize("split", [1, 2, 7, 8, 9, 32, 64, 69])
@pytest.mark.parametrize("channels", [21, 150])
def test_scan_hand_off_is_exact(rng, split, channels):
    i = scan_case(rng, 2, 70, channels, 16, integer=True)
    whole, parts = torch.zeros(2, channels, 16), torch.zeros(2, channels, 16)
    want = cpu.selective_scan(**i, state=whole)
    per_token = ("u", "dt", "B", "C", "z")
    pieces = [{k: t[:, s] if k in per_token else t for k, t in i.items()} for s in (slice(split), slice(split, None))]
    assert torch.equal(torch.cat([cpu.selective_scan(**p, state=parts) for p in pieces], 1), want)
    assert torch.equal(parts, whole)


def test_scan_rows_of_a_batch_are_independent(rng):
    i = scan_case(rng, 3, 8, 40, 16)
    alone = {k: t[1:2] if k in ("u", "dt", "B", "C", "z") else t for k, t in i.items()}
    assert torch.equal(cpu.selective_scan(**i)[1:2], cpu.selective_scan(**alone))


def test_scan_views_and_half_precision(rng):
    i = scan_case(rng, 2, 7, 24, 16)
    both = torch.cat([i["B"], i["C"]], -1).bfloat16()
    i.update(B=both[..., :16], C=both[..., 16:], u=i["u"].half(), z=i["z"].bfloat16())
    i["dt"] = i["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    state = torch.zeros(2, 16, 24).transpose(1, 2)
    theirs = torch.zeros(2, 24, 16)
    close(cpu.selective_scan(**i, state=state), reference.selective_scan(**i, state=theirs))
    close(state, theirs)


def test_scan_softplus_and_gate_ranges(rng):
    i = scan_case(rng, 1, 6, 32, 4)
    i["dt"] = torch.linspace(-100, 60, 32).expand(1, 6, 32).contiguous()
    i["z"] = torch.linspace(-120, 120, 32).expand(1, 6, 32).contiguous()
    close(cpu.selective_scan(**i), reference.selective_scan(**i))


def test_scan_with_more_states_than_the_library_takes(rng):
    i = scan_case(rng, 1, 3, 4, 257)
    assert torch.equal(cpu.selective_scan(**i), reference.selective_scan(**i))


# ---- rows


@pytest.mark.parametrize("shape", [(1, 768), (2, 3, 33), (70, 1000), (4, 1), (5, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_and_norm(rng, shape, dtype):
    x, width = (normal(rng, *shape) * 3).to(dtype), shape[-1]
    x.view(-1, width)[-1] = 0
    for inv in (torch.tensor(11.0), torch.rand(width, generator=rng) * 90):
        got = on_threads(lambda inv=inv: cpu.quantize(x, inv))
        assert torch.equal(got, reference.quantize(x, inv))
    (got, scale), (want, want_scale) = on_threads(lambda: cpu.quantize_per_token(x)), reference.quantize_per_token(x)
    same_codes(got, want)
    assert torch.equal(scale, want_scale)
    w = (torch.rand(width, generator=rng) * 2).to(dtype)
    norm = on_threads(lambda: cpu.rms_norm(x, w, 1e-5))
    close(norm, reference.rms_norm(x, w, 1e-5), max(1e-6, torch.finfo(dtype).eps))
    same_codes(cpu.rms_norm(x, w, 1e-5, torch.tensor(30.0)), reference.rms_norm(x, w, 1e-5, torch.tensor(30.0)))
    got, scale = on_threads(lambda: cpu.rms_norm_per_token(x, w, 1e-5))
    want, want_scale = cpu.quantize_per_token(cpu.rms_norm(x, w.float(), 1e-5))
    assert torch.equal(got, want) and torch.equal(scale, want_scale)
    want, want_scale = reference.rms_norm_per_token(x, w, 1e-5)
    same_codes(got, want)
    torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("m", "k", "n"), [(64, 1, 1), (70, 33, 17), (65, 768, 700)])
def test_w8a8_linear_on_torchs_products(rng, m, k, n, monkeypatch):
    monkeypatch.setattr(importlib.import_module("quamba_kernels.cpu.linear"), "_torch_is_better", lambda isa: True)
    calls = []
    theirs = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: calls.append(x.shape) or theirs(x, w))
    x, w = codes(rng, m, k), codes(rng, n, k)
    s, bias = torch.rand(n, generator=rng), normal(rng, n)
    for x_scale in (torch.tensor(0.03), torch.rand(m, 1, generator=rng)):
        got = on_threads(lambda x_scale=x_scale: cpu.w8a8_linear(x, x_scale, w, s, bias))
        assert torch.equal(got, reference.w8a8_linear(x, x_scale, w, s, bias))
    inv = torch.rand(n, generator=rng)
    got = cpu.w8a8_linear(x.view(1, m, k), x_scale.view(1, m, 1), w, s, None, inv)
    assert torch.equal(got, reference.w8a8_linear(x.view(1, m, k), x_scale.view(1, m, 1), w, s, None, inv))
    assert calls and set(calls) == {(m, k)}


def test_torchs_products_have_to_be_exact_and_faster(monkeypatch):
    linear = importlib.import_module("quamba_kernels.cpu.linear")
    better = linear._torch_is_better.__wrapped__
    assert not better(b"portable")
    ours = linear.int8_matmul
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: ours(x, w.T))
    monkeypatch.setattr(linear, "int8_matmul", lambda x, w: time.sleep(0.05) or ours(x, w))
    assert better(b"avx512")
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: ours(x, w.T).clamp_(max=32767))
    assert not better(b"avx512")
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: time.sleep(0.2) or ours(x, w.T))
    assert not better(b"avx512")


def test_half_to_even_and_saturation():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 1e30, float("inf"), -128.5, -129.0, float("-inf")])
    x = torch.cat([x, x])  # once in whole registers, once in what is left
    assert cpu.quantize(x, torch.tensor(1.0)).tolist() == [-2, -2, 0, 0, 2, 2, 126, 127, 127, 127, -128, -128, -128] * 2


@pytest.mark.parametrize(
    ("n", "matrix", "blocks"),
    [(1536, "paley12", 1), (2560, "paley20", 1), (224, "paley28", 1), (2816, "paley44", 1), (36, None, 9), (7, None, 7)]
    + [(1 << k, None, 1) for k in range(14)],
)
def test_hadamard(rng, n, matrix, blocks):
    x, outer = normal(rng, 3, 2, n), None if matrix is None else outer_matrix(matrix)
    got = on_threads(lambda: cpu.hadamard(x, outer, blocks))
    close(got, reference.hadamard(x, outer, blocks), 2e-6)
    inv = torch.rand(n, generator=rng) * 40
    same_codes(cpu.hadamard(x, outer, blocks, inv), reference.hadamard(x, outer, blocks, inv))
    got, scale = on_threads(lambda: cpu.hadamard_per_token(x, outer, blocks))
    want, want_scale = cpu.quantize_per_token(cpu.hadamard(x, outer, blocks))
    assert torch.equal(got, want) and torch.equal(scale, want_scale)
    want, want_scale = reference.hadamard_per_token(x, outer, blocks)
    same_codes(got, want)
    torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=1e-9)
    if outer is not None:  # a view that has to be copied
        assert torch.equal(cpu.hadamard(x, outer.T, blocks), cpu.hadamard(x, outer.T.contiguous(), blocks))
        got, scale = cpu.hadamard_per_token(x, outer.T, blocks)
        want, want_scale = cpu.hadamard_per_token(x, outer.T.contiguous(), blocks)
        assert torch.equal(got, want) and torch.equal(scale, want_scale)
    half = cpu.hadamard(x.bfloat16(), outer, blocks)
    close(half, reference.hadamard(x.bfloat16(), outer, blocks), 2**-7)


# ---- all variants


def test_variants_give_the_same_bits(rng, variant):
    i, x = scan_case(rng, 2, 20, 37, 16), normal(rng, 5, 300)
    c, w, bias, state, scales = conv_case(rng, 2, 9, 40, 4, torch.int8)

    def everything():
        return [
            cpu.selective_scan(**i),
            cpu.causal_conv1d(c, w, bias, state=state.clone(), **scales),
            cpu.rms_norm(x, torch.ones(300), 1e-5),
            cpu.hadamard(x[:, :192], outer_matrix("paley12")),
        ]

    here = everything()
    with cpu.force_variant("portable"):
        assert all(torch.equal(a, b) for a, b in zip(here, everything(), strict=True))


def test_torchs_default_dtype_doesnt_matter(rng):
    """C writes float32; a result of the default dtype would be too short for it."""
    i, x = scan_case(rng, 1, 9, 33, 16), normal(rng, 5, 192)
    x_codes, w, s = codes(rng, 5, 33), codes(rng, 7, 33), torch.rand(7, generator=rng)
    packed, ids = reference.pack_int4(codes(rng, 7, 64).clamp_(-8, 7), 32), torch.tensor([1, 4])
    g, z, B = torch.ones(7, 2, dtype=torch.int8), normal(rng, 5, 192), normal(rng, 1, 5, 1, 8)
    many, many_codes = normal(rng, 40, 600), codes(rng, 7, 600)
    one = torch.ones(192, dtype=torch.float32)

    def everything():
        outer_matrix.cache_clear()
        return [
            cpu.selective_scan(**i),
            cpu.ssd_scan(
                x.view(1, 5, 12, 16), z[None, :, :12], -s[:1].expand(12), B, B, s[:1].expand(12), s[:1].expand(12)
            ),
            cpu.gate(x, z),
            cpu.gated_rms_norm(x, z, one, 1e-5),
            cpu.rms_norm(x, one, 1e-5),
            *cpu.rms_norm_per_token(x, one, 1e-5),
            *cpu.quantize_per_token(x),
            cpu.hadamard(x, outer_matrix("paley12")),
            cpu.linear(x[:2], z),
            cpu.w8a8_linear(x_codes, s[0], w, s),
            cpu.w8_linear(x[:, :33], w, s),
            cpu.w8_linear(many, many_codes, s),
            cpu.w4a8_linear(many_codes[:, :64].contiguous(), s[0], packed, g, s),
            cpu.embedding(ids, w, s),
        ]

    want = everything()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = everything()
    finally:
        torch.set_default_dtype(torch.float32)
        outer_matrix.cache_clear()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("call", "error", "why"),
    [
        (lambda x, w, s: cpu.w8a8_linear(x, 0.03, w, s), TypeError, "x_scale: expected float32, got float"),
        (
            lambda x, w, s: cpu.hadamard(s, torch.tensor(1.0)),
            ValueError,
            "outer: expected a tensor with at least one axis",
        ),
        (lambda x, w, s: cpu.hadamard(s, torch.ones(0, 0)), ValueError, "outer: has no entries"),
        (lambda x, w, s: cpu.hadamard(s, torch.ones(2, 3)), ValueError, "outer: expected shape"),
        (lambda x, w, s: cpu.hadamard_per_token(s, torch.ones(3, 3)), ValueError, "8 entries aren't"),
        (lambda x, w, s: cpu.rms_norm_per_token(s, torch.ones(7), 1e-5), ValueError, "weight: expected shape"),
    ],
)
def test_wrong_arguments_are_named(call, error, why):
    with pytest.raises(error, match=why):
        call(torch.zeros(2, 8, dtype=torch.int8), torch.zeros(8, 8, dtype=torch.int8), torch.ones(8))


def test_elementary_functions():
    """The errors stated in elementary.h."""
    from ctypes import POINTER, c_float, cast

    from quamba_kernels.cpu.library import library

    def call(name, x):
        y = torch.empty_like(x)
        pointers = (cast(t.data_ptr(), POINTER(c_float)) for t in (x, y))
        assert library().quamba_elementary(name.encode(), *pointers, x.numel()) == 0
        return y.double()

    wide, near = torch.linspace(-87, 88, 400_003), torch.linspace(-1, 1, 100_003)
    x = torch.cat([wide, near])
    d = x.double()
    stated = {
        "exp2": (torch.exp2(d), 2.0e-7),
        "exp": (d.exp(), 2.2e-7),
        "softplus": (torch.where(d > 0, d, 0) + torch.log1p((-d.abs()).exp()), 2.4e-7),
        "silu": (d / (1 + (-d).exp()), 2.6e-7),
    }
    for name, (want, error) in stated.items():
        assert ((call(name, x) - want).abs() <= error * want.abs()).all(), name
    edges = torch.tensor([0.0, -0.0, -90.0, float("-inf"), 90.0, float("inf"), float("nan")])
    want = edges.double().exp().float().double()
    torch.testing.assert_close(call("exp", edges), want, equal_nan=True, rtol=0, atol=1e-38)


@pytest.mark.parametrize("width", [1, 7, 16, 17, 40, 64])
@pytest.mark.parametrize("every", [True, False])
def test_nan_reaches_the_scale_of_its_token(width, every):
    x = torch.randn(3, width)
    x[1, slice(None) if every else width // 2] = float("nan")
    _, scale = cpu.quantize_per_token(x)
    assert scale[1].isnan().all() and torch.isfinite(scale[[0, 2]]).all()
