"""Checkpoints of the published Quamba: every value of every component, and logits, against an independent writer."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import quamba_kernels as kernels
from quamba import QuambaLMHeadModel
from quamba.cli import main
from quamba.errors import CheckpointError
from quamba.formats import convert, open_checkpoint
from tests.quamba.formats import published_forward
from tests.quamba.formats.published import logits, published, save

VARIANTS = {
    "quamba1 w8a8": {"family": "mamba1", "precision": "W8A8"},
    "quamba1 w8a8, padded x_proj": {"family": "mamba1", "precision": "W8A8", "rank": 8},
    "quamba1 w4a8": {"family": "mamba1", "precision": "W4A8", "embedding": 4, "head": "W4A8"},
    "quamba1 w4a16": {"family": "mamba1", "precision": "W4A16", "embedding": 4, "head": "W4A16"},
    "mamba1 w8a8, 8-bit vocabulary": {"family": "mamba1", "precision": "W8A8", "embedding": 8, "head": "W8A8"},
    "quamba2 w8a8": {"family": "mamba2", "precision": "W8A8", "embedding": 8, "head": "W8A8"},
    "quamba2 w8a8, padded in_proj": {"family": "mamba2", "precision": "W8A8", "headdim": 32},
    "quamba2 w8a8, 4 groups": {"family": "mamba2", "precision": "W8A8", "ngroups": 4},
    "quamba2 w8a8, ungrouped": {"family": "mamba2", "precision": "W8A8", "grouped": False},
    "quamba2 w4a8": {"family": "mamba2", "precision": "W4A8", "embedding": 4, "head": "W4A8"},
    "quamba2 w4a8, 4 groups, wide": {"family": "mamba2", "precision": "W4A8", "ngroups": 4, "hidden": 256},
    "quamba2 w4a8, ungrouped": {"family": "mamba2", "precision": "W4A8", "grouped": False},
    "quamba2 w4a16": {"family": "mamba2", "precision": "W4A16", "embedding": 4, "head": "W4A16"},
    "quamba2 w4a16, float vocabulary": {"family": "mamba2", "precision": "W4A16"},
    "quamba2 mixed": {"family": "mamba2", "precision": "W4A8", "hybrid": ["W4A8", "W4A16", "W4A8"]},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys(), scope="module")
def variant(request, tmp_path_factory):
    made = published(**request.param)
    folder = tmp_path_factory.mktemp("published")
    save(made, folder)
    return made, folder


def real_weights(model):
    """Name -> float64 value of every weight, by our names; two-level codes as the kernels round them."""
    tensors, found = dict(model.named_parameters()), {}
    for name, tensor in tensors.items():
        value = tensor.double()
        if name.endswith(("_scale", "weight_packed")):
            continue
        scale = tensors.get(f"{name}_scale")
        if scale is not None:
            scale = scale.double()
            value = value * (scale.view(-1, *[1] * (value.ndim - 1)) if scale.ndim and value.ndim > 1 else scale)
        found[name] = value
    return found | packed_weights(model)


def packed_weights(model):
    found = {}
    for name, module in model.named_modules():
        if getattr(module, "weight_packed", None) is None:
            continue
        inputs = getattr(module, "inputs", None) or module.width
        groups, scale = module.weight_group_scale, module.weight_scale.double()[:, None]
        if getattr(module, "integer_input", False) or not groups.is_floating_point():
            codes = kernels.expand_int4(module.weight_packed, groups, inputs).double()
        else:
            codes = kernels.unpack_int4(module.weight_packed, inputs, module.spec.group).double()
            codes = codes * groups.double().repeat_interleave(module.spec.group, 1)[:, :inputs]
        found[f"{name}.weight"] = codes * scale
    return found


def test_every_weight_is_the_number_that_the_file_stands_for(variant):
    made, folder = variant
    model = QuambaLMHeadModel.from_pretrained(folder, strict=True)
    found = real_weights(model)
    weights = {name: value for name, value in made.truth.items() if ".scales." not in name}
    assert set(found) == set(weights)
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value.view_as(found[name]), rtol=3e-7, atol=0, msg=name)


def test_every_scale_is_the_files(variant):
    made, folder = variant
    model = QuambaLMHeadModel.from_pretrained(folder)
    sites = {f"backbone.layers.{i}.scales": block.scales for i, block in enumerate(model.backbone.layers)}
    sites["backbone.scales"] = model.backbone.scales
    static = {
        f"{place}.{name}": scales.scale(name)
        for place, scales in sites.items()
        for name, spec in scales.specs.items()
        if spec.scale == "static"
    }
    truth = {name: value for name, value in made.truth.items() if ".scales." in name}
    if model.config.blocks[0]["mixer"] == "mamba1":  # B and C are parts of x_proj's output
        truth = {name: value for name, value in truth.items() if not name.endswith((".B", ".C"))}
    assert set(static) == set(truth)
    for name, value in truth.items():
        expected = value.float()
        if expected.ndim < static[name].ndim:
            expected = expected.unsqueeze(-1)
        assert torch.equal(static[name].expand_as(expected), expected), name


def test_logits_follow_from_the_file(variant):
    """Against a float64 forward written from the format's description. Now and then a code is rounded the other way."""
    made, folder = variant
    model = QuambaLMHeadModel.from_pretrained(folder, dtype="float32")
    ids = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(3))
    ours, theirs, unrounded = model(ids).logits.double(), logits(made, ids), logits(made, ids, rounding=False)
    errors = (ours - theirs).square().mean(-1).sqrt().flatten()
    assert errors.median() < 1e-6 * theirs.std()
    assert errors.square().mean() < max(0.3 * float((theirs - unrounded).square().mean()), 1e-12)


