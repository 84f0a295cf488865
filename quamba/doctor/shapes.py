"""What every route to the next token returns: its shape beside the one it should have, and whether the values agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quamba.doctor.run import beam_gap, difference, tolerance
from quamba.errors import DataError
from quamba.formats import load_any, load_tokenizer, locate
from quamba.generation import last_logits, new_state, raw_logits

PROMPT = "The old man went to the window and"
TOKENS = 12  # random ones, where there is no tokenizer


@dataclass(frozen=True)
class Route:
    """One way to the next token. `got`: the shape that came back."""

    name: str
    expected: str
    got: str
    passed: bool
    diagnosis: str


@dataclass(frozen=True)
class Shapes:
    """`facts`: what was opened, how, and what it was given."""

    model: str
    facts: dict[str, Any]
    routes: list[Route]

    @property
    def failed(self) -> list[str]:
        return [route.name for route in self.routes if not route.passed]

    @property
    def exit_code(self) -> int:
        return int(bool(self.failed))

    def to_dict(self) -> dict[str, Any]:
        routes = [asdict(route) for route in self.routes]
        return {"model": self.model, "passed": not self.failed, **self.facts, "routes": routes}


def check_shapes(
    model: str,
    *,
    prompt: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    transformers: bool = False,
    beams: int = 5,
    new: int = 8,
) -> Shapes:
    """Open MODEL (see `formats.load_any`) and try every route on a prompt. Raises QuambaError if it can't be opened, DataError
    for a prompt that can't be used; what goes wrong on a route is that route's diagnosis."""
    location = locate(model)
    words = load_tokenizer(model, tokenizer, required=prompt is not None or tokenizer is not None)
    network = load_any(model, dtype=dtype, device=device, transformers=transformers)
    vocab = network.config.vocab_size
    if words is None:
        text, ids = None, torch.randint(0, vocab, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    else:
        text = PROMPT if prompt is None else prompt
        ids = words(text, return_tensors="pt")["input_ids"].long()
        if ids.shape[1] == 0:
            raise DataError("the prompt is empty: give --prompt some text")
        if int(ids.max()) >= vocab:
            raise DataError(
                "the tokenizer is larger than the model's vocabulary: it belongs to another model (--tokenizer)"
            )
    facts = {
        "folder": str(location.path),
        "class": f"{type(network).__module__.partition('.')[0]}.{type(network).__name__}",
        "tokenizer": "none: the tokens are random" if words is None else tokenizer or "the model's own",
        "device": str(network.device),
        "dtype": str(getattr(network.config, "dtype", None) or network.dtype).removeprefix("torch."),
        "prompt": text,
        "ids": list(ids.shape),
        "beams": beams,
        "new_tokens": new,
    }
    return Shapes(location.name, facts, try_routes(network, ids.to(network.device), beams, new))


@torch.no_grad()
def try_routes(model: Any, ids: Tensor, beams: int = 5, new: int = 8) -> list[Route]:
    """Every route on ids `[1, L]`, one result each; an error ends its own route only."""
    probed, routes = _Probed(model, ids, beams, new), []
    for name, (expected, route) in ROUTES.items():
        try:
            got, passed, diagnosis = route(probed)
        except Exception as error:  # of the model, whatever it is: that is what is looked for
            first = (str(error).splitlines() or [""])[0]
            got, passed, diagnosis = "an error", False, f"{type(error).__name__}: {first}"
        routes.append(Route(name, probed.fill(expected), got, passed, diagnosis))
    return routes


class _Probed:
    """A model, what it is given, and what the routes before have found."""

    def __init__(self, model: Any, ids: Tensor, beams: int, new: int):
        self.model, self.ids, self.beams, self.new = model, ids, beams, new
        self.length = ids.shape[1]
        self.most, self.note = tolerance(model)
        self.last: Tensor | None = None  # [1, V], from the logits of all positions
        self.text: Tensor | None = None  # [1, L + new], written in parallel
        self.steps: Tensor | None = None  # [new, V], its logits

    def fill(self, shape: str) -> str:
        vocab = getattr(getattr(self.model, "config", None), "vocab_size", "V")
        vocab = vocab if self.last is None else self.last.shape[-1]
        return shape.format(L=self.length, V=vocab, new=self.new, beams=self.beams, end=self.length + self.new)

    def differ(self, a: Tensor | None, b: Tensor, what: str) -> tuple[bool, str]:
        if a is None:
            return True, "nothing to compare it with"
        gap = difference(a, b)
        return gap <= self.most, f"{what} differ by {gap:.2g} of the logits' spread{self.note}"


Found = tuple[str, bool, str]  # shape, whether it is as it should be, a clause


def full(p: _Probed) -> Found:
    logits, _ = raw_logits(p.model, p.ids, keep=False)
    shape = list(logits.shape)
    if shape[:-1] not in ([1, p.length], [1, 1], [1]):
        return str(shape), False, "these are not the logits of the ids that were given"
    p.last = logits if logits.ndim == 2 else logits[:, -1]
    if not bool(torch.isfinite(p.last).all()):
        return str(shape), False, "NaN or infinite values: weights or scales are damaged"
    every = shape[:-1] == [1, p.length]
    return str(shape), True, "logits of every position" if every else "only the last position's, asked for or not"


def shortened(p: _Probed) -> Found:
    logits, tried = raw_logits(p.model, p.ids)
    shape = list(logits.shape)
    same, clause = p.differ(
        p.last, logits if logits.ndim == 2 else logits[:, -1], "it and the full logits' last position"
    )
    if not same:
        return str(shape), False, f"{tried}: {clause}"
    if shape[:-1] == [1, p.length] and p.length > 1:
        return str(shape), True, f"{tried}: all logits are computed, and last_logits cuts them"
    return str(shape), True, f"{tried}: {clause}"


def last(p: _Probed) -> Found:
    logits = last_logits(p.model, p.ids)
    return str(list(logits.shape)), *p.differ(p.last, logits, "it and the full logits' last position")


def parallel(p: _Probed) -> Found:
    """Greedy, the whole text at every step. The logits of the finished text say whether a position sees what follows it."""
    text, steps = p.ids, []
    for _ in range(p.new):
        steps.append(last_logits(p.model, text))
        text = torch.cat([text, steps[-1].argmax(-1, keepdim=True)], dim=1)
    p.text, p.steps = text, torch.cat(steps)
    shape = f"{p.new} x {list(steps[-1].shape)}"
    whole, _ = raw_logits(p.model, text[:, :-1], keep=False)
    if whole.ndim != 3 or whole.shape[1] != text.shape[1] - 1:
        return shape, True, "the whole text at every step"
    same, clause = p.differ(p.steps, whole[0, p.length - 1 :], "step by step and the finished text at once")
    return shape, same, clause if same else f"{clause}: positions see what follows them"


def recurrent(p: _Probed) -> Found:
    """The same text, one token at a time behind the prompt."""
    state = new_state(p.model, 1, p.length + p.new)
    if state is None:
        return "no state", True, "it takes no state that quamba can make: every step costs the whole text"
    if p.text is None or p.steps is None:
        return "not tried", False, "there is no parallel text to compare with"
    pieces = [p.ids, *p.text[:, p.length : -1].split(1, dim=1)]
    steps = torch.cat([last_logits(p.model, piece, state) for piece in pieces])
    shape = f"{p.new} x {[1, steps.shape[-1]]}"
    if not p.differ(p.steps[:1], steps[:1], "")[0]:
        return shape, False, "already the prompt gives other logits with a state than without one"
    same, clause = p.differ(p.steps, steps, "recurrent and parallel logits")
    return shape, same, clause if same else f"{clause}: the state is forgotten, or a token enters it twice"


def beam_search(p: _Probed) -> Found:
    from transformers import GenerationMixin

    if p.last is not None and p.last.shape[-1] == 1:
        return "not tried", True, "there is only one token"
    if not isinstance(p.model, GenerationMixin):
        return "not tried", True, "it has no generate of transformers'"
    sequences, gap = beam_gap(p.model, p.ids, p.beams, p.new)
    shape = str(list(sequences.shape))
    clause = f"reported and recomputed scores differ by {gap:.2g} of their spread{p.note}"
    if list(sequences.shape) != [p.beams, p.length + p.new]:
        return shape, False, "generate returned other lengths than it was asked for"
    return shape, gap <= p.most, clause if gap <= p.most else f"{clause}: states don't follow their beams"


ROUTES: dict[str, tuple[str, Callable[[_Probed], Found]]] = {
    "full": ("[1, {L}, {V}]", full),
    "last position": ("[1, 1, {V}]", shortened),
    "last_logits": ("[1, {V}]", last),
    "parallel": ("{new} x [1, {V}]", parallel),
    "recurrent": ("{new} x [1, {V}]", recurrent),
    "beams": ("[{beams}, {end}]", beam_search),
}
