"""One step of generation with any causal language model: the logits of the next token, a state, a padded batch.

What a model's forward takes is read off its signature and what it returned off its shape. No call is tried to see whether it
fails, so the network runs once and its errors reach the caller.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quamba.errors import QuambaError

KEEP = ("num_last_tokens", "logits_to_keep", "num_logits_to_keep")
"""What a forward calls "logits of only the last so many positions": mamba-ssm, transformers, code written for older ones."""
CACHES = ("past_key_values", "cache_params")
"""What transformers' models call the state that they advance in place."""
INFERENCE = "inference_params"  # mamba-ssm's name for it; there the caller advances the position
RESTARTING = ("mamba", "falcon_mamba", "jamba", "zamba")
"""Model types of transformers whose scan has no initial state: given several tokens it starts from zero."""
OWN_STATE = ("recurrent_gemma", "rwkv", "xlstm")
"""Model types of transformers that a `DynamicCache` can't hold the state of."""


@torch.no_grad()
def last_logits(model: Any, ids: Tensor, state: Any = None, mask: Tensor | None = None) -> Tensor:
    """Logits `[N, V]` of the token that follows each row of `ids`, from any causal language model, in one run of it.

    model: quamba's, transformers', mamba-ssm's, or any callable that takes ids and returns logits `[N, L, V]`, `[N, 1, V]` or
    `[N, V]`: as they are, as an attribute or entry `logits`, or first in a tuple.
    ids: int64 `[N, L]`. With a state the tokens it hasn't read, without one the whole text.
    state: see `new_state`; advanced in place by L tokens.
    mask: `[N, L]`, or with a state `[N, read + L]`: zeros for padding, which is legal on the left only. `left_pad` makes one.

    Raises ValueError for ids or a mask that can't be, QuambaError if the model can't do what is asked (no state, no mask, a
    scan that would start anew) or returned something of another shape. The model's own errors pass unchanged.
    """
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"ids have shape {list(ids.shape)}; need [rows, tokens], one token or more")
    if mask is not None:
        _check_mask(mask, ids, state is not None)
    logits, tried = raw_logits(model, ids, state, mask)
    rows, length = ids.shape
    shape, vocab = list(logits.shape), getattr(getattr(model, "config", None), "vocab_size", None)
    least = vocab if isinstance(vocab, int) else 0
    if shape[:-1] not in ([rows], [rows, 1], [rows, length]) or shape[-1] < least:
        v = f"V >= {least}" if least else "V"
        raise QuambaError(
            f"{type(model).__name__} returned logits of shape {shape} for ids of shape {[rows, length]} and {tried}; "
            f"need [{rows}, V], [{rows}, 1, V] or [{rows}, {length}, V], {v}"
        )
    if logits.ndim == 2:
        return logits
    last = logits[:, -1]
    return last if logits.shape[1] == 1 else last.clone()  # a view would hold on to the logits of all positions


def raw_logits(
    model: Any, ids: Tensor, state: Any = None, mask: Tensor | None = None, keep: bool = True
) -> tuple[Tensor, str]:
    """The logits as the model returns them, and what was asked of it: `logits_to_keep=1`, or that its forward has no such
    argument. keep: ask for the last position only. Otherwise as `last_logits`, without a look at the shape."""
    takes = _parameters(model)
    name = next((name for name in KEEP if name in takes), None) if keep else None
    arguments: dict[str, Any] = {} if name is None else {name: 1}
    tried = f"{name}=1" if name else "no argument for the last position" if keep else "all positions asked for"
    if "use_cache" in takes:
        arguments["use_cache"] = state is not None
    holder = None if state is None else _holder(model, takes, state, ids.shape[1])
    if holder is not None:
        arguments[holder] = state
    arguments |= _placement(model, takes, ids, holder, state, mask)
    out = model(input_ids=ids, **arguments) if "input_ids" in takes else model(ids, **arguments)
    if holder == INFERENCE:
        state.seqlen_offset += ids.shape[1]
    elif holder is not None and (returned := getattr(out, holder, None)) is not None and returned is not state:
        raise QuambaError(f"{type(model).__name__} returned another {holder} instead of advancing the one it was given")
    return _logits(model, out), tried


def _parameters(model: Any) -> set[str]:
    """The names that its forward has. What only `**kwargs` would take is not among them: it may be ignored there."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(getattr(model, "forward", model)).parameters.values()
    return {parameter.name for parameter in found if parameter.kind in named}


def _model_type(model: Any) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or ""


def _holder(model: Any, takes: set[str], state: Any, length: int) -> str:
    """The argument that takes `state`. Raises QuambaError if there is none, or if the state wouldn't be used."""
    kind = type(model).__name__
    names = (INFERENCE,) if hasattr(state, "seqlen_offset") else CACHES
    name = next((name for name in names if name in takes), None)
    if name is None:
        raise QuambaError(
            f"{kind}'s forward has no {' or '.join(names)} for a state ({type(state).__name__}): without one, give the whole "
            "text at every step"
        )
    if _model_type(model) == "recurrent_gemma":
        raise QuambaError(
            f"{kind} keeps its state in itself and can't be handed one: give the whole text at every step"
        )
    if length > 1 and _model_type(model) in RESTARTING and state.layers and state.has_previous_state():
        raise QuambaError(
            f"{kind} starts its scan from zero when several tokens continue a state: give them one at a time, or load the "
            "model with quamba"
        )
    return name


