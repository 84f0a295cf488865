"""The float Mamba2 family: against transformers, against a float64 recurrence, and one layout against the other."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config, Mamba2ForCausalLM

import quamba
from quamba import QuambaLMHeadModel, bundled
from quamba.config import QuambaConfig
from quamba.errors import CheckpointError, QuambaError
from quamba.formats.limits import dt_limits
from quamba.mixers.mamba2 import Mamba2, Mamba2Args
from quamba.recipe import Recipe

ODD = {
    "plain": {},
    "conv bias off": {"use_conv_bias": False},
    "linear bias on": {"use_bias": True},
    "d_state 8": {"state_size": 8},
    "d_state 32": {"state_size": 32},
    "headdim 8": {"head_dim": 8, "num_heads": 8},
    "one head": {"head_dim": 64, "num_heads": 1},
    "expand 3": {"expand": 3, "num_heads": 6},
    "conv width 3": {"conv_kernel": 3},
    "conv width 2": {"conv_kernel": 2},
    "odd vocabulary": {"vocab_size": 61},
    "untied head": {"tie_word_embeddings": False},
    "chunks of 1": {"chunk_size": 1},
    "chunks of 16": {"chunk_size": 16},
    "chunks of 64": {"chunk_size": 64},
    "dt limited": {"time_step_limit": (0.01, 0.1)},
    "dt limited below": {"time_step_limit": (0.02, float("inf"))},
    "eps": {"layer_norm_epsilon": 1e-3},
    "all odd": {
        "use_conv_bias": False,
        "use_bias": True,
        "state_size": 8,
        "expand": 3,
        "head_dim": 8,
        "num_heads": 12,
        "conv_kernel": 3,
        "vocab_size": 61,
        "tie_word_embeddings": False,
        "chunk_size": 16,
        "time_step_limit": (0.0, 0.2),
    },
}
NAMES = {  # transformers' name: mamba-ssm's, in ssm_cfg
    "state_size": "d_state",
    "head_dim": "headdim",
    "n_groups": "ngroups",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "chunk_size": "chunk_size",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
    "time_step_limit": "dt_limit",
}


def settings(**overrides):
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 16, "n_groups": 1}
    return small | {"head_dim": 16, "num_heads": 4, "tie_word_embeddings": True, "initializer_range": 0.3} | overrides


def make_theirs(folder, seed=0, **overrides):
    """A random transformers model, saved."""
    torch.manual_seed(seed)
    theirs = Mamba2ForCausalLM(Mamba2Config(**settings(**overrides))).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "norm" in name or name.endswith("bias") or name.endswith((".D", "A_log")):
                p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(folder)
    return theirs


def as_mamba_ssm(source, folder, pad=1, **ssm):
    """The same weights in mamba-ssm's layout, written by hand."""
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    folder.mkdir()
    save_file(
        {name.replace("embeddings.", "embedding."): t for name, t in tensors.items()}, folder / "model.safetensors"
    )
    cfg = {theirs: config[name] for name, theirs in NAMES.items() if name != "time_step_limit"} | {"layer": "Mamba2"}
    ours = {
        "d_model": config["hidden_size"],
        "n_layer": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "pad_vocab_size_multiple": pad,
        "tie_embeddings": config["tie_word_embeddings"],
        "ssm_cfg": cfg | ssm,
    }
    (folder / "config.json").write_text(json.dumps(ours))
    return folder


def random_model(mlp=None, **args):
    """One of ours without a file, every parameter random."""
    torch.manual_seed(4)
    shape = {"num_heads": 8, "head_dim": 6, "state_size": 5, "n_groups": 2, "norm_groups": 2} | args
    block = {"mixer": "mamba2", "args": shape, "mlp": mlp and {"intermediate_size": mlp}}
    model = QuambaLMHeadModel(QuambaConfig(vocab_size=40, hidden_size=24, blocks=[block] * 2)).eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(50)
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith(("bias", ".D")):
                p.add_(torch.randn_like(p) * 0.3)
    return model


