"""What quantization promises as a whole: what GPTQ and the observers are shown, and what becomes of it."""

import dataclasses

import pytest
import torch

import quamba
import quamba_kernels as kernels
from quamba import Recipe
from quamba.plan import WeightSpec
from quamba.qtensor import real
from quamba.quantizer import block as block_module
from quamba.quantizer import vocabulary
from quamba.quantizer.weights import dequantize_weight, quantize_weight
from tests.quamba.models import random_model


def ids_of(model, rows=4, length=48):
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(5))


def spy_on(monkeypatch, module):
    """What each Hessian that `module` makes from now on is given: a list of float `[B, L, in]`, one for each Hessian."""
    given = []

    class Spy(module.Hessian):
        def __init__(self, inputs):
            super().__init__(inputs)
            given.append([])
            self.seen = given[-1]

        def add(self, x):
            self.seen.append(x.clone())
            super().add(x)

    monkeypatch.setattr(module, "Hessian", Spy)
    return given


def inputs_and_output(run, x, modules):
    """The real values that each of `modules` is given in `run(x)`, and what that returns."""
    seen = []
    handles = [m.register_forward_pre_hook(lambda _, args: seen.append(real(args[0]).clone())) for m in modules]
    try:
        y = run(x)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == len(modules)
    return seen, y


def distance(x, y):
    return ((x - y).norm() / y.norm()).item()


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_hessians_are_of_the_inputs_that_the_quantized_model_has(family, monkeypatch):
    """Behind blocks already quantized, and behind all that comes before a weight in its own block: of the artifact, that
    is the same, so a hook in it sees what the Hessian was given."""
    model = random_model(family, hidden=40, mlp=24 if family == "mamba2" else None)
    ids, given = ids_of(model), spy_on(monkeypatch, block_module)
    quantized = quamba.quantize(model, "w4a8", calibration=ids)
    names = {
        "mamba1": ["mixer.in_proj", "mixer.x_proj", "mixer.out_proj"],
        "mamba2": ["mixer.in_proj", "mixer.out_proj", "mlp.fc1", "mlp.fc2"],
    }[family]
    assert len(given) == 2 * len(names)
    x, blocks, wrong = quantized.backbone.embedding(ids), list(quantized.backbone.layers), {}
    for index, (block, source) in enumerate(zip(blocks, model.backbone.layers, strict=True)):
        modules = [block.get_submodule(name) for name in names]
        assert all(module.spec.bits == 4 for module in modules)
        (floating,), _ = inputs_and_output(source, x, [source.mixer.out_proj])
        expected, x = inputs_and_output(block, x, modules)
        for name, want in zip(names, expected, strict=True):
            off = distance(torch.cat(given.pop(0)), want)
            if off > 1e-6:
                wrong[f"block {index}, {name}"] = f"{off:.2%}"
            if name == "mixer.out_proj":  # the float block's is near, but not the same
                assert 0.01 < distance(want, block.mixer.rotation.turn(floating)) < 0.5
    assert not wrong


def peaking(family):
    """A model of one block, whose state forgets half in two tokens, and whose token 0 is loud and the others silent."""
    model = random_model(family, inner=64, layers=1, tied=False)
    mixer = model.backbone.layers[0].mixer
    with torch.no_grad():
        model.backbone.embedding.weight[1:] *= 1e-6  # far below the norm's epsilon
        mixer.conv1d.bias.zero_()
        mixer.A_log.fill_(0.0)
        (mixer.dt_proj.bias if family == "mamba1" else mixer.dt_bias).fill_(-1.0)
    return model


@pytest.mark.parametrize("start", [5, 22])
@pytest.mark.parametrize("family, recipe", [("mamba1", "quamba1-w8a8"), ("mamba2", "quamba2-w8a8")])
def test_the_state_is_observed_along_the_whole_sequence(family, recipe, start):
    """Sixteen loud tokens, then silence, in which the state decays to nothing before calibration's window ends."""
    model = peaking(family)
    ids = ids_of(model, rows=2, length=80) % 63 + 1
    ids[:, start : start + 16] = 0
    state, states = model.new_state(), []
    for t in range(ids.shape[1]):
        model(ids[:, t : t + 1], past_key_values=state)
        states.append(
            state.layers[0].recurrent.flatten(1, -2).abs().amax((0, 1))
        )  # by state index: reordering keeps it
    peak, final = torch.stack(states).amax(0), states[-1]
    assert (final < 0.01 * peak).all()

    scale = quamba.quantize(model, recipe, calibration=ids).backbone.layers[0].scales.state
    reach = 127 * (scale.amax(0) if scale.ndim else scale)
    peak, final = (peak, final) if scale.ndim else (peak.max(), final.max())
    # A look every 16 tokens is not one at every token, and a percentile is less than the largest.
    share = (reach / peak).reshape(-1).tolist()
    assert min(share) > 0.5 and max(share) < 1.001
    assert (reach > 50 * final).all()