def test_converted_they_are_the_same_models(variant, tmp_path):
    _, folder = variant
    convert(str(folder), tmp_path / "ours", strict=True)
    ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(4))
    before = QuambaLMHeadModel.from_pretrained(folder)
    after = QuambaLMHeadModel.from_pretrained(tmp_path / "ours", verify=True, strict=True)
    assert open_checkpoint(str(tmp_path / "ours")).layout == "quamba"
    assert torch.equal(before(ids).logits, after(ids).logits)
    assert after.config.plan == before.config.plan


def test_exact_turns_two_levels_into_int8_with_the_same_logits(tmp_path):
    made = published("mamba2", "W4A8", embedding=4, head="W4A8", hidden=256)
    save(made, tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), tmp_path / "packed")
    convert(str(tmp_path / "theirs"), tmp_path / "exact", exact=True)
    packed, exact = (QuambaLMHeadModel.from_pretrained(tmp_path / name) for name in ("packed", "exact"))
    specs = [model.config.plan.blocks[0].weight("in_proj").bits for model in (packed, exact)]
    assert specs == [4, 8] and exact.lm_head.spec.bits == 8
    ids = torch.randint(0, 100, (2, 9))
    assert torch.equal(packed(ids).logits, exact(ids).logits)
    for name, value in real_weights(exact).items():
        torch.testing.assert_close(value, made.truth[name].view_as(value), rtol=3e-7, atol=0)


def rewrite(tmp_path, change, config=None, **variant):
    made = published(**({"family": "mamba1", "precision": "W8A8"} | variant))
    made.config.update(config or {})
    change(made.state)
    folder = tmp_path / "theirs"
    folder.mkdir(exist_ok=True)
    save(made, folder)
    return made, folder


def repairs(folder):
    return [repair.what for repair in open_checkpoint(str(folder)).repairs.found]


def test_a_final_norm_without_scale_in_front_of_a_float_head_is_a_float_norm(tmp_path):
    """Reload bugs 1 and 3: config.json claims one class for all norms."""
    _, folder = rewrite(tmp_path, lambda state: None)
    assert json.loads((folder / "config.json").read_text())["norm_cfg"]["norm"] == "QRMSNorm"
    model = QuambaLMHeadModel.from_pretrained(folder, strict=True)
    plan = model.config.plan
    assert plan.final_norm.is_float and plan.lm_head.is_float and not plan.blocks[0].site("mixer_in").is_float
    hidden = model.backbone.norm_f(torch.randn(1, 2, 128), model.backbone.scales("head_in"))
    assert isinstance(hidden, torch.Tensor) and hidden.is_floating_point()


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_has_a_bias_if_the_file_has_one(tmp_path, bias):
    """Reload bug 2."""
    value = torch.randn(104).half()
    made, folder = rewrite(tmp_path, lambda state: state.update({"lm_head.bias": value}) if bias else None)
    model = QuambaLMHeadModel.from_pretrained(folder, dtype="float32")
    assert (model.lm_head.bias is not None) == bias
    ids = torch.randint(0, 100, (1, 12))
    expected = logits(made, ids) + (value.double() if bias else 0)
    assert (model(ids).logits.double() - expected).square().mean().sqrt() < 0.02
    convert(str(folder), tmp_path / "ours")
    assert torch.equal(
        QuambaLMHeadModel.from_pretrained(tmp_path / "ours", dtype="float32")(ids).logits, model(ids).logits
    )


