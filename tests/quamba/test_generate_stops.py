"""Where generation ends, who is told, and which ways of generating are refused: by name, before anything is written."""

import pytest
import torch
from transformers import MaxTimeCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from quamba.formats import load_tokenizer
from tests.quamba.generating import THREE, free_running, random_ids, three_models, tiny


@pytest.fixture(scope="module")
def models():
    return three_models()


@pytest.fixture(params=THREE)
def model(request, models):
    found = models[request.param]
    found.generation_config = free_running()
    return found


def test_eos_stops_and_min_new_tokens_delays_it(model):
    ids = random_ids(50, 6)
    free = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 6:].tolist()
    eos = free[3]
    stopped = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=eos)[0, 6:].tolist()
    assert stopped == free[: free.index(eos) + 1]
    late = model.generate(ids, max_new_tokens=8, min_new_tokens=6, do_sample=False, eos_token_id=eos)[0, 6:].tolist()
    assert eos not in late[:6]


@pytest.mark.parametrize("beams", [1, 5])
def test_lengths_count_new_tokens(model, beams):
    ids = random_ids(50, 41)
    out = model.generate(ids, max_new_tokens=64, min_new_tokens=64, num_beams=beams, do_sample=False)
    assert out.shape == (1, 41 + 64) and torch.equal(out[:, :41], ids)
    eos = int(out[0, 44])
    out = model.generate(ids, max_new_tokens=16, min_new_tokens=5, num_beams=beams, do_sample=False, eos_token_id=eos)
    assert eos not in out[0, 41:46].tolist()


def test_five_beams_a_prompt_of_41_and_a_large_vocabulary():
    """The shapes of an old error, where the scores of all 41 positions met those of five beams."""
    model, ids = tiny(32000), random_ids(32000, 41)
    outs = [
        model.generate(ids, num_beams=5, max_new_tokens=4, do_sample=False, mode=m) for m in ("recurrent", "parallel")
    ]
    assert outs[0].shape == (1, 45) and torch.equal(*outs)


class Keep(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen += value.flatten().tolist()

    def end(self):
        self.seen.append("end")


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 5}], ids=["greedy", "sampling"])
def test_streamers_see_every_token_once(model, options):
    keep, ids = Keep(), random_ids(50, 4)
    torch.manual_seed(0)
    out = model.generate(ids, max_new_tokens=6, streamer=keep, **options)
    assert keep.seen == [*out[0].tolist(), "end"]
    with pytest.raises(ValueError, match="`streamer` cannot be used with beam search"):
        model.generate(ids, max_new_tokens=6, num_beams=2, streamer=Keep())


def test_stopping_criteria(model):
    ids = random_ids(50, 4, batch=2)
    free = model.generate(ids, max_new_tokens=10, do_sample=False)
    stop = int(free[1, 7])

    def at(tokens, scores):
        return tokens[:, -1] == stop

    out = model.generate(ids, max_new_tokens=10, do_sample=False, stopping_criteria=StoppingCriteriaList([at]))
    steps = max(row.index(stop) if stop in row else 9 for row in free[:, 4:].tolist()) + 1
    assert torch.equal(out, free[:, : 4 + steps])
    short = model.generate(ids, max_new_tokens=50, stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(0.0)]))
    assert short.shape[1] == 5


def test_stop_strings_and_a_text_streamer():
    model, words = tiny(4096), load_tokenizer("mamba1-nano")
    ids = words("The old man", return_tensors="pt")["input_ids"]
    free = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    streamer = TextIteratorStreamer(words, skip_prompt=True)
    stop = words.decode(free[5])
    out = model.generate(
        ids, max_new_tokens=12, do_sample=False, stop_strings=[stop], tokenizer=words, streamer=streamer
    )[0, ids.shape[1] :]
    assert len(out) <= 6 and torch.equal(out, free[: len(out)])
    assert stop in words.decode(out)
    assert "".join(streamer) == words.decode(out)


REFUSED = {
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "assisted generation is not supported with stateful models"),
    "group beams": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "Group Beam Search requires"),
    "forced words": ({"num_beams": 4, "force_words_ids": [[3]]}, "Constrained Beam Search requires"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search requires"),
    "dola": ({"dola_layers": "low"}, "Dola Generation requires"),
}


@pytest.mark.parametrize(("options", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(model, options, why):
    """Assisted decoding would have to crop the state; the others transformers itself has moved out of the library."""
    with pytest.raises((ValueError, NotImplementedError), match=f"(?i){why}"):
        model.generate(random_ids(50, 6), max_new_tokens=4, do_sample=False, **options)


def test_an_assistant_is_refused_on_either_side(model):
    from transformers import LlamaConfig, LlamaForCausalLM

    ids, options = random_ids(50, 6), {"max_new_tokens": 4, "do_sample": False}
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids, assistant_model=model, **options)
    size = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2, eos_token_id=None, bos_token_id=1)).eval()
    with pytest.raises(RuntimeError, match=r"can't be cropped: take state.snapshot\(\)"):
        llama.generate(ids, assistant_model=model, max_new_tokens=12, do_sample=False, pad_token_id=0)


def test_speculation_by_hand(model):
    """What rolling back is for: guessed tokens are read at once, and a state that read wrong ones goes back."""
    ids, new = random_ids(50, 6), 12
    greedy = model.generate(ids, max_new_tokens=new, do_sample=False)
    state, text = model.new_state(), ids
    model(ids[:, :-1], past_key_values=state)
    guesses = [greedy[:, 6:9], random_ids(50, 3), torch.cat([greedy[:, 10:12], random_ids(50, 2)], 1), greedy[:, 13:16]]
    for guess in guesses:
        before = state.snapshot()
        given = torch.cat([text[:, -1:], guess], dim=1)
        best = model(given, past_key_values=state).logits.argmax(-1)
        accepted = int((best[:, :-1] == guess).long().cumprod(1).sum())
        text = torch.cat([text, best[:, : accepted + 1]], dim=1)
        if accepted < guess.shape[1]:
            state.restore(before)
            model(given[:, : accepted + 1], past_key_values=state)
        assert state.get_seq_length() == text.shape[1] - 1
        assert torch.equal(text, greedy[:, : text.shape[1]])
    assert text.shape[1] > ids.shape[1] + len(guesses)
