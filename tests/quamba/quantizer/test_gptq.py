"""GPTQ: the Hessian, and weights rounded for small errors of the outputs."""

import math

import pytest
import torch

import quamba_kernels as kernels
from quamba.errors import QuambaError
from quamba.plan import WeightSpec
from quamba.quantizer import gptq as module
from quamba.quantizer.gptq import Hessian, gptq, inverse_root
from quamba.quantizer.weights import dequantize_weight, quantize_weight

INT4 = [WeightSpec(4), WeightSpec(4, group=64, group_scale="float"), WeightSpec(4, group=128)]
SPECS = [WeightSpec(8), WeightSpec(8, axis="split"), WeightSpec(8, axis="tensor"), *INT4]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(inputs, tokens=2000):
    """Inputs of different size that say much the same."""
    return (randn(tokens, inputs, seed=1) * randn(inputs, seed=2).exp()) @ randn(inputs, inputs, seed=3) / inputs


def hessian_of(x):
    hessian = Hessian(x.shape[-1])
    hessian.add(x)
    return hessian


def options_of(spec, weight):
    return {"splits": (3, len(weight) - 3)} if spec.axis == "split" else {}


def output_error(found, spec, weight, x):
    """Mean squared error of the outputs, relative to their mean square."""
    y = x.double() @ weight.double().T
    got = x.double() @ dequantize_weight(found, spec, weight.shape[1]).double().T
    return ((got - y).square().mean() / y.square().mean()).item()


def codes_of(found, spec, inputs):
    if spec.bits == 8:
        return found["weight"]
    return kernels.unpack_int4(found["weight_packed"], inputs, spec.group)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def naive_gptq(weight, step, x, low, high, damping, order=None):
    """Optimal brain surgery as the paper derives it (equations 2 and 3): round an input, let all the others make up for
    it by the inverse Hessian, eliminate the input from that. `step` `[out, in]`; float64, without Cholesky or blocks."""
    weight, step = weight.double().clone(), step.double()
    hessian = 2 / len(x) * x.double().T @ x.double()
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    inverse = hessian.inverse()
    codes = torch.zeros_like(weight)
    for k in range(weight.shape[1]) if order is None else order:
        codes[:, k] = (weight[:, k] / step[:, k]).round().clamp(low, high)
        error = (weight[:, k] - codes[:, k] * step[:, k]) / inverse[k, k]
        weight -= error[:, None] * inverse[k]
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return codes.to(torch.int8)


# The Hessian


