"""The model's recurrent state, as a transformers Cache. Owned by the caller, updated in place, at fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin


@dataclass(frozen=True)
class StateSpec:
    """Shapes without the batch, and dtypes, of one layer's state."""

    conv: tuple[int, ...]
    conv_dtype: torch.dtype
    recurrent: tuple[int, ...]
    recurrent_dtype: torch.dtype = torch.float32


class LayerState(LinearAttentionCacheLayerMixin):
    """One layer's state: `conv [B, C, K-1]`, the mixer's last inputs, oldest first, in the dtype of the conv's input;
    `recurrent [B, ...]`, float32. Reordering and selecting rows copy inside the same storage."""

    is_compileable = False
    is_croppable = False

    def __init__(self, spec: StateSpec):
        super().__init__()
        self.spec = spec
        self.batch_size = -1

    @property
    def conv(self) -> Tensor:
        return self.conv_states[0]

    @property
    def recurrent(self) -> Tensor:
        return self.recurrent_states[0]

    def allocate(self, batch: int, device: torch.device) -> None:
        self.device, self.dtype = device, self.spec.conv_dtype
        self._hold(
            torch.zeros(batch, *self.spec.conv, dtype=self.spec.conv_dtype, device=device),
            torch.zeros(batch, *self.spec.recurrent, dtype=self.spec.recurrent_dtype, device=device),
        )
        self.conv_kernel_size[0] = self.spec.conv[-1]
        self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = True

    def _hold(self, conv: Tensor, recurrent: Tensor) -> None:
        self.conv_states[0], self.recurrent_states[0] = conv, recurrent
        self.batch_size = conv.shape[0]

    def take(self, index: Tensor) -> None:
        """Keep rows `index`, in that order. At most as many as before: same storage, a view of its first rows."""
        if self.batch_size < 0:
            return
        held = []
        for old in (self.conv, self.recurrent):
            new = old.index_select(0, index.to(old.device))
            held.append(old[: len(index)].copy_(new) if len(index) <= len(old) else new)
        self._hold(*held)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.take(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def reset(self) -> None:
        if self.batch_size >= 0:
            self.conv.zero_()
            self.recurrent.zero_()
        self.has_previous_state[0] = False

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError(
            "a recurrent state can't be cropped: take state.snapshot() before, and state.restore() it after"
        )

    def lazy_initialization(self, *args, **kwargs) -> None:
        raise RuntimeError("the model allocates its state itself: pass past_key_values=model.new_state()")

    update_conv_state = update_recurrent_state = lazy_initialization  # type: ignore[assignment]


class QuambaState(Cache):
    """All layers' states, with what the model needs to continue a sequence.

    `seen` int64 `[B]`: real tokens each row has consumed (padding not counted). `get_seq_length()`: columns fed, padding
    included; transformers' generation cuts the prompt by it. Allocated by the first forward, which knows the batch.
    Roll back with `snapshot()` and `restore()`.
    """

    layers: list[LayerState]

    def __init__(self, specs: Sequence[StateSpec]):
        super().__init__(layers=[LayerState(spec) for spec in specs])
        self.columns = 0
        self.seen: Tensor | None = None

    def allocate(self, batch: int, device: torch.device) -> None:
        """Make zero states for `batch` rows; with states already there, check that the batch is the same."""
        if self.seen is None:
            for layer in self.layers:
                layer.allocate(batch, device)
            self.seen = torch.zeros(batch, dtype=torch.int64, device=device)
        elif len(self.seen) != batch:
            raise ValueError(
                f"the state holds {len(self.seen)} rows and the input has {batch}: start a new state, or for beams repeat its "
                "rows first (state.batch_repeat_interleave)"
            )

    def advance(self, length: int, mask: Tensor | None) -> None:
        """Count `length` columns, of which `mask [B, L]` says the real ones."""
        assert self.seen is not None
        self.columns += length
        self.seen += length if mask is None else mask.sum(dim=1)
        if not self.layers[0].has_previous_state[0]:
            for layer in self.layers:
                layer.has_previous_state[0] = True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    @property
    def is_compileable(self) -> bool:
        return False

    def _take_seen(self, index: Tensor) -> None:
        if self.seen is not None:
            self.seen = self.seen[index.to(self.seen.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._take_seen(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take_seen(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.seen is not None:
            self.seen = self.seen.repeat_interleave(repeats)

    def reset(self) -> None:
        super().reset()
        self.columns = 0
        if self.seen is not None:
            self.seen.zero_()

    def snapshot(self) -> Snapshot:
        """A copy of everything `restore` needs."""
        seen = None if self.seen is None else self.seen.clone()
        tensors = [] if seen is None else [(layer.conv.clone(), layer.recurrent.clone()) for layer in self.layers]
        return Snapshot(self.columns, seen, tensors)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this state, in place. ValueError if the batch has changed since."""
        if snapshot.seen is None:
            self.reset()
            return
        if self.seen is None or len(self.seen) != len(snapshot.seen):
            raise ValueError("the snapshot was taken with another batch size")
        self.columns = snapshot.columns
        self.seen.copy_(snapshot.seen)
        for layer, (conv, recurrent) in zip(self.layers, snapshot.tensors, strict=True):
            layer.conv.copy_(conv)
            layer.recurrent.copy_(recurrent)


@dataclass(frozen=True)
class Snapshot:
    columns: int
    seen: Tensor | None
    tensors: list[tuple[Tensor, Tensor]]


def token_mask(attention_mask: Tensor | None, length: int, state: QuambaState | None) -> Tensor | None:
    """The last `length` columns of a mask as bool `[B, L]`; None if all tokens are real. ValueError if they can't be so.

    Zeros in front of a row's first real token leave the state as it was. A zero after one would have to be skipped by
    the recurrence, which only a row without a state survives (nothing reads what comes after the last real token).
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] < length:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; need [batch, {length} or more]")
    mask = attention_mask[:, -length:].bool()
    if bool(mask.all()):
        return None
    starts = mask[:, 1:] & ~mask[:, :-1]
    runs = starts.sum(dim=1) + mask[:, 0]
    if state is None:
        if bool((runs > 1).any()):
            raise ValueError("attention_mask has zeros between real tokens: a recurrent model can't skip them")
        return mask
    assert state.seen is not None
    stops = (mask[:, :-1] & ~mask[:, 1:]).any(dim=1) | ((state.seen > 0) & ~mask.all(dim=1))
    if bool(stops.any()):
        raise ValueError(
            "attention_mask has zeros after a real token, and the state would take them in: "
            "pad on the left (tokenizer.padding_side = 'left')"
        )
    return mask
