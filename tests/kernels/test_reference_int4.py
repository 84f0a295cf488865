"""int4 weights against plain Python: packing, expansion, both linears and the embedding."""

import pytest
import torch

import quamba_kernels as kernels

GROUPS = [32, 64, 128]
SHAPES = [(1, 32), (3, 128), (5, 33), (7, 300), (2, 1), (4, 257)]  # [N, K]


@pytest.fixture(autouse=True)
def on_reference():
    with kernels.backend("reference"):
        yield


def weight(rng, outputs, inputs, group, kind=torch.int8):
    """q, g, s and the packed q; a negative multiplier in every row, a row of zeros at the end."""
    groups = -(-inputs // group)
    q = torch.randint(-8, 8, (outputs, inputs), generator=rng, dtype=torch.int8)
    if kind == torch.int8:
        g = torch.randint(1, 16, (outputs, groups), generator=rng, dtype=torch.int8)
        g[:, 0] = -15
    else:
        g = (torch.rand(outputs, groups, generator=rng) * 24).half()  # 8 * 24 saturates
        g[:, 0] *= -1
    q[-1] = 0
    return q, g, torch.rand(outputs, generator=rng) / 50 + 1e-3, kernels.pack_int4(q, group)


def real(q, g, s, group):
    """The definition, entry by entry, in double precision."""
    return torch.tensor(
        [[float(s[n]) * float(g[n, k // group]) * int(q[n, k]) for k in range(q.shape[1])] for n in range(q.shape[0])],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("group", GROUPS)
def test_layout(group):
    """All 16 x 16 pairs of codes, where the contract says that they lie."""
    for low in range(-8, 8):
        for high in range(-8, 8):
            q = torch.zeros(1, 2 * group, dtype=torch.int8)
            q[0, group + 5], q[0, group + 5 + group // 2] = low, high
            packed = kernels.pack_int4(q, group)
            want = [0] * group
            want[group // 2 + 5] = (low & 15) | (high & 15) << 4
            assert packed.dtype == torch.uint8 and packed.tolist() == [want]
            assert torch.equal(kernels.unpack_int4(packed, 2 * group, group), q)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (0, 40), (3, 0)])
def test_round_trip(rng, group, n, k):
    q = torch.randint(-8, 8, (n, k), generator=rng, dtype=torch.int8)
    packed = kernels.pack_int4(q, group)
    assert packed.shape == (n, -(-k // group) * group // 2)
    assert torch.equal(kernels.unpack_int4(packed, k, group), q)
    turned = kernels.pack_int4(q.T.contiguous().T, group)
    assert torch.equal(turned, packed)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_integer_multipliers_expand_exactly(rng, group, n, k):
    q, g, _, packed = weight(rng, n, k, group)
    want = [[int(g[i, j // group]) * int(q[i, j]) for j in range(k)] for i in range(n)]
    assert kernels.expand_int4(packed, g, k).tolist() == want


def test_every_product_of_a_multiplier_and_a_code():
    q = torch.arange(-8, 8, dtype=torch.int8).repeat(31, 2)
    g = torch.arange(-15, 16, dtype=torch.int8)[:, None]
    assert torch.equal(kernels.expand_int4(kernels.pack_int4(q, 32), g, 32).int(), q.int() * g.int())


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_float_scales_round_to_the_nearest_code(rng, group, n, k):
    q, g, s, packed = weight(rng, n, k, group, torch.float16)
    got = kernels.expand_int4(packed, g, k)
    product = real(q, g, torch.ones(n), group)
    assert got.dtype == torch.int8 and torch.equal(got.double(), product.clamp(-128, 127).round())
    apart = (got.double() - product.clamp(-128, 127)).abs() * s.double()[:, None]
    assert (apart <= s.double()[:, None] / 2).all()


def test_float_scales_half_to_even_and_saturation():
    q = torch.tensor([[1, 3, 5, -1, -3, 7, -8, 0]], dtype=torch.int8)
    packed = kernels.pack_int4(q, 32)
    assert kernels.expand_int4(packed, torch.tensor([[0.5]]).half(), 8).tolist() == [[0, 2, 2, 0, -2, 4, -4, 0]]
    assert kernels.expand_int4(packed, torch.tensor([[40.0]]).half(), 8).tolist() == [
        [40, 120, 127, -40, -120, 127, -128, 0]
    ]


@pytest.mark.parametrize("kind", [torch.int8, torch.float16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_w4a8_linear_is_integer_arithmetic(rng, kind, n, k):
    _, g, s, packed = weight(rng, n, k, 64, kind)
    x = torch.randint(-128, 128, (2, 3, k), generator=rng, dtype=torch.int8)
    expanded = kernels.expand_int4(packed, g, k)
    acc = torch.tensor(
        [
            [[sum(a * b for a, b in zip(row, w, strict=True)) for w in expanded.tolist()] for row in rows]
            for rows in x.tolist()
        ]
    )
    bias, inv = torch.randn(n, generator=rng), torch.rand(n, generator=rng) * 20
    for x_scale in (torch.tensor(0.013), torch.rand(2, 3, 1, generator=rng)):
        y = (acc.float() * s) * x_scale
        assert torch.equal(kernels.w4a8_linear(x, x_scale, packed, g, s), y)
        assert torch.equal(kernels.w4a8_linear(x, x_scale, packed, g, s, bias), y + bias)
        codes = ((y + bias) * inv).clamp(-128, 127).round().to(torch.int8)
        assert torch.equal(kernels.w4a8_linear(x, x_scale, packed, g, s, bias, inv), codes)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", [torch.int8, torch.float16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_w4_linear(rng, group, kind, n, k):
    q, g, s, packed = weight(rng, n, k, group, kind)
    x, bias = torch.randn(2, 3, k, generator=rng), torch.randn(n, generator=rng)
    want = x.double() @ real(q, g, s, group).T
    got = kernels.w4_linear(x, packed, g, s)
    assert got.dtype == torch.float32 and (got[..., -1] == 0).all()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * (1 + want.abs().max().item()))
    torch.testing.assert_close(kernels.w4_linear(x, packed, g, s, bias), got + bias)
    inv = torch.tensor(9.0)
    assert torch.equal(kernels.w4_linear(x, packed, g, s, bias, inv), kernels.quantize(got + bias, inv))


@pytest.mark.parametrize("kind", [torch.int8, torch.float16])
@pytest.mark.parametrize("ids", [[[0, 4], [6, 6]], [], 3])
def test_integer_embeddings(rng, kind, ids):
    q, g, s, packed = weight(rng, 7, 70, 32, kind)
    ids = torch.tensor(ids, dtype=torch.long)
    want = real(q, g, s, 32)[ids]
    got = kernels.embedding(ids, packed, s, g, width=70)
    assert got.dtype == torch.float32 and got.shape == (*ids.shape, 70)
    torch.testing.assert_close(got.double(), want, rtol=2e-7, atol=0)
    codes = torch.randint(-128, 128, (7, 5), generator=rng, dtype=torch.int8)
    rows = kernels.embedding(ids, codes, s)
    assert rows.dtype == torch.float32 and torch.equal(rows, (codes.float() * s[:, None])[ids])


def test_malformed_calls(rng):
    q, g, s, packed = weight(rng, 4, 70, 32)
    x = torch.randn(2, 70, generator=rng)
    for bad in (torch.full((1, 32), 8, dtype=torch.int8), torch.full((1, 32), -9, dtype=torch.int8)):
        with pytest.raises(ValueError, match="codes"):
            kernels.pack_int4(bad, 32)
    with pytest.raises(TypeError, match="codes"):
        kernels.pack_int4(q.float(), 32)
    with pytest.raises(ValueError, match="group: 16"):
        kernels.pack_int4(q, 16)
    with pytest.raises(ValueError, match="packed"):
        kernels.unpack_int4(packed, 97, 32)
    for wrong in (g[:, :2], g[:, :0], torch.cat([g, g], 1)):
        with pytest.raises(ValueError, match="group_scale"):
            kernels.expand_int4(packed, wrong, 70)
    with pytest.raises(ValueError, match="group_scale"):
        kernels.w4_linear(x[:, :40], packed, g, s)
    ids = torch.tensor([0])
    for args in ((q,), (q.float(), s), (packed, s), (packed, s, g), (q, s, g, 70)):
        with pytest.raises(TypeError, match="weight"):
            kernels.embedding(ids, *args)
