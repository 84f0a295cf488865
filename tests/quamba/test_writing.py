"""Writing turn after turn: keeping the state changes speed, never the text."""

from __future__ import annotations

import pytest
import torch

from quamba import QuambaLMHeadModel
from quamba.errors import DataError
from quamba.formats import load_tokenizer
from quamba.writing import PREFILL, Chat, Writer, sampling
from tests.quamba.generating import tiny

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
GREEDY = {"max_new_tokens": 9, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return tiny(4096, mixer="mamba2")


@pytest.fixture
def tokenizer():
    words = load_tokenizer("mamba2-nano")
    words.chat_template = TEMPLATE
    return words


@pytest.fixture
def fed(model, monkeypatch):
    """How many tokens each call of the model gets."""
    lengths, forward = [], QuambaLMHeadModel.forward

    def noted(self, input_ids=None, **kwargs):
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(QuambaLMHeadModel, "forward", noted)
    return lengths


def fresh(model, ids):
    """transformers' generate on the whole text, no state handed over."""
    return model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **GREEDY)


def test_a_text_that_goes_on_is_not_read_again(model, tokenizer, fed):
    writer = Writer(model, tokenizer, GREEDY)
    ids = writer.encode("The old man went to the window and")
    for _ in range(3):
        expected = fresh(model, ids)
        fed.clear()
        written = writer.write(ids)
        assert written.text == tokenizer.decode(expected[0], skip_special_tokens=True)
        assert written.reply == written.text[len(tokenizer.decode(ids[0])) :]
        first = fed[0]
        more = writer.encode(" and looked at the sea")
        ids = torch.cat([expected, more], 1)
    # The last written token was never read, and comes with what follows it.
    assert first == 1 + more.shape[1]


def test_another_text_begins_anew(model, tokenizer, fed):
    writer = Writer(model, tokenizer, GREEDY)
    for text in ("The old man", "A young woman", "The old"):
        ids = writer.encode(text)
        expected = tokenizer.decode(fresh(model, ids)[0], skip_special_tokens=True)
        fed.clear()
        assert writer.write(ids).text == expected
        assert fed[0] == ids.shape[1]


def test_long_texts_are_read_in_pieces(model, tokenizer, fed):
    told = []

    class Bar:
        def __enter__(self):
            return lambda done, total, text: told.append((done, total))

        def __exit__(self, *error):
            pass

    writer = Writer(model, tokenizer, {**GREEDY, "max_new_tokens": 2}, Bar)
    ids = torch.randint(1, 4000, (1, 2 * PREFILL + 100), generator=torch.Generator().manual_seed(0))
    writer.write(ids)
    assert fed[:4] == [PREFILL, PREFILL, 99, 1] and told == [(1, 3), (2, 3), (3, 3)]


def test_an_interrupt_forgets_the_state(model, tokenizer, monkeypatch):
    writer = Writer(model, tokenizer, GREEDY)
    ids = writer.encode("The old man went")
    before = writer.write(ids)

    class Stop:
        def put(self, value):
            raise KeyboardInterrupt

        def end(self):
            pass

    longer = torch.cat([ids, writer.encode(" away")], 1)
    with pytest.raises(KeyboardInterrupt):
        writer.write(longer, Stop())
    assert writer.write(longer).text == tokenizer.decode(fresh(model, longer)[0], skip_special_tokens=True)
    assert writer.write(ids) is not before and writer.write(ids).text == before.text


def test_an_interrupt_while_a_prompt_is_read_forgets_the_state(model, tokenizer):
    class Stop:
        def __enter__(self):
            raise KeyboardInterrupt

        def __exit__(self, *error):
            pass

    class StopAfterAPiece(Stop):
        def __enter__(self):
            return lambda done, total, text: 1 / 0

    writer = Writer(model, tokenizer, GREEDY)
    text = torch.randint(1, 4000, (1, PREFILL + 100), generator=torch.Generator().manual_seed(0))
    begin, other = text[:, :20], text[:, 20:30]
    for bar, error in ((Stop, KeyboardInterrupt), (StopAfterAPiece, ZeroDivisionError)):
        written = fresh(model, begin)
        writer.write(begin)
        writer.bar = bar
        with pytest.raises(error):
            writer.write(torch.cat([written, text], 1))
        ids = torch.cat([written, other], 1)
        assert writer.write(ids).text == tokenizer.decode(fresh(model, ids)[0], skip_special_tokens=True)


def test_a_chat_hands_the_template_every_turn(model, tokenizer, fed):
    chat = Chat(Writer(model, tokenizer, GREEDY), system="Be brief.")
    text = "<system> Be brief.\n"
    for said in ("Who are you?", "And why?"):
        text += f"<user> {said}\n<assistant> "
        ids = chat.writer.encode(text)
        expected = fresh(model, ids)[0, ids.shape[1] :]
        answer = chat.ask(said)
        assert answer.reply == tokenizer.decode(expected, skip_special_tokens=True)
        text += answer.reply + "\n"
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_a_turn_that_fails_never_was(model, tokenizer, monkeypatch):
    chat = Chat(Writer(model, tokenizer, GREEDY))
    monkeypatch.setattr(QuambaLMHeadModel, "generate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        chat.ask("Who are you?")
    assert chat.messages == []
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(DataError, match="no system messages"):
        chat.ask("Who are you?")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        Chat(chat.writer)


def test_every_end_of_text_ends_a_text(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", [7, 5])
    assert Writer(model, tokenizer, {}).options["eos_token_id"] == sorted({5, 7, tokenizer.eos_token_id})
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    assert Writer(model, tokenizer, {}).options["eos_token_id"] == [tokenizer.eos_token_id]


def test_sampling_adds_no_limits_of_its_own():
    assert sampling(None, None, None) == {"do_sample": False}
    assert sampling(0.5, None, None) == {"top_k": 0, "top_p": 1.0, "temperature": 0.5, "do_sample": True}
    assert sampling(None, 0.9, 5) == {"top_k": 5, "top_p": 0.9, "do_sample": True}