@pytest.mark.parametrize("missing", ["gone", "None"])
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_a_norm_without_scale_in_front_of_integers_scales_every_token(tmp_path, family, missing):
    """Reload bug 3, its other half."""
    name = "backbone.layers.1.norm.output_scale"
    change = (lambda s: s.pop(name)) if missing == "gone" else (lambda s: s.update({name: None}))
    made, folder = rewrite(tmp_path, change, family=family)
    assert repairs(folder) == ["a norm in front of an integer projection has no static scale: every token gets its own"]
    with pytest.raises(
        CheckpointError, match=r"strict.*\n.*every token gets its own \(backbone.layers.1.norm.output_scale"
    ):
        QuambaLMHeadModel.from_pretrained(folder, strict=True)
    model = QuambaLMHeadModel.from_pretrained(folder, dtype="float32")
    assert [block.site("mixer_in").scale for block in model.config.plan.blocks] == ["static", "token"]
    ids = torch.randint(0, 100, (2, 12))
    exact, rounded = logits(made, ids, rounding=False), logits(made, ids)
    assert (model(ids).logits - exact).square().mean() < 2 * (rounded - exact).square().mean()


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.bfloat16])
def test_the_head_computes_in_its_stored_dtype(tmp_path, stored):
    """Reload bug 4: a float32 head on a half body. Both are held in the wider type."""

    def change(state):
        state["lm_head.weight"] = state["lm_head.weight"].to(stored)

    made, folder = rewrite(tmp_path, change)
    model = QuambaLMHeadModel.from_pretrained(folder)
    ids = torch.randint(0, 100, (2, 12))
    assert model.lm_head.weight.dtype == model(ids).logits.dtype
    assert model.lm_head.weight.dtype == (torch.float16 if stored == torch.float16 else torch.float32)
    assert torch.equal(model.lm_head.weight.float(), made.state["lm_head.weight"].float())


def test_a_missing_scale_is_taken_from_its_twin_and_never_made_up(tmp_path):
    p = "backbone.layers.0.mixer."
    _, folder = rewrite(tmp_path, lambda state: state.pop(f"{p}conv1d.input_scale"))
    whole, _ = rewrite(tmp_path / "whole", lambda state: None) if (tmp_path / "whole").mkdir() is None else (None, None)
    checkpoint = open_checkpoint(str(folder))
    (scale,) = checkpoint.read(["backbone.layers.0.scales.conv_in"]).values()
    assert float(scale) == pytest.approx(float(whole.truth["backbone.layers.0.scales.conv_in"].flatten()[0]))
    assert "is missing; " in repairs(folder)[0]
    for name in ("selective_scan.dt_scale", "selective_scan.ssm_state_scale", "selective_scan.D_scale"):
        _, folder = rewrite(tmp_path, lambda state, name=name: state.pop(p + name))
        with pytest.raises(CheckpointError, match=f"missing.*{name}"):
            QuambaLMHeadModel.from_pretrained(folder)
    _, folder = rewrite(tmp_path, lambda state: state.pop("backbone.layers.1.mixer.norm.z_scale"), family="mamba2")
    with pytest.raises(CheckpointError, match=r"a static scale is missing.*norm\.z_scale"):
        QuambaLMHeadModel.from_pretrained(folder)


