"""Recorded kernel calls do again what they did, and only what can be done again is recorded."""

import pytest
import torch
import torch.nn.functional as F

import quamba_kernels as kernels
from quamba_kernels import cpu, reference
from tests.kernels.agreement import close, codes, normal

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"no C++ kernels: {cpu.why_not()}")

HALVES = [torch.float16, torch.bfloat16]
ALL_BITS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


def record(function, *inputs, moving=()):
    _, recording = kernels.record(function, list(inputs), list(moving))
    assert not isinstance(recording, str), recording
    return recording


def check(function, x, others):
    """A recording of `function(x)` gives the same bits as calling it, for every content of x."""
    recording = record(lambda: function(x), x)
    for other in others:
        x.copy_(other)
        want = function(x).clone()
        got = recording.run([])
        assert got.dtype == want.dtype
        assert torch.equal(got, want) or torch.equal(got.isnan(), want.isnan())


def test_a_chain_of_kernels_and_small_operations(rng):
    weight, scale = codes(rng, 40, 24), torch.rand(40, generator=rng)

    def function(x):
        q, s = kernels.quantize_per_token(x.to(torch.bfloat16).float())
        y = kernels.w8a8_linear(q, s, weight, scale * 2)
        a, b = y.split([16, 24], dim=-1)
        turned = kernels.hadamard(a.unflatten(-1, (2, 8)), None).flatten(-2)
        return x + b.to(torch.float16).float() * kernels.rms_norm(b, scale[:24].exp(), 1e-5) + turned[:, :1]

    check(function, normal(rng, 3, 24), [normal(rng, 3, 24) for _ in range(3)])


@pytest.mark.parametrize("source", [*HALVES, torch.float32, torch.int8])
@pytest.mark.parametrize("target", [*HALVES, torch.float32])
def test_conversions(rng, source, target):
    """Every value of 8 and 16 bits; of float32 those near the halves' values and between them."""
    if source == torch.int8:
        x = torch.arange(-128, 128, dtype=torch.int8)
    elif source == torch.float32:
        near = ALL_BITS.view(torch.float16 if target == torch.float16 else torch.bfloat16).float()
        x = torch.cat([near, near * (1 + 2**-11), near * (1 + 2**-9), near * (1 - 2**-12), near + 1e-9, near * 1e30])
    else:
        x = ALL_BITS.view(source)
    held = torch.zeros_like(x)
    recording = record(lambda: held.to(target).clone(), held)
    held.copy_(x)
    got, want = recording.run([]), x.to(target)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.5), want.nan_to_num(0.5))


@pytest.mark.parametrize("op", [torch.add, torch.mul])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
)
def test_sums_and_products_of_any_strides(rng, op, dtypes):
    a, b = normal(rng, 2, 3, 5, 37).to(dtypes[0]), normal(rng, 37, 1, 3, 2).to(dtypes[1]).permute(3, 2, 1, 0)
    fresh = [normal(rng, 2, 3, 5, 37).to(dtypes[0]) for _ in range(2)]
    check(lambda x: op(x, b), a, fresh)
    check(lambda x: op(x[..., ::3], b[..., :13]), a, fresh)
    check(lambda x: op(x, torch.tensor(3.0, dtype=dtypes[1])), a, fresh)


def test_copies_into_what_stands(rng):
    x, held = normal(rng, 4, 6), torch.zeros(6, 4, dtype=torch.float16)

    def function():
        held.copy_(x.T)
        return x.clone()

    recording = record(function, x, held)
    x.copy_(normal(rng, 4, 6))
    assert torch.equal(recording.run([]), x)
    assert torch.equal(held, x.T.half())


def test_what_moves(rng):
    """A state may stand elsewhere in another run; slices of it move along."""
    weight, bias = normal(rng, 8, 4), normal(rng, 8)
    x = normal(rng, 2, 1, 8)
    states = [torch.zeros(2, 8, 3) for _ in range(3)]
    recording = record(lambda: kernels.causal_conv1d(x, weight, bias, state=states[0]), x, moving=[states[0]])
    for step in range(4):
        for state in (states[1], states[2], states[1]):
            x.copy_(normal(rng, 2, 1, 8))
            before = state.clone()
            want = kernels.causal_conv1d(x, weight, bias, state=before)
            assert torch.equal(recording.run([state]), want), step
            assert torch.equal(state, before)


def test_a_call_that_fails_is_named(rng):
    ids, table = torch.tensor([1, 2]), normal(rng, 5, 3)
    recording = record(lambda: kernels.embedding(ids, table), ids)
    assert torch.equal(recording.run([]), table[ids])
    ids[1] = 5
    with pytest.raises(IndexError, match="not in the table"):
        recording.run([])
    with pytest.raises(IndexError, match="not in the table"):
        kernels.embedding(ids, table)


