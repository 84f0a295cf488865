"""A short run: what a model must do with any weights, checked on random tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quamba.doctor.diagnosis import Check, Diagnosis, Finding
from quamba.model import QuambaLMHeadModel

Outcome = tuple[bool, str]  # whether it went well, and a clause
TOKENS = 24
TOLERANCE = 0.02
"""Largest root-mean-square difference, in spreads (standard deviations) of the logits, between two ways to compute the
same thing. Rounding to int8 makes of a last bit's difference up to some thousandths; a real fault makes tenths."""
INT8_STATE_TOLERANCE = 0.2
"""The same for a model whose state is kept in int8: it is rounded after every call, so that the cuts count by design."""


@torch.no_grad()
def try_out(model: Any, found: Diagnosis) -> None:
    """Add a check for the hand-off of the state, for the prompt's influence, padding, beams, saving and loading."""
    for name, check in CHECKS.items():
        try:
            passed, detail = check(model)
        except OSError as error:  # of the disk, which says nothing about the model
            found.notes.append(Finding(f"{name} wasn't tried: {error}"))
            continue
        except Exception as error:  # whatever this model's numbers and settings make torch stumble over
            passed, detail = False, f"it ends with {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        found.checks.append(Check(name, passed, detail))


def _ids(model: Any, rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (rows, TOKENS), generator=generator)


def difference(a: Tensor, b: Tensor) -> float:
    """In spreads of `a`; infinite where either isn't finite."""
    a, b = a.double(), b.double()
    spread = a.std().clamp_min(1e-9)
    gap = float((a - b).square().mean().sqrt() / spread)
    return gap if gap == gap else float("inf")


def tolerance(model: Any) -> tuple[float, str]:
    """What is allowed where a state is handed on, and what to say of it."""
    blocks: Any = model.backbone.layers if isinstance(model, QuambaLMHeadModel) else []
    if all(block.scales.specs["state"].is_float for block in blocks):
        return TOLERANCE, ""
    return INT8_STATE_TOLERANCE, " (its int8 state is rounded after every call)"


def _agree(gap: float, what: str, most: float = TOLERANCE, note: str = "") -> Outcome:
    return gap <= most, f"{what} differ by {gap:.2g} of the logits' spread{note}"


def hand_off(model: Any) -> Outcome:
    ids, state = _ids(model), model.new_state()
    whole = model(ids).logits
    cut = TOKENS // 2
    pieces = [model(ids[:, :cut], past_key_values=state).logits]
    pieces += [model(ids[:, t : t + 1], past_key_values=state).logits for t in range(cut, TOKENS)]
    ways = "one pass, and half of it then token by token,"
    return _agree(difference(whole, torch.cat(pieces, 1)), ways, *tolerance(model))


def prompt_counts(model: Any) -> Outcome:
    if model.config.vocab_size == 1:
        return True, "there is only one token"
    ids = _ids(model)
    other = ids.clone()
    other[:, 0] = (ids[:, 0] + 1) % model.config.vocab_size
    moved = difference(model(ids).logits[:, -4:], model(other).logits[:, -4:])
    return 0 < moved < float("inf"), f"another first token moves the last logits by {moved:.2g}"


def left_padding(model: Any) -> Outcome:
    ids, pad = _ids(model), 5
    alone = model(ids).logits
    padded = torch.cat([torch.zeros(1, pad, dtype=ids.dtype), ids], 1)
    mask = torch.cat([torch.zeros(1, pad, dtype=torch.int64), torch.ones_like(ids)], 1)
    return _agree(difference(alone, model(padded, attention_mask=mask).logits[:, pad:]), "padded and alone")


def _flat(logits: Tensor) -> Tensor:
    """Log-probabilities of one spread: near each other, so that beams overtake each other often."""
    return (logits / logits.std(-1, keepdim=True).clamp_min(1e-9)).log_softmax(-1)


def beam_gap(model: Any, ids: Tensor, beams: int, new: int) -> tuple[Tensor, float]:
    """All beams' texts, `[rows * beams, L + new]`, and how far the scores that the search reports are from those of the same
    texts scored anew, in spreads of the logits."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()  # its penalties would be in the scores
    try:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=beams,
            num_return_sequences=beams,
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            length_penalty=0.0,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=[lambda _, scores: _flat(scores)],
            return_dict_in_generate=True,
            output_scores=True,
        )
    finally:
        model.generation_config = own
    log = _flat(model(out.sequences).logits[:, ids.shape[1] - 1 : -1].float())
    anew = log.gather(-1, out.sequences[:, ids.shape[1] :, None])[..., 0]
    told = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    return out.sequences, float((anew - told).square().mean().sqrt())


def two_beams(model: Any) -> Outcome:
    if model.config.vocab_size == 1:
        return True, "there is only one token"
    _, gap = beam_gap(model, _ids(model, 2)[:, :8], beams=2, new=8)
    most, note = tolerance(model)
    return gap <= most, f"reported and recomputed scores differ by {gap:.2g} of their spread{note}"


def save_and_load(model: Any) -> Outcome:
    ids = _ids(model)
    before = model(ids).logits
    with tempfile.TemporaryDirectory(prefix="quamba-doctor-") as folder:
        model.save_pretrained(folder)
        after = type(model).from_pretrained(folder)(ids).logits
    same = torch.equal(before, after)
    return same, "the logits are the same" if same else "the logits change"


CHECKS: dict[str, Callable[[Any], Outcome]] = {
    "state hand-off": hand_off,
    "prompt sensitivity": prompt_counts,
    "left padding": left_padding,
    "two beams": two_beams,
    "save and load": save_and_load,
}
