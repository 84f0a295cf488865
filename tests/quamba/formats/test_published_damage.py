"""Published checkpoints that contradict their config, lost something, or are of wrong shapes: told or refused."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch

from quamba import QuambaLMHeadModel
from quamba.errors import CheckpointError
from quamba.formats import open_checkpoint
from tests.quamba.formats.published import published, save

BLOCK = "backbone.layers.0."
M = f"{BLOCK}mixer."
IDS = torch.arange(20)[None]

make = functools.cache(published)


@pytest.fixture
def load(tmp_path):
    """Load a changed copy of a small model: its logits and what was repaired."""

    def attempt(change, family, precision="W8A8", layers=2, **options):
        made = copy.copy(make(family, precision, layers=layers, **options))
        made.config, made.state = copy.deepcopy(made.config), dict(made.state)
        change(made)
        folder = save(made, tmp_path / "theirs")
        repairs = [repair.what for repair in open_checkpoint(str(folder)).repairs.found]
        return QuambaLMHeadModel.from_pretrained(folder)(IDS).logits, repairs

    return attempt


def config(**entries):
    return lambda made: made.config.update(entries)


def ssm(**entries):
    def change(made):
        made.config["ssm_cfg"].update(entries)
        for key in [key for key, value in entries.items() if value is None]:
            del made.config["ssm_cfg"][key]

    return change


def lose(*names):
    return lambda made: [made.state.pop(name) for name in names]


def times(factor, *names):
    return lambda made: made.state.update({name: made.state[name] * factor for name in names})


def refused(load, *arguments, **options):
    with pytest.raises(CheckpointError) as error:
        load(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message
    assert "can't be understood" not in message
    return message


def last_block(made):
    for name in [name for name in made.state if name.startswith("backbone.layers.1.")]:
        del made.state[name]


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (config(n_layer=5), "by the config n_layer = 5, by the number of blocks 2"),
        (last_block, "by the config n_layer = 2, by the number of blocks 1"),
        (config(d_model=256), "by the config d_model = 256, by the embedding 128"),
        (config(vocab_size=5000), "by the config vocab_size = 5000, by the embedding"),
        (config(vocab_size=True), "vocab_size = True padded to a multiple of 8 is no size"),
        (config(rms_norm=False), "rms_norm = False; this version reads rms_norm = True only"),
        (config(attn_layer_idx=[0]), r"attn_layer_idx = \[0\]"),
        (config(d_intermediate=512), "missing: backbone.layers.0.mlp.fc1.weight, with d_intermediate = 512"),
        (config(residual_in_fp32="no"), "residual_in_fp32 = 'no' is neither true nor false"),
        (ssm(d_state=64), "64"),
        (ssm(d_conv=7), "d_conv = 7, by .*conv1d.weight 4"),
        (ssm(expand=4), r"expand \* 128 = 512, by .*out_proj.weight 256"),
        (ssm(expand="2"), "expand = 2 is no factor"),
        (ssm(conv_bias=False), "conv_bias = False, but .*conv1d.bias is there"),
        (ssm(bias=True), "bias = True, but .*in_proj.bias is missing"),
        (ssm(activation="relu"), "activation = relu; only swish"),
        (lose(f"{M}conv1d.bias"), "1 tensor is missing: .*conv1d.bias .a model without it says ssm_cfg.conv_bias = false"),
    ],
)  # fmt: skip
def test_the_config_is_held_against_the_tensors(load, family, change, why):
    assert re.search(why, refused(load, change, family))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (ssm(headdim=64), "headdim = 64, by .*dt_bias 8"),
        (ssm(ngroups=2), "by the config 2 groups of 16 states, by .*conv1d.weight groups . states = 16"),
        (ssm(d_ssm=64), "d_ssm = 64, by .*out_proj.weight 256"),
        (ssm(D_has_hdim=True), "D_has_hdim = True, by .*D False"),
        (ssm(rmsnorm=False), "rmsnorm = False, but .*norm.weight is there"),
        (ssm(layer="W8A8QMamba"), "ssm_cfg.layer = 'mamba1', by .*mixer 'mamba2'"),
        (lose(f"{M}norm.weight"), "1 tensor is missing: .*mixer.norm.weight"),
    ],
)
def test_sizes_of_mamba2(load, change, why):
    assert re.search(why, refused(load, change, "mamba2"))


@pytest.mark.parametrize("precision", ["W8A8", "W4A16"])
def test_lost_groups_are_not_taken_for_one(load, precision):
    """Without `ngroups` 2 * 128 could be 1 * 256; the usual d_state says that it isn't."""
    message = refused(load, ssm(ngroups=None), "mamba2", precision, ngroups=2, d_state=128, grouped=False)
    assert "by the config 1 groups of 128 states" in message


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (ssm(layer="W4A16QMamba2"), "ssm_cfg.layer = W4A16QMamba2; the tensors are of W8A8QMamba2"),
        (config(norm_cfg={"norm": "RMSNorm"}), "norm_cfg.norm = RMSNorm; the tensors are of QRMSNorm"),
        (config(embedding_cfg={"layer": "W4O16Embedding"}), "W4O16Embedding; the tensors are of Embedding"),
        (config(lm_head_cfg={"layer": "W4A16B16O16Linear"}), "W4A16B16O16Linear; the tensors are of Linear"),
        (config(tie_embeddings=True), "tie_embeddings = True; the head is its own"),
    ],
)
def test_classes_that_the_tensors_contradict_are_told(load, change, what):
    plain, _ = load(lambda made: None, "mamba2")
    logits, repairs = load(change, "mamba2")
    assert torch.equal(logits, plain)
    assert len(repairs) == 1
    assert what in repairs[0]