@torch.no_grad()
def naive_logits(model, ids):
    """The whole model in float64, token by token, group by group."""
    w = {name: p.double() for name, p in model.state_dict().items()}
    a = model.backbone.layers[0].mixer.args
    inner, states, size = a.num_heads * a.head_dim, a.n_groups * a.state_size, a.num_heads * a.head_dim // a.norm_groups

    def norm(x, weight, eps=1e-5):
        return x / torch.sqrt((x * x).mean() + eps) * weight

    def silu(x):
        return x / (1 + torch.exp(-x))

    logits = []
    for row in ids:
        xs = [w["backbone.embedding.weight"][i] for i in row]
        for layer in range(len(model.backbone.layers)):
            p = f"backbone.layers.{layer}."
            g = {name[len(p + "mixer.") :]: t for name, t in w.items() if name.startswith(p + "mixer.")}
            D = g["D"] if a.D_has_hdim else g["D"].repeat_interleave(a.head_dim)
            h, past = torch.zeros(inner, a.state_size, dtype=torch.float64), []
            for t, residual in enumerate(xs):
                u = g["in_proj.weight"] @ norm(residual, w[p + "norm.weight"]) + g.get("in_proj.bias", 0)
                z, xBC, dt = u.split([inner, inner + 2 * states, a.num_heads])
                past.append(xBC)
                taps = [past[t - k] * g["conv1d.weight"][:, 0, -1 - k] for k in range(a.conv_kernel) if t >= k]
                x, B, C = silu(sum(taps) + g.get("conv1d.bias", 0)).split([inner, states, states])
                dt = torch.log1p(torch.exp(dt + g["dt_bias"])).clamp(a.dt_min, a.dt_max or math.inf)
                y = torch.zeros(inner, dtype=torch.float64)
                for c in range(inner):
                    head = c // a.head_dim
                    group = head // (a.num_heads // a.n_groups)
                    run = slice(group * a.state_size, (group + 1) * a.state_size)
                    h[c] = torch.exp(-torch.exp(g["A_log"][head]) * dt[head]) * h[c] + dt[head] * x[c] * B[run]
                    y[c] = h[c] @ C[run] + D[c] * x[c]
                if not a.norm_before_gate:
                    y = y * silu(z)
                if a.rms_norm:
                    y = torch.cat([norm(part, 1.0, a.norm_epsilon) for part in y.split(size)]) * g["norm.weight"]
                if a.norm_before_gate:
                    y = y * silu(z)
                xs[t] = residual + g["out_proj.weight"] @ y + g.get("out_proj.bias", 0)
                if p + "mlp.fc1.weight" in w:
                    value, gate = (w[p + "mlp.fc1.weight"] @ norm(xs[t], w[p + "norm2.weight"])).chunk(2)
                    xs[t] = xs[t] + w[p + "mlp.fc2.weight"] @ (value * silu(gate))
        logits.append(torch.stack([w["lm_head.weight"] @ norm(x, w["backbone.norm_f.weight"]) for x in xs]))
    return torch.stack(logits)


@pytest.mark.parametrize("overrides", ODD.values(), ids=ODD.keys())
def test_logits_equal_transformers(tmp_path, overrides):
    theirs = make_theirs(tmp_path, **overrides)
    ours = QuambaLMHeadModel.from_pretrained(tmp_path)
    ids = torch.randint(0, theirs.config.vocab_size, (2, 37))
    with torch.no_grad():
        expected = theirs(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_real_weights_equal_transformers():
    theirs = Mamba2ForCausalLM.from_pretrained(bundled.model_path("mamba2-nano"), dtype=torch.float32).eval()
    ours = QuambaLMHeadModel.from_pretrained("mamba2-nano", dtype="float32")
    ids = torch.randint(0, 4096, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
    tolerance = {"rtol": 1e-5, "atol": 2e-5}  # logits reach 20 here
    torch.testing.assert_close(ours(ids).logits, expected, **tolerance)
    state = ours.new_state()
    pieces = [ours(piece, past_key_values=state).logits for piece in ids.split([97, 1, 1, 51], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, **tolerance)


def test_a_live_transformers_model_is_read(tmp_path):
    from quamba.formats import checkpoint_of
    from quamba.formats.load import build

    theirs = make_theirs(tmp_path, time_step_limit=(0.0, 0.3))
    ids = torch.randint(0, 64, (1, 9))
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(build(checkpoint_of(theirs))(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"n_groups": 2},
        {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False, "expand": 1, "num_heads": 2},
    ],
    ids=["plain", "two groups", "odd"],
)
def test_both_layouts_are_one_model(tmp_path, overrides):
    make_theirs(tmp_path / "theirs", time_step_limit=(0.0, 0.5), **overrides)
    first = QuambaLMHeadModel.from_pretrained(tmp_path / "theirs")
    second = QuambaLMHeadModel.from_pretrained(
        as_mamba_ssm(tmp_path / "theirs", tmp_path / "native", dt_limit=[0.0, 0.5])
    )
    arguments = [[Mamba2Args(**b["args"]) for b in model.config.blocks] for model in (first, second)]
    assert arguments[0] == arguments[1]
    ids = torch.randint(0, 64, (2, 20))
    assert torch.equal(first(ids).logits, second(ids).logits)


def test_defaults_of_mamba_ssm(tmp_path):
    """What state-spaces/mamba2-130m leaves out of its file, with fewer layers and a small vocabulary."""
    make_theirs(tmp_path / "a", hidden_size=64, num_heads=2, head_dim=64, state_size=128, num_hidden_layers=1)
    folder = as_mamba_ssm(tmp_path / "a", tmp_path / "b", pad=16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"ssm_cfg": {"layer": "Mamba2"}, "vocab_size": 50}))
    args = QuambaLMHeadModel.from_pretrained(folder).config.blocks[0]["args"]
    assert Mamba2Args(**args) == Mamba2Args(2, 64, 128, 1, 1)


