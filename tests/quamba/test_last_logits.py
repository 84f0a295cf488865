"""`quamba.last_logits`: the next token's logits of any causal language model, by value, in one run of the network."""

import importlib.util
import inspect
import sys
import types

import pytest
import torch
import transformers
from transformers.models.bamba import modeling_bamba

import quamba
from quamba.errors import QuambaError
from quamba.generation import InferenceParams, left_pad, new_state
from tests.quamba import stubs
from tests.quamba.formats.foreign import truth
from tests.quamba.models import random_model
from tests.quamba.stubs import VOCAB, Memory

NEAR = {"rtol": 1e-5, "atol": 1e-5}
THEIRS = {"rtol": 1e-5, "atol": 5e-5}  # one of their scans sums in chunks, the other token by token


def ids_of(rows, length, vocab=VOCAB, seed=1):
    return torch.randint(1, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def exact(network, ids):
    """The stubs' logits after the last token, in closed form."""
    weights = 0.7 ** torch.arange(ids.shape[1] - 1, -1, -1)
    return (network.embedding[ids] * weights[:, None]).sum(1) @ network.head


CALLABLE = (
    stubs.LikeMambaSsm,
    stubs.LikeTransformers,
    stubs.Older,
    stubs.Neither,
    stubs.Flat,
    stubs.Swallowing,
    stubs.Deaf,
)


@pytest.mark.parametrize("kind", CALLABLE)
@pytest.mark.parametrize("shape", [(5, 41), (1, 7), (4, 1), (3, 3)])
def test_any_way_of_being_called(kind, shape):
    network, ids = kind(), ids_of(*shape)
    logits = quamba.last_logits(network, ids)
    assert logits.shape == (shape[0], VOCAB)
    assert network.forwards == 1
    torch.testing.assert_close(logits, exact(network, ids), **NEAR)


def test_what_is_asked_for():
    """The more specific name first; nothing that only `**kwargs` would take."""
    for kind, asked in (
        (stubs.LikeMambaSsm, {"num_last_tokens": 1}),
        (stubs.LikeTransformers, {"logits_to_keep": 1, "use_cache": False}),
        (stubs.Deaf, {"num_last_tokens": 1, "logits_to_keep": 0}),
        (stubs.Swallowing, {}),
    ):
        network = kind()
        quamba.last_logits(network, ids_of(2, 4))
        assert network.asked == asked
    function = stubs.LikeTransformers()
    assert quamba.last_logits(lambda input_ids: function(input_ids), ids_of(2, 4)).shape == (2, VOCAB)
    wrapped = stubs.LikeTransformers()
    wrapper = type(
        "Wrapper", (), {"__call__": lambda self, **kwargs: wrapped(**kwargs), "_orig_mod": wrapped}
    )()  # as torch.compile wraps
    assert quamba.last_logits(wrapper, ids_of(2, 4)).shape == (2, VOCAB)
    assert wrapped.asked == {"logits_to_keep": 1, "use_cache": False}


def test_the_logits_of_all_positions_are_let_go():
    logits = quamba.last_logits(stubs.Neither(), ids_of(2, 40))
    assert logits.untyped_storage().nbytes() == 2 * VOCAB * 4


@pytest.mark.parametrize(
    "shape", [(2, 3, VOCAB), (10, VOCAB), (VOCAB,), (2, 5, VOCAB, 1), (1, 5, VOCAB), (2, 5, VOCAB - 1), (2, 1, 3), ()]
)
def test_other_shapes_are_an_error(shape):
    with pytest.raises(QuambaError) as error:
        quamba.last_logits(stubs.Returning(torch.zeros(shape)), ids_of(2, 5))
    for part in ("Returning", "logits_to_keep=1", str(list(shape)), "[2, 5]", "[2, V]", "[2, 1, V]", "[2, 5, V]"):
        assert part in str(error.value)


@pytest.mark.parametrize("answer", [None, (), "text", {"last_hidden_state": torch.zeros(2, 5, 8)}, {"logits": None}])
def test_no_logits_are_an_error(answer):
    with pytest.raises(QuambaError, match=r"Returning returned a .* without logits: is it a causal language model"):
        quamba.last_logits(stubs.Returning(answer), ids_of(2, 5))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("dtype"), TypeError("unexpected keyword 'logits_to_keep'")]
)
def test_the_models_own_errors_pass(error):
    class Failing(stubs.LikeTransformers):
        def forward(self, input_ids, past_key_values=None, logits_to_keep=0):
            if self.forwards == 2:
                self.forwards += 1
                raise error
            return super().forward(input_ids, past_key_values, logits_to_keep=logits_to_keep)

    network, state = Failing(), Memory()
    for _ in range(2):
        quamba.last_logits(network, ids_of(1, 1), state)
    with pytest.raises(type(error)) as raised:
        quamba.last_logits(network, ids_of(1, 1), state)
    assert raised.value is error
    assert (network.forwards, state.updates) == (3, 2)