def _placement(
    model: Any, takes: set[str], ids: Tensor, holder: str | None, state: Any, mask: Tensor | None
) -> dict[str, Any]:
    """Mask and positions, where something hangs on them. A model that isn't told positions may count from zero."""
    rows, length = ids.shape
    padded = mask is not None and not bool(mask.all())
    found: dict[str, Any] = {}
    if padded:
        assert mask is not None
        if "attention_mask" not in takes:
            raise QuambaError(
                f"{type(model).__name__}'s forward has no attention_mask, so it would read the padding as text: give it "
                "rows of one length"
            )
        # transformers' Mamba multiplies its inputs by the mask; the others look back over all of it.
        wanted = mask[:, -length:] if holder == "cache_params" else mask
        if not bool(wanted.all()):
            found["attention_mask"] = wanted.long()
    if "position_ids" in takes and (padded or holder == "past_key_values"):
        read = 0 if state is None else state.get_seq_length()
        if mask is None:
            positions = torch.arange(read, read + length, device=ids.device).expand(rows, -1)
        elif mask.shape[1] != read + length:
            raise ValueError(
                f"the attention mask has {mask.shape[1]} columns; the state has read {read} and {length} more are given"
            )
        else:
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -length:]
        found["position_ids"] = positions
    return found


def _logits(model: Any, out: Any) -> Tensor:
    logits = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", out)
    if isinstance(logits, tuple | list) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor):
        raise QuambaError(
            f"{type(model).__name__} returned a {type(out).__name__} without logits: is it a causal language model?"
        )
    return logits


@dataclass
class InferenceParams:
    """The state of a model of mamba-ssm's, field by field as its own class has it."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None


def new_state(model: Any, rows: int = 1, length: int = 2048) -> Any:
    """An empty state for `last_logits`; None if the model takes none, or one that is made in no known way.

    rows, length: what it has to hold; only attention layers of mamba-ssm want to know.
    """
    if hasattr(model, "new_state"):
        return model.new_state()
    takes, config = _parameters(model), getattr(model, "config", None)
    if INFERENCE in takes:
        return InferenceParams(max_seqlen=length, max_batch_size=rows)
    from transformers import DynamicCache, PreTrainedConfig

    known = isinstance(config, PreTrainedConfig) and _model_type(model) not in OWN_STATE
    return DynamicCache(config=config) if known and takes & set(CACHES) else None


def left_pad(rows: Sequence[Sequence[int] | Tensor], pad: int = 0, device: Any = None) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one batch: ids and mask, both int64 `[N, longest]`, padded on the left.

    The mask comes from the rows' lengths: a token that happens to be `pad`, such as a real end of text where pad is eos, stays
    a token. Raises ValueError if there is no row, or one without a token.
    """
    lengths = [len(row) for row in rows]
    if not lengths or min(lengths) == 0:
        raise ValueError("every row needs a token" if lengths else "there are no rows")
    ids = torch.full((len(rows), max(lengths)), pad, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -len(row) :] = torch.as_tensor(row, dtype=torch.int64)
        mask[i, -len(row) :] = 1
    return ids, mask


def _check_mask(mask: Tensor, ids: Tensor, longer: bool) -> None:
    rows, length = ids.shape
    fits = mask.ndim == 2 and len(mask) == rows and (mask.shape[1] == length or (longer and mask.shape[1] > length))
    if not fits:
        need = f"[{rows}, {length}{' or more' if longer else ''}]"
        raise ValueError(f"the attention mask has shape {list(mask.shape)}; need {need}")
    check_left_padded(mask)


def check_left_padded(mask: Tensor, hint: str = "") -> None:
    """ValueError unless each row of `mask [N, L]` is zeros, or none, and then ones: the next token follows the last column."""
    mask = mask.bool()
    left = "pad on the left (tokenizer.padding_side = 'left')"
    for rows, why in (
        (~mask.any(1), "has no real token to continue"),
        (~mask[:, -1], f"ends in padding, which the next token would follow: {left}"),
        ((mask[:, :-1] & ~mask[:, 1:]).any(1), f"has zeros after a real token, which a state can't skip: {left}"),
    ):
        if bool(rows.any()):
            raise ValueError(f"row {int(rows.nonzero()[0])} of the attention mask {why}{hint}")