def test_a_mixed_model_needs_no_word_for_it(load):
    """Neither norm_cfg nor is_hybrid; but as many layers as there are."""
    hybrid = {"family": "mamba2", "precision": "W4A8", "hybrid": ("W4A8", "W4A16")}
    plain, _ = load(lambda made: None, **hybrid)

    def silent(made):
        for key in ("norm_cfg", "is_hybrid", "embedding_cfg", "lm_head_cfg"):
            del made.config[key]

    logits, repairs = load(silent, **hybrid)
    assert torch.equal(logits, plain)
    assert not repairs
    message = refused(load, lambda made: made.config["ssm_cfg"]["layer"].pop(), **hybrid)
    assert "by the config 1 layers, by the tensors 2" in message


@pytest.mark.parametrize("prefix", ["model.", "module."])
def test_prefixes(load, prefix):
    plain, _ = load(lambda made: None, "mamba1")

    def wrap(made):
        made.state = {f"{prefix}{name}": value for name, value in made.state.items()}

    logits, repairs = load(wrap, "mamba1")
    assert torch.equal(logits, plain)
    assert repairs == [f"names begin with {prefix!r}, which is left out"]
    assert "1 tensor is missing: backbone.embedding.weight" in refused(load, lambda made: made.state.clear(), "mamba1")


TWINS = [
    ("mamba1", "W4A8", f"{M}x_proj.input_scale"),
    ("mamba1", "W4A8", f"{M}in_proj.input_scale"),
    *(
        ("mamba1", "W8A8", f"{M}{name}")
        for name in ("x_proj.a", "dt_proj.a", "in_proj.a", "in_proj.alpha", "out_proj.a")
    ),
    *(("mamba1", "W8A8", f"{M}{name}") for name in ("selective_scan.C_scale", "conv1d.input_scale", "out_proj.alpha")),
    *(("mamba2", "W8A8", f"{M}{name}") for name in ("in_proj.a", "qchunk_scan.x_scales", "qchunk_scan.B_scale")),
]


@pytest.mark.parametrize("factor", [10, float("nan")])
@pytest.mark.parametrize(("family", "precision", "name"), TWINS)
def test_twins_must_agree(load, family, precision, name, factor):
    message = refused(load, times(factor, name), family, precision)
    assert ("must agree" in message or "can't be a scale" in message) and name in message


