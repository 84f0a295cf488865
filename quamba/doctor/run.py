"""A short run: what a model must do with any weights, checked on random tokens."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor

from quamba.doctor.diagnosis import Check, Diagnosis

TOKENS = 24
TOLERANCE = 0.02
"""Largest root-mean-square difference, in spreads (standard deviations) of the logits, between two ways to compute the
same thing. Rounding to int8 makes of a last bit's difference up to some thousandths; a real fault makes tenths."""


@torch.no_grad()
def try_out(model: Any, found: Diagnosis) -> None:
    """Add a check for the hand-off of the state, for the prompt's influence, padding, beams, saving and loading."""
    found.checks += [check(model) for check in (hand_off, prompt_counts, left_padding, two_beams, save_and_load)]


def _ids(model: Any, rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (rows, TOKENS), generator=generator)


def _difference(a: Tensor, b: Tensor) -> float:
    """In spreads of `a`; infinite where either isn't finite."""
    a, b = a.double(), b.double()
    spread = a.std().clamp_min(1e-9)
    difference = float((a - b).square().mean().sqrt() / spread)
    return difference if difference == difference else float("inf")


def _agree(name: str, difference: float, what: str) -> Check:
    return Check(name, difference <= TOLERANCE, f"{what} differ by {difference:.2g} of the logits' spread")


def hand_off(model: Any) -> Check:
    ids, state = _ids(model), model.new_state()
    whole = model(ids).logits
    cut = TOKENS // 2
    pieces = [model(ids[:, :cut], past_key_values=state).logits]
    pieces += [model(ids[:, t : t + 1], past_key_values=state).logits for t in range(cut, TOKENS)]
    return _agree(
        "state hand-off", _difference(whole, torch.cat(pieces, 1)), "one pass, and half of it then token by token,"
    )


def prompt_counts(model: Any) -> Check:
    ids = _ids(model)
    other = ids.clone()
    other[:, 0] = (ids[:, 0] + 1) % model.config.vocab_size
    moved = _difference(model(ids).logits[:, -4:], model(other).logits[:, -4:])
    if model.config.vocab_size == 1:
        return Check("prompt sensitivity", True, "there is only one token")
    return Check(
        "prompt sensitivity", 0 < moved < float("inf"), f"another first token moves the last logits by {moved:.2g}"
    )


def left_padding(model: Any) -> Check:
    ids, pad = _ids(model), 5
    alone = model(ids).logits
    padded = torch.cat([torch.zeros(1, pad, dtype=ids.dtype), ids], 1)
    mask = torch.cat([torch.zeros(1, pad, dtype=torch.int64), torch.ones_like(ids)], 1)
    return _agree(
        "left padding", _difference(alone, model(padded, attention_mask=mask).logits[:, pad:]), "padded and alone"
    )


def two_beams(model: Any) -> Check:
    """The score that the beam search reports, against the same text scored anew."""
    ids, new = _ids(model)[:, :8], 6
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=2,
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        length_penalty=0.0,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    text = out.sequences
    log = model(text).logits[:, ids.shape[1] - 1 : -1].float().log_softmax(-1)
    score = float(log.gather(-1, text[:, ids.shape[1] :, None]).sum())
    gap = abs(score - float(out.sequences_scores[0])) / new
    return Check("two beams", gap <= 0.05, f"reported and recomputed score differ by {gap:.2g} a token")


def save_and_load(model: Any) -> Check:
    ids = _ids(model)
    before = model(ids).logits
    with tempfile.TemporaryDirectory(prefix="quamba-doctor-") as folder:
        model.save_pretrained(folder)
        after = type(model).from_pretrained(folder)(ids).logits
    same = torch.equal(before, after)
    return Check("save and load", same, "the logits are the same" if same else "the logits change")
