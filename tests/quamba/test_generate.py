"""transformers' own generate on our models: with a state and without one it writes the same, whatever it is asked for."""

import functools

import pytest
import torch

import quamba
from quamba.errors import QuambaError
from tests.quamba.generating import THREE, free_running, random_ids, run, three_models, tiny


@pytest.fixture(scope="module")
def models():
    return three_models()


@pytest.fixture(params=THREE)
def model(request, models):
    found = models[request.param]
    found.generation_config = free_running()
    return found


def same(a, b):
    """The same tokens, and scores as near as the hand-off promises."""
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.scores, b.scores, strict=True):
        finite = torch.isfinite(y)
        assert torch.equal(torch.isfinite(x), finite)
        torch.testing.assert_close(x[finite], y[finite], rtol=0, atol=0.1)


def odd(batch, ids):
    return list(range(1, 50, 2))


OPTIONS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 4},
    "beams returned": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "beams that stop": {"do_sample": False, "num_beams": 3, "eos_token_id": [5, 9, 12], "early_stopping": True},
    "top-p, top-k": {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20},
    "min-p": {"do_sample": True, "min_p": 0.05},
    "typical": {"do_sample": True, "typical_p": 0.8, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "bad words": {"do_sample": False, "bad_words_ids": [[7], [3, 4]], "suppress_tokens": [1, 2]},
    "bias": {"do_sample": False, "num_beams": 2, "sequence_bias": [[[5], 4.0], [[6, 7], -3.0]]},
    "allowed tokens": {"do_sample": False, "num_beams": 3, "prefix_allowed_tokens_fn": odd},
    "guidance": {"do_sample": False, "guidance_scale": 1.5},
    "forced end": {"do_sample": False, "eos_token_id": 4, "forced_eos_token_id": 4},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_recurrent_equals_parallel(model, options):
    ids = random_ids(50, 7)
    recurrent = run(model, ids, max_new_tokens=12, mode="recurrent", **options)
    new = recurrent.sequences[:, 7:]
    assert new.shape[1] == 12 or "eos_token_id" in options
    same(recurrent, run(model, ids, max_new_tokens=12, mode="parallel", **options))
    if "prefix_allowed_tokens_fn" in options:
        assert bool((new % 2 == 1).all())
    if "bad_words_ids" in options:
        assert not torch.isin(new, torch.tensor([1, 2, 7])).any()


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_float_scores_are_equal_to_1e5(models, name):
    model, ids = models[name], random_ids(50, 7)
    a, b = (
        torch.stack(run(model, ids, max_new_tokens=12, do_sample=False, mode=mode).scores)
        for mode in ("recurrent", "parallel")
    )
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture
def fed(monkeypatch):
    """How many tokens each forward was given."""
    lengths, forward = [], quamba.QuambaLMHeadModel.forward

    @functools.wraps(forward)  # generate reads its signature
    def counting(self, *args, **kwargs):
        lengths.append((args[0] if args else kwargs["input_ids"]).shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(quamba.QuambaLMHeadModel, "forward", counting)
    return lengths


STEPS = {"recurrent": [7, 1, 1, 1], "parallel": [7, 8, 9, 10]}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, "recurrent"),
        ({"mode": "auto"}, "recurrent"),
        ({"mode": "recurrent"}, "recurrent"),
        ({"mode": "parallel"}, "parallel"),
        ({"use_cache": False}, "parallel"),
        ({"mode": "parallel", "use_cache": False}, "parallel"),
        ({"mode": "recurrent", "use_cache": True}, "recurrent"),
    ],
)
def test_what_each_mode_feeds(model, fed, beams, options, mode):
    """And that the network runs once a step."""
    model.generate(random_ids(50, 7), attention_mask=torch.ones(1, 7), max_new_tokens=4, num_beams=beams, **options)
    assert fed == STEPS[mode]


@pytest.mark.parametrize("mode", ["auto", "recurrent", "parallel"])
def test_a_mode_goes_before_generation_configs(model, fed, mode):
    ids, mask = random_ids(50, 7), torch.ones(1, 7)
    for cached in (True, False):
        expected = STEPS[mode if mode != "auto" else "recurrent" if cached else "parallel"]
        given = free_running()
        given.use_cache, given.max_new_tokens = cached, 4
        model.generate(ids, given, attention_mask=mask, mode=mode)
        assert given.use_cache is cached
        model.generation_config.use_cache = cached
        model.generate(ids, attention_mask=mask, max_new_tokens=4, mode=mode)
        assert fed == expected * 2
        fed.clear()


def test_modes_that_contradict(model):
    ids, state = random_ids(50, 7), model.new_state()
    with pytest.raises(ValueError, match="mode is 'fast'; choose auto, recurrent, parallel"):
        model.generate(ids, mode="fast")
    with pytest.raises(ValueError, match="mode='parallel' and use_cache=True contradict"):
        model.generate(ids, mode="parallel", use_cache=True)
    for options in ({"mode": "parallel"}, {"use_cache": False}):
        with pytest.raises(ValueError, match=r"can't continue past_key_values: leave one of them out"):
            model.generate(ids, past_key_values=state, max_new_tokens=2, **options)


