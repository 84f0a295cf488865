"""transformers' own generate on our models: cached equals uncached, for greedy, beams and sampling."""

import itertools

import pytest
import torch
from transformers import GenerationConfig

import quamba
from quamba import QuambaLMHeadModel
from quamba.config import QuambaConfig
from quamba.errors import QuambaError

SHAPES = {
    "mamba1": {"intermediate_size": 48, "state_size": 8, "conv_kernel": 4, "time_step_rank": 3},
    "mamba2": {"num_heads": 6, "head_dim": 8, "state_size": 8, "n_groups": 2, "norm_groups": 2, "chunk_size": 4},
}


def tiny(vocab, seed=0, mixer="mamba1"):
    torch.manual_seed(seed)
    block = {"mixer": mixer, "args": SHAPES[mixer], "mlp": None}
    config = QuambaConfig(vocab_size=vocab, hidden_size=24, blocks=[block] * 2)
    model = QuambaLMHeadModel(config).eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(40)
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model


def random_ids(vocab, length, batch=1, seed=3):
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models():
    model = tiny(50)
    w8a8 = quamba.quantize(model, "w8a8", calibration=random_ids(50, 32, 16))
    return {"mamba1": model, "mamba1 w8a8": w8a8, "mamba2": tiny(50, seed=7, mixer="mamba2")}


@pytest.fixture(params=["mamba1", "mamba1 w8a8", "mamba2"])
def model(request, models):
    found = models[request.param]
    found.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return found


def run(model, ids, **options):
    torch.manual_seed(11)
    out = model.generate(ids, output_scores=True, return_dict_in_generate=True, **options)
    return out.sequences, torch.stack(out.scores)


def same(a, b):
    """The same tokens, and scores as near as the hand-off promises."""
    assert torch.equal(a[0], b[0])
    finite = torch.isfinite(b[1])
    assert torch.equal(torch.isfinite(a[1]), finite)
    torch.testing.assert_close(a[1][finite], b[1][finite], rtol=0, atol=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 4},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=["greedy", "beams", "beams returned", "sampling", "beam sampling"],
)
def test_cached_equals_uncached(model, options):
    ids = random_ids(50, 7)
    cached = run(model, ids, max_new_tokens=12, **options)
    assert cached[0].shape[1] == 19
    same(cached, run(model, ids, max_new_tokens=12, use_cache=False, **options))


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_float_scores_are_equal_to_1e5(models, name):
    model, ids = models[name], random_ids(50, 7)
    a, b = (run(model, ids, max_new_tokens=12, do_sample=False, use_cache=cache)[1] for cache in (True, False))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


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


def test_beams_find_the_global_best_when_they_are_all_kept():
    """V = 5, 4 steps, 5^3 beams: nothing is pruned before the last step, so the result is the most likely sequence."""
    model, steps = tiny(5, seed=4), 4
    ids = random_ids(5, 3)
    best = max(
        itertools.product(range(5), repeat=steps),
        key=lambda tail: score(model, ids, torch.tensor([tail])),
    )
    out = model.generate(ids, num_beams=125, max_new_tokens=steps, do_sample=False, length_penalty=0.0)
    assert out[0, 3:].tolist() == list(best)


def score(model, ids, tail):
    logits = model(torch.cat([ids, tail], 1)).logits.log_softmax(-1)
    return float(logits[0, ids.shape[1] - 1 : -1].gather(1, tail[0][:, None]).sum())


def test_left_padded_batch_generates_as_each_row_alone(model):
    rows = [random_ids(50, n, seed=n) for n in (3, 8, 5)]
    batch, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for i, row in enumerate(rows):
        batch[i, 8 - row.shape[1] :], mask[i, 8 - row.shape[1] :] = row[0], 1
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        out = model.generate(batch, attention_mask=mask, max_new_tokens=9, **options)
        for i, row in enumerate(rows):
            alone = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=9, **options)
            assert out[i, 8:].tolist() == alone[0, row.shape[1] :].tolist()


def test_right_padding_is_refused(model):
    ids = random_ids(50, 5)
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(ids, attention_mask=torch.tensor([[1, 1, 1, 0, 0]]), max_new_tokens=2)


def test_eos_stops_and_min_new_tokens_delays_it(model):
    ids = random_ids(50, 6)
    free = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 6:].tolist()
    eos = free[3]
    stopped = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=eos)[0, 6:].tolist()
    assert stopped == free[: free.index(eos) + 1]
    late = model.generate(ids, max_new_tokens=8, min_new_tokens=6, do_sample=False, eos_token_id=eos)[0, 6:].tolist()
    assert eos not in late[:6]


def test_a_prompt_may_arrive_in_chunks(model):
    ids = random_ids(50, 23)
    whole = model.generate(ids, max_new_tokens=8, do_sample=False)
    state = model.new_state()
    for piece in ids[:, :-1].split(6, dim=1):
        model(piece, past_key_values=state)
    assert torch.equal(model.generate(ids, past_key_values=state, max_new_tokens=8, do_sample=False), whole)


def test_assisted_decoding_is_refused(model):
    with pytest.raises((ValueError, NotImplementedError), match=r"(?i)stateful|assist"):
        model.generate(random_ids(50, 6), max_new_tokens=4, prompt_lookup_num_tokens=2)


def test_streamer_and_stopping_criteria(model):
    from transformers import MaxTimeCriteria, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    class Keep(BaseStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append("end")

    keep, ids = Keep(), random_ids(50, 4)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, streamer=keep)
    assert keep.seen == [*out[0].tolist(), "end"]
    short = model.generate(ids, max_new_tokens=50, stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(0.0)]))
    assert short.shape[1] == 5


def test_broken_weights_are_named_instead_of_sampled_from():
    model = tiny(20)
    model.backbone.layers[0].mixer.D.data[3] = float("nan")
    with pytest.raises(QuambaError, match="NaN"):
        model.generate(random_ids(20, 4), max_new_tokens=2)