def test_an_mlp_after_the_mixer_is_read_from_mamba_ssm(tmp_path):
    """`d_intermediate`, rounded up to a multiple of 128 as mamba-ssm's GatedMLP does."""
    make_theirs(tmp_path / "a", num_hidden_layers=2)
    folder = as_mamba_ssm(tmp_path / "a", tmp_path / "b")
    config = json.loads((folder / "config.json").read_text()) | {"d_intermediate": 100}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for i in range(2):
        prefix = f"backbone.layers.{i}."
        tensors |= {
            prefix + "norm2.weight": 1 + 0.3 * torch.randn(32),
            prefix + "mlp.fc1.weight": torch.randn(256, 32) * 0.2,
            prefix + "mlp.fc2.weight": torch.randn(32, 128) * 0.2,
        }
    save_file(tensors, folder / "model.safetensors")
    model = QuambaLMHeadModel.from_pretrained(folder)
    assert [block["mlp"] for block in model.config.blocks] == [{"intermediate_size": 128}] * 2
    ids = torch.randint(0, 64, (1, 6))
    torch.testing.assert_close(model(ids).logits.double(), naive_logits(model, ids), rtol=1e-5, atol=1e-5)


GROUPED = {
    "one group": {"n_groups": 1, "norm_groups": 1},
    "two groups": {},
    "four groups": {"n_groups": 4, "norm_groups": 4},
    "norm over all channels": {"n_groups": 4, "norm_groups": 1},
    "D has headdim": {"D_has_hdim": True},
    "no norm": {"rms_norm": False},
    "norm before gate": {"norm_before_gate": True},
    "biases": {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3},
    "limits, eps": {"dt_min": 0.01, "dt_max": 0.05, "norm_epsilon": 1e-2},
    "conv of one tap": {"conv_kernel": 1},
    "an MLP after the mixer": {"mlp": 20},
}


@pytest.mark.parametrize("args", GROUPED.values(), ids=GROUPED.keys())
def test_logits_equal_a_naive_recurrence(args):
    model = random_model(**args)
    ids = torch.randint(0, 40, (2, 11), generator=torch.Generator().manual_seed(2))
    want = naive_logits(model, ids)
    assert want.std() > 0.1
    torch.testing.assert_close(model(ids).logits.double(), want, rtol=1e-5, atol=1e-5)
    state = model.new_state()
    steps = [model(ids[:, t : t + 1], past_key_values=state).logits for t in range(11)]
    torch.testing.assert_close(torch.cat(steps, 1).double(), want, rtol=1e-5, atol=1e-5)