@pytest.mark.parametrize("ids", [torch.arange(4), torch.zeros(2, 0, dtype=torch.long), torch.zeros(1, 2, 3).long()])
def test_ids_that_can_not_be(ids):
    with pytest.raises(ValueError, match="ids have shape"):
        quamba.last_logits(stubs.Neither(), ids)


def greedy(model, ids, steps, state=None):
    """New tokens `[N, steps]` and their logits `[steps, N, V]`; without a state from the whole text each time."""
    text, logits, given = ids, [], ids
    for _ in range(steps):
        logits.append(quamba.last_logits(model, given, state))
        token = logits[-1].argmax(-1, keepdim=True)
        text = torch.cat([text, token], dim=1)
        given = text if state is None else token
    return text[:, ids.shape[1] :], torch.stack(logits)


@pytest.mark.parametrize("kind", [stubs.LikeMambaSsm, stubs.LikeTransformers])
def test_a_state_is_advanced_once_a_step(kind):
    network, ids = kind(), ids_of(2, 5)
    state = Memory() if kind is stubs.LikeTransformers else new_state(network, rows=2)
    tokens, logits = greedy(network, ids, 8, state)
    memory = state if kind is stubs.LikeTransformers else state.key_value_memory_dict["memory"]
    assert (network.forwards, memory.updates, memory.read) == (8, 8, 12)
    if kind is stubs.LikeMambaSsm:
        assert state.seqlen_offset == 12
    expected = greedy(network, ids, 8)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], **NEAR)
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % VOCAB
    state = Memory() if kind is stubs.LikeTransformers else new_state(network, rows=2)
    quamba.last_logits(network, other, state)
    for t in range(7):
        moved = quamba.last_logits(network, tokens[:, t : t + 1], state)
    assert (moved - logits[7]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [stubs.Swallowing, stubs.Neither, stubs.Deaf])
def test_a_state_that_would_be_ignored_is_refused(kind):
    network = kind()
    for state in (Memory(), InferenceParams(8, 1)):
        with pytest.raises(QuambaError, match=rf"{kind.__name__}'s forward has no .* give the whole text"):
            quamba.last_logits(network, ids_of(1, 3), state)
    assert network.forwards == 0 and new_state(network) is None
    assert torch.equal(greedy(network, ids_of(1, 4), 16)[0], greedy(stubs.LikeTransformers(), ids_of(1, 4), 16)[0])


def test_another_state_that_comes_back_is_refused():
    class Copying(stubs.LikeTransformers):
        def forward(self, input_ids, past_key_values=None, logits_to_keep=0):
            return super().forward(input_ids, Memory(), logits_to_keep=logits_to_keep)

    with pytest.raises(QuambaError, match="another past_key_values instead of advancing"):
        quamba.last_logits(Copying(), ids_of(1, 3), Memory())


def test_a_state_inside_the_model_is_refused():
    network = stubs.LikeTransformers()
    network.config.model_type = "recurrent_gemma"
    with pytest.raises(QuambaError, match="keeps its state in itself"):
        quamba.last_logits(network, ids_of(1, 3), Memory())