def test_sites_that_share_a_scale_have_the_larger_one():
    """z is the larger one in the first block, conv_in in the second."""
    model = random_model("mamba1")
    inner, ids = 48, ids_of(model)
    with torch.no_grad():
        model.backbone.layers[0].mixer.in_proj.weight[inner:] *= 3
        model.backbone.layers[1].mixer.in_proj.weight[:inner] *= 3
    recipe = Recipe.find("quamba1-w8a8", "mamba1")
    assert recipe.shared == (("conv_in", "z"),)
    shared = quamba.quantize(model, recipe, calibration=ids)
    alone = quamba.quantize(model, dataclasses.replace(recipe, shared=()), calibration=ids)
    outputs = []
    handles = [
        block.mixer.in_proj.register_forward_hook(lambda _, args, found: outputs.append(torch.cat(list(found), -1)))
        for block in model.backbone.layers
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    for index, output in enumerate(outputs):
        conv_in, z = (part.abs().max() / 127 for part in output.split(inner, dim=-1))
        larger, smaller = (z, conv_in) if index == 0 else (conv_in, z)
        assert larger > 2 * smaller
        scales, own = shared.backbone.layers[index].scales, alone.backbone.layers[index].scales
        torch.testing.assert_close(scales.conv_in, larger, rtol=1e-4, atol=0)
        torch.testing.assert_close(scales.z, larger, rtol=1e-4, atol=0)
        torch.testing.assert_close(torch.stack([own.conv_in, own.z]), torch.stack([conv_in, z]), rtol=1e-4, atol=0)
        for name in ("mixer_in", "x", "x_proj_out", "dt", "out_proj_in", "state"):
            assert torch.equal(getattr(scales, name), getattr(own, name))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_the_head_is_rounded_by_gptq_at_the_bits_asked_for(family, bits, monkeypatch):
    """For its inputs in the quantized model, whose residual stream says much the same in all its channels."""
    model = random_model(family, hidden=40, tied=False)
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(40, 40, generator=generator) * torch.logspace(0, -1.5, 40)[:, None]
    with torch.no_grad():
        model.backbone.embedding.weight.copy_(model.backbone.embedding.weight @ mixing)
    recipe, spec = Recipe.find("w4a8", family), WeightSpec(bits)
    assert "lm_head" in recipe.gptq.weights
    recipe = dataclasses.replace(recipe, lm_head=spec)
    ids, given = ids_of(model), spy_on(monkeypatch, vocabulary)
    quantized = quamba.quantize(model, recipe, calibration=ids)
    (x,), _ = inputs_and_output(quantized, ids, [quantized.lm_head])

    weight, head = model.lm_head.weight, dict(quantized.lm_head.named_parameters())
    nearest = quantize_weight(weight, spec, clip=recipe.clip)
    assert quantized.lm_head.spec == spec
    assert {n: (t.shape, t.dtype) for n, t in head.items()} == {n: (t.shape, t.dtype) for n, t in nearest.items()}
    codes, plain = (
        found["weight"] if bits == 8 else kernels.unpack_int4(found["weight_packed"], 40, spec.group)
        for found in (head, nearest)
    )
    low, high = {8: (-127, 127), 4: (-8, 7)}[bits]
    assert low <= codes.min() and codes.max() <= high and codes.abs().max() >= high
    changed = (codes != plain).float().mean().item()
    assert changed > 0.1

    wanted = x.double() @ weight.double().T
    error, worse = (
        distance(x.double() @ dequantize_weight(found, spec, 40).double().T, wanted) for found in (head, nearest)
    )
    assert error < 0.8 * worse
    (seen,) = given
    off = distance(torch.cat(seen), x)
    assert off < 1e-6
