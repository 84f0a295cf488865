"""The C++ kernels of int4 and weight-only linears against the reference, for every variant this machine runs."""

import importlib

import pytest
import torch

from quamba_kernels import cpu, reference
from tests.kernels.agreement import close, codes, normal, on_threads, same_codes

linear = importlib.import_module("quamba_kernels.cpu.linear")  # the package has the op of this name
pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason=f"no C++ kernels: {cpu.why_not()}"),
    pytest.mark.usefixtures("variant", "poisoned"),
]

# rows of x, inputs, outputs: tiles of 1 to 4 rows, a chunk and more, panels that are cut short
SHAPES = [
    (1, 768, 259),
    (1, 1, 1),
    (1, 4000, 131),
    (1, 1300, 7),
    (2, 31, 5),
    (3, 33, 4),
    (4, 333, 131),
    (13, 257, 70),
    (37, 999, 300),
    (37, linear.FEW_INPUTS + 1, 30),
]
KINDS = [torch.int8, torch.float16]


def weight(rng, outputs, inputs, group, kind):
    """packed, group_scale, weight_scale; all 16 codes, scales of both signs, float ones that saturate."""
    groups = -(-inputs // group)
    q = torch.randint(-8, 8, (outputs, inputs), generator=rng, dtype=torch.int8)
    q[-1] = 0
    if kind == torch.int8:
        g = torch.randint(-15, 16, (outputs, groups), generator=rng, dtype=torch.int8)
    else:
        g = (normal(rng, outputs, groups) * 10).half()
        g[0, 0] = 0.5  # halves to round
    return reference.pack_int4(q, group), g, torch.rand(outputs, generator=rng) / inputs + 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (31, 5), (128, 7), (200, 3), (768, 640), (64, 0)])