def test_padding_needs_a_model_that_takes_a_mask():
    ids, mask = left_pad([[1, 2, 3], [4]])
    with pytest.raises(QuambaError, match="LikeMambaSsm's forward has no attention_mask"):
        quamba.last_logits(stubs.LikeMambaSsm(), ids, mask=mask)
    assert quamba.last_logits(stubs.LikeMambaSsm(), ids, mask=torch.ones(2, 3)).shape == (2, VOCAB)


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        ([[1, 1, 1], [1, 1, 0]], "row 1 of the attention mask ends in padding.* pad on the left"),
        ([[1, 0, 1], [1, 1, 1]], "row 0 of the attention mask has zeros after a real token"),
        ([[1, 1, 1], [0, 0, 0]], "row 1 of the attention mask has no real token"),
        ([[1, 1, 1]], r"shape \[1, 3\]; need \[2, 3\]"),
        ([[1, 1, 1, 1]] * 2, r"shape \[2, 4\]; need \[2, 3\]"),
    ],
)
def test_masks_that_can_not_be(mask, why):
    with pytest.raises(ValueError, match=why):
        quamba.last_logits(stubs.Neither(), ids_of(2, 3), mask=torch.tensor(mask))


def test_left_pad():
    eos = 0
    rows = [[5, eos, 7], torch.tensor([eos]), [3, 4, 5, eos]]
    ids, mask = left_pad(rows, pad=eos)
    assert ids.tolist() == [[0, 5, 0, 7], [0, 0, 0, 0], [3, 4, 5, 0]]
    assert mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]  # real eos are tokens
    assert ids.dtype == mask.dtype == torch.int64
    for bad, why in (([], "no rows"), ([[1], []], "every row")):
        with pytest.raises(ValueError, match=why):
            left_pad(bad)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BAMBA = {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 4}
FAMILIES = {
    "ours, mamba1": lambda: random_model("mamba1"),
    "ours, mamba2": lambda: random_model("mamba2"),
    "mamba": lambda: truth("mamba")[0],
    "mamba2": lambda: truth("mamba2")[0],
    "falcon_mamba": lambda: truth("falcon_mamba")[0],
    "bamba": lambda: transformers.BambaForCausalLM(
        transformers.BambaConfig(**SMALL, **BAMBA, intermediate_size=48, initializer_range=0.3)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, intermediate_size=48, initializer_range=0.3)
    ),
}


@pytest.fixture(scope="module")
def families():
    """Bamba with torch's functions: transformers takes mamba-ssm's for it wherever that is installed, and they need a GPU."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        for name, function in vars(modeling_bamba).items():
            if name.startswith(("mamba2_", "causal_conv1d_")):
                patch.setattr(modeling_bamba, name, inspect.unwrap(function))
        yield {name: make().eval() for name, make in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def family(request, families):
    return families[request.param]


@torch.no_grad()
def everything(model, ids):
    return model(ids, use_cache=False).logits


def test_families_three_ways(family):
    ids = ids_of(3, 9, 64)
    logits = everything(family, ids)
    torch.testing.assert_close(quamba.last_logits(family, ids), logits[:, -1], **THEIRS)
    torch.testing.assert_close(family(ids, logits_to_keep=1).logits[:, 0], logits[:, -1], **THEIRS)


def test_families_with_a_state(family):
    """A prompt, then token by token; positions are counted on (RoPE), and every row has its own."""
    ids = ids_of(2, 14, 64)
    logits, state = everything(family, ids), new_state(family)
    got = [quamba.last_logits(family, ids[:, :6], state)]
    got += [quamba.last_logits(family, ids[:, t : t + 1], state) for t in range(6, 14)]
    torch.testing.assert_close(torch.stack(got, 1), logits[:, 5:], **THEIRS)


def test_families_with_a_left_padded_batch(family):
    rows = [ids_of(1, n, 64, seed=n)[0] for n in (4, 9, 1)]
    ids, mask = left_pad(rows)
    alone = torch.cat([everything(family, row[None])[:, -1] for row in rows])
    torch.testing.assert_close(quamba.last_logits(family, ids, mask=mask), alone, **THEIRS)
    state = new_state(family)
    torch.testing.assert_close(quamba.last_logits(family, ids, state, mask), alone, **THEIRS)
    for _ in range(3):
        token = ids_of(3, 1, 64, seed=mask.shape[1])
        rows = [torch.cat([row, one]) for row, one in zip(rows, token, strict=True)]
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
        got = quamba.last_logits(family, token, state, mask)
        alone = torch.cat([everything(family, row[None])[:, -1] for row in rows])
        torch.testing.assert_close(got, alone, **THEIRS)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_with_a_prompt_in_chunks(families, name):
    """transformers' Mamba1 starts its scan anew for each chunk, which is refused; the others go on."""
    family, ids = families[name], ids_of(2, 12, 64)
    state = new_state(family)
    quamba.last_logits(family, ids[:, :5], state)
    if name in ("mamba", "falcon_mamba"):
        wrong = family(ids[:, 5:], cache_params=state, use_cache=True).logits[:, -1]
        assert (wrong - everything(family, ids)[:, -1]).abs().max() > 0.01  # where this fails, the refusal can go
        state = new_state(family)
        quamba.last_logits(family, ids[:, :5], state)
        with pytest.raises(QuambaError, match=r"starts its scan from zero.* one at a time"):
            quamba.last_logits(family, ids[:, 5:], state)
    else:
        got = quamba.last_logits(family, ids[:, 5:], state)
        torch.testing.assert_close(got, everything(family, ids)[:, -1], **THEIRS)