FAILING = {
    "another operation": (lambda x: x.exp(), "aten.exp"),
    "a look at a value": (lambda x: x + 1 if x[0, 0] > 0 else x, "aten"),
    "in place": (lambda x: x.add_(1.0), "aten.add_"),
    "a number": (lambda x: x * 3.0, "aten.mul"),
    "an input": (lambda x: x.view(3, 2), "isn't made by the function"),
    "a constant": (lambda x: torch.ones(2), "isn't made by the function"),
    "columns": (lambda x: x.clone()[:, :1], "isn't contiguous"),
    "alpha": (lambda x: torch.add(x, x, alpha=2), "aten.add"),
    "integers": (lambda x: x.to(torch.int32), "int32"),
    "rounded to int8": (lambda x: x.to(torch.int8), "int8"),
}


@pytest.mark.parametrize("case", FAILING)
def test_what_cannot_be_recorded_says_why_and_still_runs(rng, case):
    function, why = FAILING[case]
    x = normal(rng, 2, 3)
    want = function(x.clone())
    got, problem = kernels.record(lambda: function(x), [x], [])
    assert torch.equal(got, want)
    assert isinstance(problem, str)
    assert why in problem


def test_the_reference_backend_records_nothing(rng):
    x = normal(rng, 2, 3)
    with kernels.backend("reference"):
        got, problem = kernels.record(lambda: kernels.rms_norm(x, torch.ones(3), 1e-5), [x], [])
    assert problem == "torch reference kernels can't be recorded"
    close(got, kernels.rms_norm(x, torch.ones(3), 1e-5))


def test_constants_are_computed_once(rng):
    """Work on parameters alone isn't repeated: a change of them goes unnoticed here, as documented."""
    x, weight = normal(rng, 2, 6), torch.ones(6)
    recording = record(lambda: kernels.rms_norm(x, weight.exp(), 1e-5), x)
    want = recording.run([])
    weight.zero_()
    assert torch.equal(recording.run([]), want)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 37, 9), (2, 64, 4), (3, 129, 70), (4, 16, 1), (1, 1, 5)])
def test_linear_with_float_weights(rng, dtype, rows, inputs, outputs):
    x, weight, bias = normal(rng, rows, inputs), normal(rng, outputs, inputs).to(dtype), normal(rng, outputs).to(dtype)
    truth = F.linear(x.to(dtype).double(), weight.double(), bias.double())
    got = cpu.linear(x, weight, bias)
    assert got.dtype == dtype
    close(got.float(), truth.to(dtype).float(), {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype])
    assert torch.equal(got, torch.cat([cpu.linear(row, weight, bias)[None] for row in x]))
    close(cpu.linear(x, weight).float(), (truth - bias.double()).to(dtype).float(), 8e-3)


@pytest.mark.usefixtures("variant", "poisoned")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8", "int4", "int4 float"])
def test_embedding(rng, kind):
    ids, width = torch.randint(0, 7, (3, 5), generator=rng), 70
    if kind.startswith("int4"):
        q = torch.randint(-8, 8, (7, width), generator=rng, dtype=torch.int8)
        multipliers = torch.randint(-15, 16, (7, 3), generator=rng, dtype=torch.int8)
        groups = multipliers.half() / 7 if "float" in kind else multipliers
        arguments = (reference.pack_int4(q, 32), torch.rand(7, generator=rng), groups, width)
    elif kind == "int8":
        arguments = (codes(rng, 7, width), torch.rand(7, generator=rng))
    else:
        arguments = (normal(rng, 7, width).to(getattr(torch, kind)),)
    got, want = cpu.embedding(ids, *arguments), reference.embedding(ids, *arguments)
    assert got.shape == (3, 5, width)
    if kind == "int4 float":
        close(got, want, 1e-6)
    else:
        assert torch.equal(got, want)
    assert torch.equal(cpu.embedding(ids.int(), *arguments), got)
    assert cpu.embedding(ids[:0], *arguments).shape == (0, 5, width)
    for bad in (-1, 7):
        with pytest.raises(IndexError):
            cpu.embedding(torch.tensor([bad]), *arguments)


@pytest.mark.usefixtures("variant", "poisoned")
def test_gate(rng):
    x, z, scale = normal(rng, 3, 37), codes(rng, 3, 37), torch.rand(37, generator=rng)
    real = z.double() * scale.double()
    close(cpu.gate(x, z, z_scale=scale).double(), x.double() * real * torch.sigmoid(real), 1e-6)
    close(
        cpu.gate(x[:, ::2].half(), z[:, ::2].half()).double(),
        x[:, ::2].half().double() * F.silu(z[:, ::2].double()),
        1e-6,
    )
    with pytest.raises(ValueError, match="z_scale"):
        cpu.gate(x, z)