MISSING = {
    "mamba1": ["conv1d.input_scale", "conv1d.output_scale", "selective_scan.u_scale", "selective_scan.z_scale"]
    + ["selective_scan.B_scale", "selective_scan.C_scale", "had.x_H_scale", "out_proj.a", "x_proj.a", "in_proj.a"],
    "mamba2": ["conv1d.x_out_scales", "qchunk_scan.x_scales", "conv1d.B_out_scales", "qchunk_scan.C_scale"]
    + ["conv1d.x_head_group_range", "conv1d.x_dim_group_range", "qchunk_scan.x_dim_group_range", "had.x_H_scale"],
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in MISSING for name in MISSING[family]])
def test_a_lost_twin_is_told_and_changes_nothing(load, family, name):
    plain, _ = load(lambda made: None, family)
    logits, repairs = load(lose(f"{M}{name}"), family)
    torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-3)
    assert len(repairs) == 1
    assert repairs[0].startswith(f"{name} is missing; ")


def test_a_head_without_its_input_scale_is_integer_all_the_same(load):
    plain, _ = load(lambda made: None, "mamba2", head="W8A8")
    logits, repairs = load(lose("lm_head.a"), "mamba2", head="W8A8")
    assert torch.equal(logits, plain)
    assert repairs == ["lm_head.a is missing; backbone.norm_f.output_scale says the same"]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("mamba1", name) for name in ("conv1d.weight_scale", "in_proj.b", "selective_scan.ssm_state_scale")),
        *(("mamba2", name) for name in ("qchunk_scan.x_scales conv1d.x_out_scales", "norm.z_scale", "conv1d.wB_scale")),
        *(("mamba2", name) for name in ("qchunk_scan.ssm_state_scale", "out_proj.b", "qchunk_scan.D_scale")),
    ],
)
@pytest.mark.parametrize("factor", [0, -1, float("inf")])
def test_scales_that_are_none(load, family, name, factor):
    names = [f"{M}{part}" for part in name.split()]
    message = refused(load, times(factor, *names), family)
    assert "can't be" in message and any(name in message for name in names)


def test_ends_of_groups_must_ascend(load):
    names = [f"{M}{part}.x_dim_group_range" for part in ("conv1d", "qchunk_scan")]

    def shuffle(made):
        made.state.update({name: made.state[name].flip(-1).roll(-1, -1) for name in names})

    assert "doesn't hold ascending ends of groups" in refused(load, shuffle, "mamba2")


SHAPES = {
    "a row less": lambda v: v[:-1] if v.ndim else v.expand(2),
    "twice": lambda v: torch.cat([v, v]) if v.ndim else v.expand(4),
    "twice as wide": lambda v: torch.cat([v, v], -1) if v.ndim else v.expand(1, 2),
    "empty": lambda v: v.new_zeros((0,)),
    "seven": lambda v: torch.ones(7, dtype=v.dtype),
    "another type": lambda v: v.to(torch.int32 if v.is_floating_point() else torch.float32),
}
IRRELEVANT = (".workspace", ".alpha")
MODELS = [
    ("mamba1", "W8A8", {"embedding": 8, "head": "W8A8"}),
    ("mamba1", "W4A16", {"head": "W4A16"}),
    ("mamba2", "W4A8", {"embedding": 4, "head": "W4A8"}),
    ("mamba2", "W8A8", {"grouped": False}),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("family", "precision", "options"), MODELS, ids=[f"{f} {p}" for f, p, _ in MODELS])
def test_every_tensor_in_every_wrong_shape(tmp_path, family, precision, options, shape):
    """A sentence that names it (or the tensor it contradicts), or, of a size that the config doesn't say, a repair."""
    made = make(family, precision, layers=1, **options)
    for name, value in made.state.items():
        if value is None or name.endswith(IRRELEVANT):
            continue
        value = value if isinstance(value, torch.Tensor) else torch.tensor(value)
        wrong = SHAPES[shape](value).clone()
        if wrong.shape == value.shape and wrong.dtype == value.dtype:
            continue
        changed = copy.copy(made)
        changed.state = made.state | {name: wrong}
        folder = save(changed, tmp_path / "theirs")
        try:
            assert open_checkpoint(str(folder)).repairs.found, f"{name} {list(wrong.shape)} {wrong.dtype} loads"
        except CheckpointError as error:
            assert "can't be understood" not in str(error), f"{name}: {error}"


def test_exact_needs_something_to_be_exact_about(tmp_path):
    folder = save(make("mamba1", "W8A8", layers=1), tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="no int4 weights with two levels of scales"):
        open_checkpoint(str(folder), exact=True)