def test_a_mask_must_cover_what_the_state_has_read(families):
    model, state = families["llama"], new_state(families["llama"])
    quamba.last_logits(model, ids_of(2, 5, 64), state)
    with pytest.raises(ValueError, match="mask has 1 columns; the state has read 5 and 1 more"):
        quamba.last_logits(model, ids_of(2, 1, 64), state, torch.ones(2, 1))


@pytest.fixture
def mamba_ssm(monkeypatch):
    """A small `MambaLMHeadModel` on its own torch functions, without CUDA."""
    if importlib.util.find_spec("mamba_ssm") is None:
        pytest.skip("mamba-ssm is not installed")
    if importlib.util.find_spec("selective_scan_cuda") is None:
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    try:
        from mamba_ssm.models import config_mamba, mixer_seq_simple
        from mamba_ssm.modules import mamba_simple
        from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
    except ImportError as error:
        pytest.skip(f"mamba-ssm can't be imported: {error}")
    monkeypatch.setattr(mamba_simple, "selective_scan_fn", selective_scan_ref)
    for name in ("selective_state_update", "causal_conv1d_fn", "causal_conv1d_update"):
        monkeypatch.setattr(mamba_simple, name, None)
    config = config_mamba.MambaConfig(
        d_model=32, n_layer=2, vocab_size=61, rms_norm=False, fused_add_norm=False, ssm_cfg={"layer": "Mamba1"}
    )
    torch.manual_seed(0)
    model = mixer_seq_simple.MambaLMHeadModel(config, device="cpu").eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(50)
    return model


def test_mamba_ssm(mamba_ssm):
    ids = ids_of(2, 14, 61)
    with torch.no_grad():
        logits = mamba_ssm(ids).logits
        assert logits.shape == (2, 14, 64)  # its vocabulary is padded
        one = mamba_ssm(ids, num_last_tokens=1).logits
    torch.testing.assert_close(quamba.last_logits(mamba_ssm, ids), logits[:, -1], **NEAR)
    torch.testing.assert_close(one[:, 0], logits[:, -1], **NEAR)
    state = new_state(mamba_ssm, rows=2)
    got = [quamba.last_logits(mamba_ssm, ids[:, :6], state)]
    got += [quamba.last_logits(mamba_ssm, ids[:, t : t + 1], state) for t in range(6, 14)]
    torch.testing.assert_close(torch.stack(got, 1), logits[:, 5:], rtol=1e-4, atol=1e-4)
    assert state.seqlen_offset == 14
    with pytest.raises(AssertionError, match="1 token at a time"):
        quamba.last_logits(mamba_ssm, ids[:, :2], state)
