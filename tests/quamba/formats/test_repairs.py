"""Every tolerance: what it loads is the right model, it is told once, and strict loading refuses it."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from quamba import QuambaLMHeadModel
from quamba.errors import CheckpointError
from quamba.formats import open_checkpoint
from tests.quamba.formats.foreign import EMBEDDING, HEAD, IDS, files_of, truth, write

FIRST = "backbone.layers.0."
MIXERS = ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "quamba"]


def check(folder, logits, caplog, whats, tensors=None, close=True):
    """`folder` loads to `logits`, tells of exactly the repairs `whats` (patterns), once, and strict refuses them."""
    repairs = open_checkpoint(str(folder)).repairs
    found = [repair.what for repair in repairs.found]
    assert len(found) == len(whats), found
    for what in whats:
        assert sum(bool(re.search(what, one)) for one in found) == 1, (what, found)
    assert all(repair.why for repair in repairs.found)
    if tensors is not None:
        assert sorted(name for repair in repairs.found for name in repair.tensors) == sorted(tensors)
    caplog.clear()
    with caplog.at_level(logging.INFO, "quamba"):
        model = QuambaLMHeadModel.from_pretrained(folder, strict=not whats)
    if close:
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-5, atol=1e-5)
    messages = told(caplog)
    assert len(messages) == bool(whats)
    for what in whats:
        assert len(re.findall(what, messages[0])) == 1, messages[0]
    if whats:
        assert messages[0].startswith(f"{folder.name} was repaired while loading:\n  - ")
        with pytest.raises(CheckpointError, match=f"{folder.name} needs repairs, which strict.*refuses") as refused:
            QuambaLMHeadModel.from_pretrained(folder, strict=True)
        for what in whats:
            assert re.search(what, str(refused.value))
    return model


def drop(*keys):
    return lambda config, tensors: [config.pop(key) for key in keys]


def put(**entries):
    return lambda config, tensors: config.update(entries)


def ssm(**entries):
    """Entries of ssm_cfg; `...` removes one."""

    def change(config, tensors):
        cfg = config.setdefault("ssm_cfg", {})
        cfg.update(entries)
        for key in [key for key, value in cfg.items() if value is ...]:
            del cfg[key]

    return change


def prefixed(prefix):
    def change(config, tensors):
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return change


def renamed(old, new):
    def change(config, tensors):
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def add(**extra):
    return lambda config, tensors: tensors.update({name.replace("__", "."): t for name, t in extra.items()})


def grown(rows):
    """Rows of zeros beyond the vocabulary, in the embedding and, if there is one, the head."""

    def change(config, tensors):
        for name in tensors:
            if "embedding" in name or name == HEAD:
                tensors[name] = torch.cat([tensors[name], torch.zeros(rows, tensors[name].shape[1])])

    return change


def both(*changes):
    def change(config, tensors):
        for one in changes:
            one(config, tensors)

    return change


OLD = ("tie_embeddings", "d_intermediate", "attn_layer_idx", "attn_cfg", "fused_add_norm")
NONE = ()
UNTIED = {"tie_word_embeddings": False}
# name -> (kind, layout, overrides of the model, change, patterns of the repairs, tensors or None)
CASES = {
    "healthy mamba": ("mamba", "transformers", {}, drop(), NONE, None),
    "healthy mamba2": ("mamba2", "transformers", {}, drop(), NONE, None),
    "healthy falcon": ("falcon_mamba", "transformers", {}, drop(), NONE, None),
    "healthy mamba-ssm": ("mamba", "mamba_ssm", {}, drop(), NONE, None),
    "healthy mamba-ssm, Mamba2": ("mamba2", "mamba_ssm", {"n_groups": 2}, drop(), NONE, None),
    "untied mamba": ("mamba", "transformers", UNTIED, drop(), NONE, None),
    "untied mamba2": ("mamba2", "transformers", UNTIED, drop(), NONE, None),
    "untied falcon": ("falcon_mamba", "transformers", UNTIED, drop(), NONE, None),
    "untied mamba-ssm": ("mamba", "mamba_ssm", UNTIED, drop(), NONE, None),
    "old config": ("mamba", "mamba_ssm", {}, drop(*OLD), NONE, None),
    "older config": ("mamba", "mamba_ssm", {}, drop(*OLD, "residual_in_fp32", "rms_norm"), NONE, None),
    "old config of Mamba2": ("mamba2", "mamba_ssm", {}, drop(*OLD), NONE, None),
    "no padding multiple": ("mamba", "mamba_ssm", {}, drop("pad_vocab_size_multiple"), NONE, None),
    "keys of no meaning here": (
        "mamba",
        "mamba_ssm",
        {},
        put(_name="x", torch_dtype="float16", extras={}, use_cache=True),
        NONE,
        None,
    ),
    "ssm_cfg of None": ("mamba", "mamba_ssm", {"time_step_rank": 2}, put(ssm_cfg=None), NONE, None),
    "dt_rank auto": ("mamba", "mamba_ssm", {"time_step_rank": 2}, ssm(dt_rank="auto"), NONE, None),
    "head as a copy": (
        "mamba",
        "transformers",
        {},
        lambda c, t: t.update({HEAD: t["backbone.embeddings.weight"].clone()}),
        NONE,
        None,
    ),
    "prefix model.": ("mamba", "transformers", {}, prefixed("model."), ["names begin with 'model.'"], None),
    "prefix module.": ("mamba2", "mamba_ssm", UNTIED, prefixed("module."), ["names begin with 'module.'"], None),
    "prefix _orig_mod.": ("mamba", "mamba_ssm", {}, prefixed("_orig_mod."), ["names begin with '_orig_mod.'"], None),
    "two prefixes": (
        "falcon_mamba",
        "transformers",
        {},
        prefixed("module._orig_mod."),
        [r"names begin with 'module._orig_mod.'"],
        None,
    ),
    "no backbone.": ("mamba", "transformers", {}, renamed("backbone.", ""), ["names lack the prefix backbone."], None),
    "no backbone., mamba-ssm": ("mamba", "mamba_ssm", {}, renamed("backbone.", ""), ["names lack the prefix"], None),
    "no backbone., with a head": ("mamba2", "mamba_ssm", UNTIED, renamed("backbone.", ""), ["names lack"], None),
    "model. for backbone.": (
        "mamba",
        "transformers",
        {},
        renamed("backbone.", "model."),
        ["names lack the prefix backbone.", "names begin with 'model.'"],
        None,
    ),
    "embeddings in mamba-ssm": ("mamba", "mamba_ssm", {}, renamed("embedding.", "embeddings."), NONE, None),
    "both names of the embedding": (
        "mamba",
        "transformers",
        {},
        lambda c, t: t.update({EMBEDDING: t["backbone.embeddings.weight"].clone()}),
        [
            "backbone.embedding.weight and backbone.embeddings.weight both stand for|embeddings.* and .*embedding.weight both"
        ],
        [EMBEDDING],
    ),
    "embedding in transformers": ("mamba", "transformers", {}, renamed("embeddings.", "embedding."), NONE, None),
    "padded as said": ("mamba", "mamba_ssm", {"vocab_size": 72}, put(vocab_size=65), NONE, None),
    "padded by 16": (
        "mamba",
        "mamba_ssm",
        {"vocab_size": 80},
        put(vocab_size=65, pad_vocab_size_multiple=16),
        NONE,
        None,
    ),
    "padded more than said": (
        "mamba",
        "mamba_ssm",
        {},
        put(vocab_size=61, pad_vocab_size_multiple=1),
        ["the embedding has 64 rows for a vocabulary of 61: padded otherwise"],
        None,
    ),
    "padded in transformers": (
        "mamba2",
        "transformers",
        UNTIED,
        put(vocab_size=50),
        ["64 rows for a vocabulary of 50"],
        None,
    ),
    "no vocab_size": ("mamba", "mamba_ssm", {}, drop("vocab_size"), ["doesn't say vocab_size"], None),
    "d_model wrong beside hidden_size": (
        "mamba",
        "transformers",
        {},
        put(d_model=48),
        ["both hidden_size = 32 and d_model = 48; the tensors say 32"],
        None,
    ),
    "hidden_size wrong beside d_model": (
        "mamba",
        "transformers",
        {},
        put(d_model=32, hidden_size=48, expand=2),
        ["both d_model = 32 and hidden_size = 48; the tensors say 32"],
        None,
    ),
    "d_model right and d_model's kin": (
        "mamba",
        "transformers",
        {},
        put(d_model=32, n_layer=2, ssm_cfg={}),
        NONE,
        None,
    ),
    "n_layer wrong": ("mamba2", "transformers", {}, put(n_layer=64), ["num_hidden_layers = 2 and n_layer = 64"], None),
    "num_hidden_layers wrong": (
        "mamba2",
        "transformers",
        {},
        put(n_layer=2, num_hidden_layers=64),
        ["n_layer = 2"],
        None,
    ),
    "d_state wrong": (
        "mamba",
        "transformers",
        {},
        ssm(d_state=8),
        ["both state_size = 16 and ssm_cfg.d_state = 8; the tensors say 16"],
        [f"{mixer}.A_log" for mixer in MIXERS],
    ),
    "d_conv wrong": ("mamba", "transformers", {}, ssm(d_conv=3), ["conv_kernel = 4 and ssm_cfg.d_conv = 3"], None),
    "expand wrong": ("mamba", "transformers", {}, put(expand=3), ["intermediate_size = 64 and expand"], None),
    "intermediate_size wrong": (
        "mamba",
        "transformers",
        {},
        put(intermediate_size=99),
        ["intermediate_size = 99"],
        None,
    ),
    "dt_rank wrong": (
        "mamba",
        "transformers",
        {},
        ssm(dt_rank=9),
        ["time_step_rank = 3 and ssm_cfg.dt_rank = 9"],
        None,
    ),
    "layer wrong": ("mamba2", "transformers", {}, ssm(layer="Mamba1"), ["ssm_cfg.layer = mamba1"], None),
    "bias wrong": ("mamba", "transformers", {}, ssm(bias=True), ["use_bias = False and ssm_cfg.bias = True"], None),
    "headdim wrong": ("mamba2", "transformers", {}, ssm(headdim=64), ["head_dim = 16 and ssm_cfg.headdim = 64"], None),
    "num_heads wrong": (
        "mamba2",
        "mamba_ssm",
        {},
        put(num_heads=4, head_dim=64),
        ["ssm_cfg.headdim = 16 and head_dim = 64"],
        None,
    ),
    "d_state not said": (
        "mamba",
        "mamba_ssm",
        {"state_size": 8},
        ssm(d_state=...),
        ["doesn't say d_state; mixer.A_log shows 8"],
        None,
    ),
    "headdim not said": ("mamba2", "mamba_ssm", {}, ssm(headdim=...), ["doesn't say headdim; .* shows 16"], None),
    "layer not said": (
        "mamba2",
        "mamba_ssm",
        {},
        ssm(layer=...),
        ["doesn't say ssm_cfg.layer; mixer shows mamba2"],
        None,
    ),
    "rank not said": ("mamba", "mamba_ssm", {}, ssm(dt_rank=...), ["doesn't say dt_rank; .* shows 3"], None),
    "ngroups lost": (
        "mamba2",
        "transformers",
        {"n_groups": 8, "num_heads": 8, "head_dim": 8},
        both(put(n_groups=1), ssm(ngroups=8)),
        ["both ssm_cfg.ngroups = 8 and n_groups = 1; the tensors say 8"],
        None,
    ),
    "groups not said": (
        "mamba2",
        "transformers",
        {"n_groups": 2},
        drop("n_groups"),
        ["doesn't say ngroups; .* shows 2"],
        None,
    ),
    "head of its own, not said": (
        "mamba",
        "mamba_ssm",
        UNTIED,
        drop("tie_embeddings"),
        ["head and embedding are not tied, as would be usual"],
        [HEAD, EMBEDDING],
    ),
    "tie_word_embeddings beside a wrong tie_embeddings": (
        "mamba",
        "transformers",
        UNTIED,
        put(tie_embeddings=True),
        ["tie_word_embeddings = False and tie_embeddings = True"],
        None,
    ),
    "tie_embeddings beside a wrong tie_word_embeddings": (
        "mamba",
        "transformers",
        UNTIED,
        put(tie_embeddings=False, tie_word_embeddings=True),
        ["the config has both tie_word_embeddings = True and tie_embeddings = False"],
        None,
    ),
    "head absent, ties contradict": (
        "mamba",
        "transformers",
        {},
        put(tie_embeddings=False),
        ["there is no lm_head.weight; the embedding serves as head"],
        None,
    ),
    "head equal, ties contradict": (
        "mamba",
        "transformers",
        {},
        both(put(tie_embeddings=False), lambda c, t: t.update({HEAD: t["backbone.embeddings.weight"].clone()})),
        ["the config has both tie_word_embeddings = True and tie_embeddings = False"],
        [HEAD, EMBEDDING],
    ),
    "extra tensors outside the blocks": (
        "mamba2",
        "mamba_ssm",
        {},
        add(backbone__norm_e__weight=torch.ones(3), position_ids=torch.arange(4), lm_head__scale=torch.ones(1)),
        ["tensors that the architecture doesn't have are ignored"],
        ["backbone.norm_e.weight", "lm_head.scale", "position_ids"],
    ),
    "limits of dt in both ways of writing": (
        "mamba2",
        "transformers",
        {},
        both(put(time_step_limit=[0.0, {"__float__": "Infinity"}]), ssm(dt_limit=[0, float("inf")])),
        NONE,
        None,
    ),
    "limits of dt differ": (
        "mamba2",
        "transformers",
        {},
        ssm(dt_limit=[0.0, 0.1]),
        ["time_step_limit = .* and ssm_cfg.dt_limit"],
        None,
    ),
}


@pytest.mark.parametrize(
    ("kind", "layout", "overrides", "change", "whats", "tensors"), CASES.values(), ids=CASES.keys()
)
def test_what_is_tolerated(tmp_path, caplog, kind, layout, overrides, change, whats, tensors):
    config, weights = files_of(kind, layout, **overrides)
    change(config, weights)
    folder = write(tmp_path / "their-model", config, weights)
    model = check(folder, truth(kind, **overrides)[1], caplog, whats, tensors)
    assert model.config.tie_word_embeddings == overrides.get("tie_word_embeddings", True)
    # Written as one of ours, nothing of it is left to repair.
    model.save_pretrained(tmp_path / "ours")
    check(tmp_path / "ours", model(IDS).logits, caplog, NONE)