def test_greedy_is_the_argmax_of_the_recomputed_sequence(model):
    ids = random_ids(50, 7)
    out = model.generate(ids, max_new_tokens=10, do_sample=False)
    expected = ids
    for _ in range(10):
        logits = model(expected).logits[:, -1]
        top = logits.topk(2).values[0]
        assert top[0] - top[1] > 0.2  # a clear winner: the two ways must agree
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_logits_of_every_step(model, beams):
    """`output_logits`: `[N, V]` a step, those of the text so far, before any processor."""
    ids, options = random_ids(50, 7, batch=2), {"num_beams": beams, "repetition_penalty": 1.5}
    out = run(model, ids, max_new_tokens=6, do_sample=False, output_logits=True, **options)
    assert len(out.logits) == 6
    assert all(logits.shape == (2 * beams, 50) for logits in out.logits)
    if beams > 1:
        torch.testing.assert_close(
            out.logits[0], model(ids).logits[:, -1].repeat_interleave(beams, 0), rtol=0, atol=0.1
        )
        return
    for t, logits in enumerate(out.logits):
        torch.testing.assert_close(logits, model(out.sequences[:, : 7 + t]).logits[:, -1], rtol=0, atol=0.1)


@pytest.mark.parametrize("beams", [None, 0, 1])
def test_no_beams_are_greedy(model, beams):
    ids = random_ids(50, 7)
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
    eos = int(greedy[0, 9])
    out = model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=beams)
    assert type(out) is type(greedy) and torch.equal(out, greedy)
    late = model.generate(ids, max_new_tokens=8, min_new_tokens=5, num_beams=beams, eos_token_id=eos)
    assert eos not in late[0, 7:12].tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompt_may_arrive_in_chunks(model, beams):
    ids = random_ids(50, 23)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    whole = model.generate(ids, **options)
    state = model.new_state()
    for piece in ids[:, :-1].split(6, dim=1):
        model(piece, past_key_values=state)
    if beams > 1:
        with pytest.raises(ValueError, match=r"holds 1 rows and the input has 3.*batch_repeat_interleave"):
            model.generate(ids, past_key_values=state, **options)
        state.batch_repeat_interleave(beams)
    assert torch.equal(model.generate(ids, past_key_values=state, **options), whole)
    assert torch.equal(model.generate(ids, prefill_chunk_size=5, **options), whole)


def test_a_state_goes_on_with_the_next_turn(model):
    """The state that generate returns has read all but the last token; the next prompt is the text so far and more."""
    first = run(model, random_ids(50, 9), max_new_tokens=5, do_sample=False)
    state = first.past_key_values
    assert state.get_seq_length() == first.sequences.shape[1] - 1
    text = torch.cat([first.sequences, random_ids(50, 4, seed=8)], dim=1)
    expected = model.generate(text, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(text, past_key_values=state, max_new_tokens=6, do_sample=False), expected)


def test_a_state_that_has_read_the_whole_prompt(model):
    ids, state = random_ids(50, 9), model.new_state()
    model(ids, past_key_values=state)
    with pytest.raises(ValueError, match="has read 9 tokens and the text has 9"):
        model.generate(ids, past_key_values=state, max_new_tokens=2)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompt_may_be_embeddings(model, beams):
    ids = random_ids(50, 7)
    embeddings, options = (
        model.get_input_embeddings()(ids),
        {"max_new_tokens": 6, "do_sample": False, "num_beams": beams},
    )
    assert torch.equal(model.generate(inputs_embeds=embeddings, **options), model.generate(ids, **options)[:, 7:])
    with pytest.raises(ValueError, match="mode='parallel' needs input_ids"):
        model.generate(inputs_embeds=embeddings, mode="parallel", **options)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("dtype")])
def test_errors_in_the_middle_pass_unchanged(model, fed, monkeypatch, error):
    counting = quamba.QuambaLMHeadModel.forward

    @functools.wraps(counting)
    def failing(self, *args, **kwargs):
        if len(fed) == 2:
            raise error
        return counting(self, *args, **kwargs)

    monkeypatch.setattr(quamba.QuambaLMHeadModel, "forward", failing)
    with pytest.raises(type(error)) as raised:
        model.generate(random_ids(50, 7), attention_mask=torch.ones(1, 7), max_new_tokens=8)
    assert raised.value is error and fed == [7, 1]


def test_broken_weights_are_named_instead_of_sampled_from():
    model = tiny(20)
    model.backbone.layers[0].mixer.D.data[3] = float("nan")
    with pytest.raises(QuambaError, match="NaN"):
        model.generate(random_ids(20, 4), max_new_tokens=2)