def test_scales_that_must_agree_and_do_not_are_refused(tmp_path):
    def change(state):
        state["backbone.layers.0.mixer.selective_scan.u_scale"] *= 2

    _, folder = rewrite(tmp_path, change)
    with pytest.raises(
        CheckpointError, match=r"two scales that must agree differ: .*u_scale = .*by .*conv1d.output_scale "
    ):
        QuambaLMHeadModel.from_pretrained(folder)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_absurd_scales_are_refused(tmp_path, value):
    _, folder = rewrite(tmp_path, lambda state: state.update({"backbone.layers.0.norm.output_scale": value}))
    with pytest.raises(CheckpointError, match=r"output_scale = .* can't be a scale"):
        QuambaLMHeadModel.from_pretrained(folder)


def test_limits_of_dt_are_honoured_and_unknown_keys_no_obstacle(tmp_path):
    """L6 and L14."""
    config = {"a_new_key": 1, "is_hybrid": False}
    made, folder = rewrite(tmp_path, lambda state: None, config, family="mamba2")
    ids = torch.randint(0, 100, (1, 12))
    free = QuambaLMHeadModel.from_pretrained(folder)(ids).logits
    made.config["ssm_cfg"]["dt_limit"] = [0.0, 0.01]
    save(made, folder)
    limited = QuambaLMHeadModel.from_pretrained(folder)
    assert limited.config.blocks[0]["args"]["dt_max"] == 0.01
    assert not torch.allclose(limited(ids).logits, free, atol=1e-2)


def test_config_without_the_quantization_keys(tmp_path):
    made, folder = rewrite(tmp_path, lambda state: None, family="mamba2", precision="W4A8")
    for key in ("norm_cfg", "embedding_cfg", "lm_head_cfg", "is_hybrid"):
        made.config.pop(key)
    save(made, folder)
    assert QuambaLMHeadModel.from_pretrained(folder, strict=True).config.plan.blocks[0].weight("in_proj").bits == 4


def test_unexpected_tensors_are_named(tmp_path):
    _, folder = rewrite(tmp_path, lambda state: state.update({"backbone.extra.output_scale": torch.ones(3)}))
    assert open_checkpoint(str(folder)).repairs.found[0].tensors == ("backbone.extra.output_scale",)


@pytest.mark.parametrize("name", ["mixer.invented", "foo.b", "mixer.in_proj.bias", "mlp.fc1.weight", "mixer.D.alpha"])
def test_unexpected_tensors_inside_a_block_are_refused(tmp_path, name):
    """Something would have to read them."""
    _, folder = rewrite(tmp_path, lambda state: state.update({f"backbone.layers.0.{name}": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=rf"doesn't have: backbone.layers.0.{name}"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(("hidden", "order"), [(384, 12), (640, 40)])
def test_the_foreign_rotations(hidden, order):
    """The tables against their own description: rows of +-, `y = (H_m x H_2^k) x / sqrt(n)`."""
    from quamba.formats.published.block import rotation
    from quamba.layers import Hadamard

    n = 2 * hidden
    found = rotation(n)
    assert (found.n, found.m, found.matrix) == (n, order, f"dao{order}")
    from quamba_kernels.hadamard_matrices import outer_matrix, sylvester

    outer = outer_matrix(found.matrix).double()
    assert torch.equal(outer @ outer.T, order * torch.eye(order, dtype=torch.float64))
    dense = torch.kron(outer, sylvester(n // order, torch.device("cpu")).double()) / n**0.5
    x = torch.randn(3, n)
    torch.testing.assert_close(Hadamard(found).turn(x).double(), x.double() @ dense.T, rtol=1e-5, atol=1e-5)
    assert published_forward.hadamard(64, None).shape == (64, 64)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_the_command_line_takes_them(tmp_path, monkeypatch, family):
    """Their int8 state is rounded at every call: no fault to the doctor."""
    monkeypatch.chdir(tmp_path)
    save(published(family, "W4A8", embedding=4, head="W4A8"), tmp_path / "theirs")

    def run(code, *arguments):
        done = CliRunner().invoke(main, list(arguments))
        assert done.exit_code == code, done.output
        return done.output

    told = run(0, "doctor", "theirs")
    assert "published quamba layout" in told and "rounded after every call" in told and "theirs: healthy" in told
    told = run(0, "inspect", "theirs")
    assert "int4 per 128" in told and "None" not in told
    assert "is quantized already" in run(1, "quantize", "theirs", "--w8a8")
    assert "theirs (published quamba layout" in run(0, "convert", "theirs", "ours")
    assert "ours: healthy" in run(0, "doctor", "ours", "--verify")
