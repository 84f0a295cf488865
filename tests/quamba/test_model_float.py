"""The float model against transformers' MambaForCausalLM on the same weights."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from quamba import QuambaLMHeadModel, bundled
from quamba.config import QuambaConfig
from quamba.errors import QuambaError

ODD = {
    "plain": {},
    "conv bias off": {"use_conv_bias": False},
    "linear bias on": {"use_bias": True},
    "d_state 8": {"state_size": 8},
    "d_state 32": {"state_size": 32},
    "expand 3": {"expand": 3},
    "conv width 3": {"conv_kernel": 3},
    "conv width 2": {"conv_kernel": 2},
    "odd vocabulary": {"vocab_size": 61},
    "untied head": {"tie_word_embeddings": False},
    "dt_rank not D/16": {"time_step_rank": 7},
    "eps": {"layer_norm_epsilon": 1e-3},
    "all odd": {
        "use_conv_bias": False,
        "use_bias": True,
        "state_size": 8,
        "expand": 3,
        "conv_kernel": 3,
        "vocab_size": 61,
        "tie_word_embeddings": False,
        "time_step_rank": 7,
    },
}


def make_pair(folder, seed=0, **overrides):
    """A random transformers model, and ours loaded from what it saved."""
    torch.manual_seed(seed)
    settings = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "initializer_range": 0.3} | overrides
    theirs = MambaForCausalLM(MambaConfig(**settings)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "norm" in name or name.endswith("bias") or name.endswith(".D"):
                p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(folder)
    return theirs, QuambaLMHeadModel.from_pretrained(folder)


@pytest.mark.parametrize("overrides", ODD.values(), ids=ODD.keys())
def test_logits_equal_transformers(tmp_path, overrides):
    theirs, ours = make_pair(tmp_path, **overrides)
    ids = torch.randint(0, theirs.config.vocab_size, (2, 37))
    with torch.no_grad():
        expected = theirs(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_real_weights_equal_transformers():
    path = bundled.model_path("mamba1-nano")
    theirs = MambaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ours = QuambaLMHeadModel.from_pretrained("mamba1-nano", dtype="float32")
    ids = torch.randint(0, 4096, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=2e-5)  # logits reach 20 here


def test_one_token_and_shorter_than_the_convolution(tmp_path):
    theirs, ours = make_pair(tmp_path)
    for length in (1, 2, 3):
        ids = torch.randint(0, 64, (1, length))
        with torch.no_grad():
            expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_loss_logits_to_keep_hidden_states_and_embeds(tmp_path):
    _, ours = make_pair(tmp_path)
    ids = torch.randint(0, 64, (2, 11))
    full = ours(ids, labels=ids, output_hidden_states=True)
    naive = -torch.stack([full.logits[b, t].log_softmax(-1)[ids[b, t + 1]] for b in range(2) for t in range(10)]).mean()
    torch.testing.assert_close(full.loss, naive)
    assert len(full.hidden_states) == 4
    torch.testing.assert_close(ours(ids, logits_to_keep=1).logits, full.logits[:, -1:])
    torch.testing.assert_close(ours(ids, logits_to_keep=torch.tensor([0, 5])).logits, full.logits[:, [0, 5]])
    embeds = ours.get_input_embeddings()(ids)
    torch.testing.assert_close(ours(inputs_embeds=embeds).logits, full.logits)
    assert ours(ids, return_dict=False)[0].shape == full.logits.shape
    with pytest.raises(ValueError, match="exactly one"):
        ours(ids, inputs_embeds=embeds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_and_keeps_precise_tensors(tmp_path, dtype):
    _, reference = make_pair(tmp_path)
    half = QuambaLMHeadModel.from_pretrained(tmp_path, dtype=dtype)
    ids = torch.randint(0, 64, (2, 20))
    logits, expected = half(ids).logits, reference(ids).logits
    assert logits.dtype == dtype
    error = (logits.float() - expected).pow(2).mean().sqrt() / expected.std()
    assert error < (0.02 if dtype == torch.float16 else 0.1)
    for model in (half, reference.half() if dtype == torch.float16 else reference.to(dtype)):
        mixer = model.backbone.layers[0].mixer
        assert mixer.in_proj.weight.dtype == dtype
        assert {mixer.A_log.dtype, mixer.D.dtype, mixer.dt_proj.bias.dtype} == {torch.float32}


def test_cast_keeps_precise_values_bit_for_bit(tmp_path):
    _, model = make_pair(tmp_path)
    before = model.backbone.layers[1].mixer.A_log.clone()
    model.half().float()
    assert torch.equal(model.backbone.layers[1].mixer.A_log, before)


def test_unknown_mixer_and_argument_are_named():
    with pytest.raises(QuambaError, match="mamba9"):
        QuambaLMHeadModel(QuambaConfig(blocks=[{"mixer": "mamba9", "args": {}, "mlp": None}]))
    with pytest.raises(QuambaError, match="did you mean 'state_size'"):
        QuambaLMHeadModel(
            QuambaConfig(blocks=[{"mixer": "mamba1", "args": {"intermediate_size": 8, "state_sise": 4}, "mlp": None}])
        )


def test_weights_too_large_for_float16_are_refused(tmp_path):
    theirs, _ = make_pair(tmp_path)
    with torch.no_grad():
        theirs.backbone.norm_f.weight[2] = 1e6
    theirs.save_pretrained(tmp_path)
    with pytest.raises(QuambaError, match="too large for float16"):
        QuambaLMHeadModel.from_pretrained(tmp_path, dtype="float16")
