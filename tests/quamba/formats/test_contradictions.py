"""What can't be repaired is refused in one sentence that shows both readings or names what is missing."""

from __future__ import annotations

import re

import pytest
import torch

from quamba import QuambaLMHeadModel
from quamba.errors import CheckpointError
from quamba.formats import open_checkpoint
from tests.quamba.formats.foreign import EMBEDDING, HEAD, files_of, write
from tests.quamba.formats.test_repairs import both, drop, put, renamed, ssm, told

BLOCK = "backbone.layers.0."
MIXER = f"{BLOCK}mixer."


def lose(*names):
    return lambda config, tensors: [tensors.pop(name) for name in names]


def give(**extra):
    return lambda config, tensors: tensors.update({MIXER + name.replace("__", "."): t for name, t in extra.items()})


def attention(config, tensors):
    """mamba2attn-2.7b: the odd block has mamba-ssm's MHA."""
    for name in [name for name in tensors if name.startswith("backbone.layers.1.mixer.")]:
        del tensors[name]
    tensors["backbone.layers.1.mixer.in_proj.weight"] = torch.ones(96, 32)
    tensors["backbone.layers.1.mixer.out_proj.weight"] = torch.ones(32, 32)


def mamba3(config, tensors):
    config["ssm_cfg"]["layer"] = "Mamba3"