def test_many_groups_equal_transformers_where_it_normalises_per_group(tmp_path):
    theirs = make_theirs(tmp_path, n_groups=2)
    if not hasattr(theirs.backbone.layers[0].mixer.norm, "group_size"):
        pytest.skip("transformers before 5.23 normalises over all channels")
    ids = torch.randint(0, 64, (2, 20))
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(QuambaLMHeadModel.from_pretrained(tmp_path)(ids).logits, expected, rtol=1e-5, atol=1e-5)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_groups": 1}))
    assert (QuambaLMHeadModel.from_pretrained(tmp_path)(ids).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_and_keeps_precise_tensors(tmp_path, dtype):
    make_theirs(tmp_path)
    reference, half = (QuambaLMHeadModel.from_pretrained(tmp_path, dtype=d) for d in (torch.float32, dtype))
    ids = torch.randint(0, 64, (2, 20))
    logits, expected = half(ids).logits, reference(ids).logits
    assert logits.dtype == dtype
    error = (logits.float() - expected).pow(2).mean().sqrt() / expected.std()
    assert error < (0.02 if dtype == torch.float16 else 0.1)
    for model in (half, reference.to(dtype)):
        mixer = model.backbone.layers[0].mixer
        assert mixer.in_proj.weight.dtype == mixer.norm.weight.dtype == dtype
        assert {mixer.A_log.dtype, mixer.D.dtype, mixer.dt_bias.dtype} == {torch.float32}


def test_an_artifact_of_the_float_model_is_the_same_model(tmp_path):
    model = random_model(dt_max=0.5)
    ids = torch.randint(0, 40, (2, 9))
    model.save_pretrained(tmp_path)
    again = QuambaLMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.blocks == model.config.blocks


@pytest.mark.parametrize("args", [{}, {"rms_norm": False}, {"n_groups": 8, "norm_groups": 1}])
def test_folding_and_rotating_change_nothing(args):
    model = random_model(**args)
    ids = torch.randint(0, 40, (2, 9))
    before = model(ids).logits
    for block in model.backbone.layers:
        block.mixer.fold_norm(block.norm.weight)
        block.norm.weight.fill_(1.0)
        block.mixer.rotate(Mamba2.rotations(block.mixer.args))
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_the_quantizer_runs_a_recipe_that_only_rotates(tmp_path):
    make_theirs(tmp_path / "float", head_dim=4, num_heads=24, expand=3, time_step_limit=(0.0, 0.5))
    ids = torch.randint(0, 64, (3, 12))
    rotated = quamba.quantize(
        tmp_path / "float", Recipe("turned", "mamba2", rotate=("out_proj",)), calibration=ids, out=tmp_path / "turned"
    )
    assert rotated.config.plan.blocks[0].rotations["out_proj"].n == 96
    expected = QuambaLMHeadModel.from_pretrained(tmp_path / "float")(ids).logits
    torch.testing.assert_close(rotated(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "pair",
    [[0.0, math.inf], ["0", "inf"], (0, {"__float__": "Infinity"}), [0.0, "Infinity"]],
)
def test_no_limit_is_written_in_many_ways(pair):
    assert dt_limits(pair) == {"dt_min": 0.0, "dt_max": None}


def test_limits_are_read_and_checked():
    assert dt_limits([0.001, 100]) == {"dt_min": 0.001, "dt_max": 100.0}
    for bad in (None, 3, [0.1], [0.2, 0.1], ["low", 1], [math.nan, 1], [-1, 1], [math.inf, math.inf], [0, {"x": 1}]):
        with pytest.raises(CheckpointError, match="dt"):
            dt_limits(bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_intermediate": 128}, "1 tensor is missing: backbone.layers.0.mlp.fc1.weight"),
        ({"ssm_cfg": {"headdim": 24}}, "by the config ssm_cfg.headdim = 24, by .*dt_bias 16"),
        ({"ssm_cfg": {"headdim": 0}}, "by the config ssm_cfg.headdim = 0, by .*dt_bias 16"),
        ({"ssm_cfg": {"headdim": -16}}, "by the config ssm_cfg.headdim = -16, by .*dt_bias 16"),
        ({"ssm_cfg": {"ngroups": 3}}, r"by the config 3 groups of 16 states, by .*groups \* states = 16"),
        ({"ssm_cfg": {"activation": "relu"}}, "activation = relu"),
        ({"ssm_cfg": {"d_state": "16"}}, "by the config 1 groups of '16' states"),
        ({"ssm_cfg": {"dt_limit": [1, 0]}}, "dt can't be limited to between 1.0 and 0.0"),
        ({"ssm_cfg": {"d_state": 8}}, r"by the config 1 groups of 8 states, by .*groups \* states = 16"),
        ({"ssm_cfg": {"rmsnorm": False}}, "by the config ssm_cfg.rmsnorm = False, but .*mixer.norm.weight is there"),
        ({"ssm_cfg": {"D_has_hdim": True}}, "by the config ssm_cfg.D_has_hdim = True, by .*mixer.D False"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, change, message):
    make_theirs(tmp_path / "a", num_hidden_layers=1)
    path = as_mamba_ssm(tmp_path / "a", tmp_path / "b") / "config.json"
    config = json.loads(path.read_text())
    config |= {"ssm_cfg": config["ssm_cfg"] | change.get("ssm_cfg", {})} if "ssm_cfg" in change else change
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        QuambaLMHeadModel.from_pretrained(tmp_path / "b")


def test_heads_that_do_not_fit_the_width_are_refused(tmp_path):
    make_theirs(tmp_path, num_hidden_layers=1)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_heads": 3}))
    with pytest.raises(CheckpointError, match=r"by the config num_heads = 3, by .*dt_bias 4"):
        QuambaLMHeadModel.from_pretrained(tmp_path)


def test_impossible_arguments_are_named():
    for args, message in (({"norm_groups": 5}, "norm_groups = 5"), ({"dt_min": 1.0, "dt_max": 0.5}, "limited")):
        with pytest.raises(QuambaError, match=message):
            random_model(**args)