def test_expand_int4(rng, k, n, group, kind):
    if n == 0:
        packed, g = torch.zeros(0, group // 2, dtype=torch.uint8), torch.zeros(0, 1, dtype=kind)
        assert cpu.expand_int4(packed, g, min(k, group)).shape == (0, min(k, group))
        return
    packed, g, _ = weight(rng, n, k, group, kind)
    assert torch.equal(on_threads(lambda: cpu.expand_int4(packed, g, k)), reference.expand_int4(packed, g, k))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_w4a8_linear(rng, m, k, n, group, kind):
    packed, g, s = weight(rng, n, k, group, kind)
    x, bias = codes(rng, m, k), normal(rng, n)
    x[0, 0] = -128
    for x_scale in (torch.tensor(0.03), torch.rand(m, 1, generator=rng)):
        # Equal, not close: exact sums, and the same roundings in the same order.
        got = on_threads(lambda x_scale=x_scale: cpu.w4a8_linear(x, x_scale, packed, g, s, bias))
        assert torch.equal(got, reference.w4a8_linear(x, x_scale, packed, g, s, bias))
    inv = torch.rand(n, generator=rng) * 30
    got = cpu.w4a8_linear(x, x_scale, packed, g, s, None, inv)
    assert torch.equal(got, reference.w4a8_linear(x, x_scale, packed, g, s, None, inv))


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("rows", [1, 2, 41])
def test_extreme_products_do_not_saturate(group, rows):
    one = torch.tensor(1.0)
    for code, multiplier in ((-8, 15), (-8, -15), (7, 15), (7, -15)):
        packed = reference.pack_int4(torch.full((5, 1000), code, dtype=torch.int8), group)
        g = torch.full((5, -(-1000 // group)), multiplier, dtype=torch.int8)
        for value in (-128, 127):
            x = torch.full((rows, 1000), value, dtype=torch.int8)
            got = cpu.w4a8_linear(x, one, packed, g, torch.ones(5))
            assert got.tolist() == [[1000.0 * code * multiplier * value] * 5] * rows


@pytest.mark.parametrize("rows", [1, 2])
def test_float_scales_that_saturate(rows):
    one, x = torch.tensor(1.0), torch.full((rows, 64), -128, dtype=torch.int8)
    for code, scale in ((-8, 65504.0), (7, 65504.0), (-8, 16.0), (3, 0.5), (-1, 0.5)):
        packed = reference.pack_int4(torch.full((3, 64), code, dtype=torch.int8), 32)
        g = torch.full((3, 2), scale).half()
        want = max(-128, min(127, round(code * scale))) * -128.0 * 64
        assert cpu.w4a8_linear(x, one, packed, g, torch.ones(3)).tolist() == [[want] * 3] * rows


@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_w8_linear(rng, m, k, n, dtype, few, monkeypatch):
    monkeypatch.setattr(linear, "FEW_ROWS", few)
    monkeypatch.setattr(linear, "PANEL", 100)
    x, w, s, bias = normal(rng, m, k).to(dtype), codes(rng, n, k), torch.rand(n, generator=rng) / k, normal(rng, n)
    for b in (None, bias):
        run = lambda b=b: cpu.w8_linear(x, w, s, b)  # noqa: E731
        close(on_threads(run) if few else run(), reference.w8_linear(x, w, s, b))
    for inv in (torch.tensor(20.0), torch.rand(n, generator=rng) * 30):
        same_codes(cpu.w8_linear(x, w, s, bias, inv), reference.w8_linear(x, w, s, bias, inv))


@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_w4_linear(rng, m, k, n, group, kind, few, monkeypatch):
    monkeypatch.setattr(linear, "FEW_ROWS", few)
    monkeypatch.setattr(linear, "PANEL", 100)
    packed, g, s = weight(rng, n, k, group, kind)
    x, bias = normal(rng, m, k), normal(rng, n)
    run = lambda: cpu.w4_linear(x, packed, g, s, bias)  # noqa: E731
    close(on_threads(run) if few else run(), reference.w4_linear(x, packed, g, s, bias))
    inv = torch.tensor(20.0)
    same_codes(cpu.w4_linear(x, packed, g, s, None, inv), reference.w4_linear(x, packed, g, s, None, inv))


def test_rows_do_not_depend_on_each_other(rng):
    """A row gives the same bits alone and among any few others."""
    packed, g, s = weight(rng, 70, 200, 32, torch.float16)
    x, w = normal(rng, 7, 200), codes(rng, 70, 200)
    for run in (lambda x: cpu.w4_linear(x, packed, g, s), lambda x: cpu.w8_linear(x, w, s)):
        alone = torch.cat([run(x[i : i + 1]) for i in range(7)])
        assert all(torch.equal(run(x[:rows]), alone[:rows]) for rows in range(1, 8))


@pytest.mark.parametrize("inputs", [1, 24, 200, linear.FEW_INPUTS])
def test_int8_weights_with_few_inputs_give_a_row_the_same_bits_among_any_number(rng, inputs):
    x, w, s = normal(rng, 67, inputs), codes(rng, 37, inputs), torch.rand(37, generator=rng)
    whole = cpu.w8_linear(x, w, s)
    assert all(torch.equal(cpu.w8_linear(x[:rows], w, s), whole[:rows]) for rows in (1, 2, 3, 17, 64))


def test_views_batches_and_no_rows(rng):
    packed, g, s = weight(rng, 24, 70, 32, torch.int8)
    wide = torch.cat([packed, packed], 1)[:, : packed.shape[1]]
    x = normal(rng, 2, 3, 140)[:, :, ::2]
    assert not wide.is_contiguous() and not x.is_contiguous()
    assert torch.equal(cpu.w4_linear(x, wide, g, s), cpu.w4_linear(x.contiguous(), packed, g, s))
    assert cpu.w4_linear(x[:0], packed, g, s).shape == (0, 3, 24)
    c, one = codes(rng, 2, 3, 70), torch.tensor(1.0)
    assert torch.equal(cpu.w4a8_linear(c, one, wide, g, s), reference.w4a8_linear(c, one, packed, g, s))
    assert cpu.w4a8_linear(c[:0], one, packed, g, s).shape == (0, 3, 24)
    w = codes(rng, 70, 24).T
    close(cpu.w8_linear(x, w, s), reference.w8_linear(x, w, s))


def test_variants_give_the_same_bits(rng):
    x, w = normal(rng, 3, 300), codes(rng, 41, 300)
    packed, g, s = weight(rng, 41, 300, 32, torch.float16)
    products, m, _ = weight(rng, 41, 300, 64, torch.int8)

    def everything():
        return [cpu.w8_linear(x, w, s), cpu.w4_linear(x, packed, g, s), cpu.w4_linear(x, products, m, s)]

    here = everything()
    with cpu.force_variant("portable"):
        assert all(torch.equal(a, b) for a, b in zip(here, everything(), strict=True))