CASES = {
    "all names of the width": (
        "mamba",
        "transformers",
        put(hidden_size=48, d_model=24),
        r"by the config hidden_size = 48 and d_model = 24, by the embedding 32",
    ),
    "number of blocks": (
        "mamba2",
        "mamba_ssm",
        put(n_layer=3, num_hidden_layers=4),
        r"num_hidden_layers = 4 and n_layer = 3, by the number of blocks 2",
    ),
    "states": (
        "mamba",
        "transformers",
        both(put(state_size=8), ssm(d_state=4)),
        rf"state_size = 8 and ssm_cfg\.d_state = 4, by {MIXER}A_log 16",
    ),
    "rank": ("mamba", "transformers", put(time_step_rank=2), rf"time_step_rank = 2, by {MIXER}dt_proj.weight 3"),
    "taps": ("falcon_mamba", "transformers", put(conv_kernel=3), rf"conv_kernel = 3, by {MIXER}conv1d.weight 4"),
    "inner width": (
        "mamba",
        "transformers",
        put(expand=1, intermediate_size=32),
        rf"expand \* 32 = 32 and intermediate_size = 32, by {MIXER}out_proj.weight 64",
    ),
    "heads": ("mamba2", "transformers", put(num_heads=8), rf"num_heads = 8, by {MIXER}dt_bias 4"),
    "head width": ("mamba2", "mamba_ssm", ssm(headdim=32), rf"ssm_cfg.headdim = 32, by {MIXER}dt_bias 16"),
    "groups": (
        "mamba2",
        "transformers",
        put(n_groups=3),
        rf"by the config 3 groups of 16 states, by {MIXER}conv1d.weight groups \* states = 16",
    ),
    "groups of two kinds": (
        "mamba2",
        "transformers",
        both(put(n_groups=4), ssm(ngroups=2)),
        r"by the config 4 groups of 16 states or 2 groups of 16 states, by",
    ),
    "two right ways to cut groups": (
        "mamba2",
        "transformers",
        both(put(n_groups=2, state_size=8), ssm(ngroups=1, d_state=16)),
        r"2 groups of 8 states or .*1 groups of 16 states",
    ),
    "groups below 0": (
        "mamba2",
        "transformers",
        put(n_groups=-1, state_size=-16),
        r"their-model: config\.json: state_size is -16; it must be at least 1",
    ),
    "family": ("mamba2", "mamba_ssm", ssm(layer="Mamba1"), rf"ssm_cfg.layer = 'mamba1', by {BLOCK}mixer 'mamba2'"),
    "model_type": ("mamba2", "transformers", put(model_type="mamba"), "model_type = 'mamba1', by .*mixer 'mamba2'"),
    "bias": ("mamba", "transformers", put(use_bias=True), rf"use_bias = True, but {MIXER}in_proj.bias is missing"),
    "convolution's bias": (
        "mamba2",
        "transformers",
        put(use_conv_bias=False),
        rf"use_conv_bias = False, but {MIXER}conv1d.bias is there",
    ),
    "vocabulary": ("mamba", "mamba_ssm", put(vocab_size=200), "by the config vocab_size = 200, by the embedding 64"),
    "a head that isn't the embedding": (
        "mamba",
        "transformers",
        lambda c, t: t.update({HEAD: torch.ones(64, 32)}),
        "the config says that head and embedding are tied, but lm_head.weight differs",
    ),
    "one tensor missing": ("mamba", "mamba_ssm", lose(f"{MIXER}D"), f"1 tensors? .*missing: {MIXER}D"),
    "some missing": (
        "mamba",
        "mamba_ssm",
        lose(f"{MIXER}D", f"{MIXER}in_proj.weight", f"{BLOCK}norm.weight", "backbone.norm_f.weight"),
        "4 tensors are missing: backbone.layers.0.mixer.D, .* and 1 more",
    ),
    "the embedding missing": ("mamba", "mamba_ssm", lose(EMBEDDING), f"1 tensor is missing: {EMBEDDING}"),
    "what tells the family missing": (
        "mamba",
        "mamba_ssm",
        lose(f"{MIXER}x_proj.weight"),
        f"missing: {BLOCK}mixer has neither x_proj.weight, as Mamba1, nor dt_bias, as Mamba2",
    ),
    "a block missing": ("mamba", "mamba_ssm", renamed("layers.1.", "layers.2."), "block 1 has none, block 2 has"),
    "no blocks": (
        "mamba",
        "mamba_ssm",
        lambda c, t: [t.pop(name) for name in list(t) if "layers" in name],
        "no Mamba model, or one without layers",
    ),
    "a width within the block": (
        "mamba",
        "transformers",
        give(in_proj__weight=torch.ones(128, 31)),
        rf"{MIXER}in_proj.weight has shape \[128, 31\].*should be \[128, 32\]",
    ),
    "heads that don't divide": ("mamba2", "transformers", give(dt_bias=torch.ones(5)), "64 columns, which 5 heads"),
    "a scalar": ("mamba", "transformers", give(A_log=torch.tensor(1.0)), "A_log has the impossible shape"),
    "an empty tensor": ("mamba", "transformers", give(A_log=torch.ones(0, 16)), "A_log has the impossible shape"),
    "attention": ("mamba2", "mamba_ssm", attention, "backbone.layers.1.mixer has neither x_proj.weight"),
    "attention, said": (
        "mamba2",
        "mamba_ssm",
        both(attention, put(attn_layer_idx=[1])),
        r"attn_layer_idx = \[1\]; this version reads attn_layer_idx = \[\] only",
    ),
    "Mamba3": ("mamba2", "mamba_ssm", mamba3, "the model's layers are Mamba3; this version reads Mamba1 and Mamba2"),
    "more than the scan, Mamba2": (
        "mamba2",
        "mamba_ssm",
        both(ssm(d_ssm=32), give(dt_bias=torch.ones(2), A_log=torch.ones(2), D=torch.ones(2))),
        "d_ssm = 32",
    ),
    "strangers in a block": (
        "mamba",
        "mamba_ssm",
        give(B__norm=torch.ones(16)),
        "1 tensor is not of this architecture: .*mixer.B.norm",
    ),
    "both names of the embedding": (
        "mamba",
        "transformers",
        lambda c, t: t.update({EMBEDDING: torch.ones(64, 32)}),
        "both stand for backbone.embedding.weight, and they differ",
    ),
    "head absent though untied": ("mamba", "transformers", put(tie_word_embeddings=False), "missing: lm_head.weight"),
    "another activation": ("mamba", "transformers", put(hidden_act="gelu"), "hidden_act = gelu; only silu"),
    "another activation, mamba-ssm": ("mamba2", "mamba_ssm", ssm(activation="relu"), "activation = relu; only swish"),
    "limits of dt": ("mamba2", "transformers", put(time_step_limit=[1, 0]), "limited to between 1.0 and 0.0"),
    "no model_type, no sizes": ("mamba", "mamba_ssm", drop("d_model", "n_layer"), "isn't supported"),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("kind", "layout", "change", "why"), CASES.values(), ids=CASES.keys())
def test_what_is_refused(tmp_path, caplog, kind, layout, change, why, strict):
    config, tensors = files_of(kind, layout)
    change(config, tensors)
    folder = write(tmp_path / "their-model", config, tensors)
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(str(folder), strict=strict)
    message = str(refused.value)
    assert re.search(why, message), message
    assert "\n" not in message and len(message) < 400
    assert message.count("their-model") == 1
    if not strict:
        with pytest.raises(CheckpointError):
            QuambaLMHeadModel.from_pretrained(folder)
        assert not told(caplog)
