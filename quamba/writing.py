"""Writing with a model, text after text: prompts in pieces, the state kept from turn to turn, chat templates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from quamba.errors import DataError

PREFILL = 512
"""Longer prompts are read in pieces of this many tokens."""

Bar = Callable[[], AbstractContextManager[Callable[[int, int, str], None]]]


@contextmanager
def _no_bar() -> Iterator[Callable[[int, int, str], None]]:
    yield lambda done, total, text: None


@dataclass(frozen=True)
class Written:
    """text: prompt and continuation; reply: the continuation alone."""

    text: str
    reply: str
    new_tokens: int
    seconds: float

    def to_dict(self, prompt: str) -> dict[str, Any]:
        speed = self.new_tokens / self.seconds
        facts = {"new_tokens": self.new_tokens, "seconds": self.seconds, "tokens_per_s": speed}
        return {"prompt": prompt, "text": self.text, "reply": self.reply, **facts}


def sampling(temperature: float | None, top_p: float | None, top_k: int | None) -> dict[str, Any]:
    """`generate`'s options: greedy if nothing is asked for, and no limits that nobody asked for."""
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    asked: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if asked:  # transformers would also keep to the 50 most likely tokens
        asked = {"top_k": 0, "top_p": 1.0} | asked
    return asked | {"do_sample": bool(asked)}


class Writer:
    """A model and its tokenizer. `options`: transformers' `generate`'s, for every text. `bar`: makes what is told of the
    progress of reading a long prompt."""

    def __init__(self, model: Any, tokenizer: Any, options: Mapping[str, Any], bar: Bar | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.bar = bar or _no_bar
        own = model.generation_config.eos_token_id
        stops = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        self.options: dict[str, Any] = {
            "eos_token_id": sorted(stops) or None,
            "pad_token_id": tokenizer.pad_token_id,
            **options,
        }
        self._state: Any = None
        self._read: Tensor | None = None  # what the state has read, [L]

    def encode(self, text: str) -> Tensor:
        """Ids `[1, L]`. Raises DataError for an empty text."""
        return self.checked(self.tokenizer(text, return_tensors="pt")["input_ids"])

    def checked(self, ids: Tensor) -> Tensor:
        """The ids on the model's device. Raises DataError for none, or ids that the model doesn't have."""
        if ids.numel() == 0:
            raise DataError("the prompt is empty: give --prompt some text")
        if int(ids.max()) >= self.model.config.vocab_size:
            raise DataError(
                "the tokenizer is larger than the model's vocabulary: it belongs to another model (--tokenizer)"
            )
        return ids.to(self.model.device)

    def write(self, ids: Tensor, streamer: Any = None) -> Written:
        """Continue ids `[1, L]`. If they begin with all that was read and written before, only the rest is read.

        streamer: a transformers streamer; none with beams, which are known at the end. An interrupt forgets the state.
        """
        options = dict(self.options)
        old, self._state = self._state, None
        state = self._prepared(ids, old) if options.get("num_beams", 1) == 1 else None
        if state is not None:
            options |= {"streamer": streamer, "past_key_values": state}
        started = time.monotonic()
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        seconds = time.monotonic() - started
        self._state, self._read = state, out[0, :-1]
        text, reply = (
            self.tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for part in (out[0], out[0, ids.shape[1] :])
        )
        return Written(text, reply, out.shape[1] - ids.shape[1], seconds)

    def _prepared(self, ids: Tensor, state: Any) -> Any:
        """A state that has read so much of ids that a piece or less is left: this one if it can be, else a new one."""
        read = None if state is None else self._read
        known = 0 if read is None else len(read)
        if read is None or not 0 < known < ids.shape[1] or not torch.equal(ids[0, :known], read):
            known, state = 0, self.model.new_state()
        if ids.shape[1] - known <= PREFILL:
            return state
        pieces = ids[:, known:-1].split(PREFILL, dim=1)
        with self.bar() as progress:
            for i, piece in enumerate(pieces, 1):
                self.model(piece, past_key_values=state, logits_to_keep=1)
                done = min(known + i * PREFILL, ids.shape[1])
                progress(i, len(pieces), f"reading the prompt: {done}/{ids.shape[1]} tokens")
        return state


class Chat:
    """A conversation in the form of the tokenizer's chat template. Raises DataError if it has none, or refuses a turn."""

    def __init__(self, writer: Writer, system: str | None = None):
        if not writer.tokenizer.chat_template:
            raise DataError("this tokenizer has no chat template")
        self.writer = writer
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str, streamer: Any = None) -> Written:
        """One turn: the user's words, answered. A turn that fails or is interrupted never was."""
        turn = [*self.messages, {"role": "user", "content": text}]
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        try:
            found = self.writer.tokenizer.apply_chat_template(turn, **options)
        except TemplateError as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from error
        written = self.writer.write(self.writer.checked(found["input_ids"]), streamer)
        self.messages = [*turn, {"role": "assistant", "content": written.reply}]
        return written