def test_hessian_is_twice_the_mean_outer_product():
    x = randn(3, 5, 7)
    hessian = Hessian(7)
    hessian.add(x[:1])
    hessian.add(x[1:].to(torch.float64))
    rows = x.view(15, 7).double()
    expected = sum(torch.outer(row, row) for row in rows) * 2 / 15
    assert hessian.count == 15 and hessian.matrix().dtype == torch.float64
    torch.testing.assert_close(hessian.matrix(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hessian.diagonal(), rows.square().mean(0), rtol=1e-6, atol=0)


def test_hessian_refuses_broken_or_missing_inputs():
    hessian = Hessian(4)
    with pytest.raises(QuambaError, match="has seen no inputs"):
        hessian.matrix()
    for bad in (math.nan, math.inf, 1e30):
        x = torch.ones(3, 4)
        x[1, 2] = bad
        with pytest.raises(QuambaError, match="NaN or infinite"):
            hessian.add(x)
    assert hessian.count == 0


def test_inverse_root_is_the_upper_cholesky_factor_of_the_inverse():
    x = randn(50, 9).double()
    matrix = x.T @ x
    matrix[:, 4] = matrix[4] = 0
    damped = matrix.clone()
    damped[4, 4] = 1
    damped += 0.01 * damped.diagonal().mean() * torch.eye(9)
    upper = inverse_root(matrix, 0.01)
    torch.testing.assert_close(upper, torch.linalg.cholesky(damped.inverse(), upper=True))


def test_damping_is_raised_until_it_suffices():
    """Eigenvalues 2 and -0.6 with a mean diagonal of 0.7: a damping of 0.01 or 0.1 is too little, 1 is enough."""
    matrix = torch.tensor([[0.7, 1.3], [1.3, 0.7]]).double()
    upper = inverse_root(matrix, 0.01)
    torch.testing.assert_close((upper.T @ upper).inverse(), matrix + 0.7 * torch.eye(2))
    with pytest.raises(
        QuambaError, match=r"Hessian of 2 inputs can't be inverted, even with damping 10:.*gptq.damping"
    ):
        inverse_root(torch.tensor([[1.0, 100.0], [100.0, 1.0]]).double(), 0.01)


# Rounding


@pytest.mark.parametrize("act_order", [False, True])
def test_codes_equal_the_papers_recursion(act_order, monkeypatch):
    """Blocks of 128 columns with lazy updates, in float32, against the whole inverse, updated at every column."""
    weight, x = randn(6, 300), correlated(300)
    hessian, spec = hessian_of(x), WeightSpec(8)
    monkeypatch.setattr(module, "ROWS", 4)
    found = gptq(weight, spec, hessian, clip="absmax", damping=0.02, act_order=act_order)
    order = x.square().mean(0).argsort(descending=True).tolist() if act_order else None
    step = (weight.abs().amax(1) / 127)[:, None].expand(-1, 300)
    torch.testing.assert_close(found["weight_scale"], step[:, 0])
    expected = naive_gptq(weight, step, x, -127, 127, 0.02, order)
    # Float32 may put a weight on the other side of a boundary, here and there.
    apart = (found["weight"].int() - expected.int()).abs()
    assert (apart > 0).float().mean() < 0.01 and apart.max() <= 1
    assert (found["weight"] != quantize_weight(weight, spec, clip="absmax")["weight"]).float().mean() > 0.15


def test_static_groups_follow_the_papers_recursion():
    """int4 with act_order: scales of the original weight, weighed by the inputs, columns in any order."""
    weight, x, spec = randn(5, 150), correlated(150), WeightSpec(4)
    hessian = hessian_of(x)
    found = gptq(weight, spec, hessian, act_order=True)
    plain = quantize_weight(weight, spec, importance=hessian.diagonal())
    for name in ("weight_scale", "weight_group_scale"):
        assert torch.equal(found[name], plain[name])
    step = (plain["weight_scale"][:, None] * plain["weight_group_scale"]).repeat_interleave(32, 1)[:, :150]
    order = x.square().mean(0).argsort(descending=True).tolist()
    expected = naive_gptq(weight, step, x, -8, 7, 0.01, order)
    assert (codes_of(found, spec, 150) != expected).float().mean() < 0.02


@pytest.mark.parametrize("clip", ["absmax", "search"])
def test_group_scales_come_from_what_is_left_of_the_weights(clip):
    """Two groups: the second one's scale is chosen after the first one's errors have been made up for."""
    weight, x, spec = randn(5, 64), correlated(64), WeightSpec(4, group_scale="float")
    hessian = hessian_of(x)
    found = gptq(weight, spec, hessian, clip=clip)
    first = quantize_weight(weight[:, :32], spec, clip=clip, importance=hessian.diagonal()[:32])
    assert torch.equal(codes_of(found, spec, 64)[:, 0], codes_of(first, spec, 32)[:, 0])

    # What the second group is when the first one is fixed: least squares, damped, for its weights.
    matrix = hessian.matrix()
    matrix += 0.01 * matrix.diagonal().mean() * torch.eye(64)
    done = dequantize_weight(found, spec, 64)[:, :32].double()
    rest = weight[:, 32:].double() + (weight[:, :32] - done) @ matrix[:32, 32:] @ matrix[32:, 32:].inverse()
    second = quantize_weight(rest.float(), spec, clip=clip, importance=hessian.diagonal()[32:])
    steps = [t["weight_scale"] * t["weight_group_scale"][:, -1].float() for t in (found, second)]
    torch.testing.assert_close(*steps, rtol=3e-3, atol=0)  # float16, in two levels
    untouched = quantize_weight(weight[:, 32:], spec, clip=clip, importance=hessian.diagonal()[32:])
    assert (steps[0] - untouched["weight_scale"] * untouched["weight_group_scale"][:, 0]).abs().max() > 0.01 * steps[
        0
    ].abs().max()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("clip", ["absmax", "search"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_outputs_err_less_than_rounded_to_nearest(spec, clip, act_order):
    """T17, and by a good deal: here the inputs are correlated. Bits are what the spec says, whatever the columns' order."""
    weight, x = randn(24, 200), correlated(200)
    more = options_of(spec, weight)
    found = gptq(weight, spec, hessian_of(x), clip=clip, act_order=act_order, **more)
    plain = quantize_weight(weight, spec, clip=clip, **more)
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in plain.items()}
    assert output_error(found, spec, weight, x) < 0.5 * output_error(plain, spec, weight, x)

    codes = codes_of(found, spec, 200)
    low, high = {8: (-127, 127), 4: (-8, 7)}[spec.bits]
    assert low <= codes.min() and codes.max() <= high
    if spec.bits == 4:
        assert int(codes.abs().max()) == 8
        value = kernels.expand_int4(found["weight_packed"], found["weight_group_scale"], 200)
        factor = found["weight_group_scale"].double().repeat_interleave(spec.group, 1)[:, :200]
        assert torch.equal(value.double(), (codes * factor).round())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("clip", ["absmax", "search"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_independent_inputs_of_one_size_leave_nothing_to_gain(spec, clip, act_order):
    weight = randn(10, 150)
    more = options_of(spec, weight)
    found = gptq(weight, spec, hessian_of(torch.eye(150)), clip=clip, act_order=act_order, **more)
    assert same(found, quantize_weight(weight, spec, clip=clip, **more))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_inputs_that_are_always_zero(spec, act_order):
    """Their weights become 0, large as they are; the others are what they'd be if those had been 0 all along."""
    weight, x = randn(8, 160), correlated(160)
    dead = torch.arange(160) % 7 == 3
    dead[64:128] = True
    x[:, dead] = 0
    hollow, large = weight * ~dead, weight + 100 * dead
    options = {"act_order": act_order} | options_of(spec, weight)
    found = gptq(large, spec, hessian_of(x), **options)
    assert (dequantize_weight(found, spec, 160)[:, dead] == 0).all()
    assert all(torch.isfinite(t.float()).all() for t in found.values())
    assert same(found, gptq(hollow, spec, hessian_of(x), **options))
    assert output_error(found, spec, large, x) < output_error(
        quantize_weight(hollow, spec, **options_of(spec, weight)), spec, large, x
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_input_at_all(spec):
    weight = randn(6, 70)
    found = gptq(weight, spec, hessian_of(torch.zeros(3, 70)), **options_of(spec, weight))
    assert (dequantize_weight(found, spec, 70) == 0).all()


@pytest.mark.parametrize("spec", INT4, ids=str)
def test_fewer_samples_than_inputs(spec):
    weight, x = randn(8, 140), correlated(140, tokens=5)
    found = gptq(weight, spec, hessian_of(x))
    assert output_error(found, spec, weight, x) < 0.5 * output_error(quantize_weight(weight, spec), spec, weight, x)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_same_again(spec):
    """T19; and the weight and the Hessian are left as they were."""
    weight, x = randn(8, 130), correlated(130)
    hessian = hessian_of(x)
    before, matrix = weight.clone(), hessian.matrix()
    first = gptq(weight, spec, hessian, **options_of(spec, weight))
    assert torch.equal(weight, before) and torch.equal(hessian.matrix(), matrix)
    assert same(first, gptq(weight, spec, hessian_of(x), **options_of(spec, weight)))


def test_scale_of_weights_and_inputs_does_not_matter():
    weight, x = randn(8, 96), correlated(96)
    for spec in SPECS:
        more = options_of(spec, weight)
        found, other = gptq(weight, spec, hessian_of(x), **more), gptq(weight / 64, spec, hessian_of(x * 16), **more)
        assert torch.equal(found.pop("weight_scale"), other.pop("weight_scale") * 64)
        assert same(found, other)


def test_half_precision_weights():
    weight, x, spec = randn(8, 96).half(), correlated(96), WeightSpec(4)
    assert same(gptq(weight, spec, hessian_of(x)), gptq(weight.float(), spec, hessian_of(x)))
