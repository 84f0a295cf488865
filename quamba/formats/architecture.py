"""The architecture of a float checkpoint: its tensors say the sizes, its config the rest, and each is held against the other.

Real files mix the naming schemes of mamba-ssm, transformers and Codestral, and carry wrong leftovers. A size is read from
the tensors. If the config gives it under several names and one agrees, the others are leftovers: a repair. If all it gives
contradict the tensors, the checkpoint is refused with both readings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from quamba.config import QuambaConfig
from quamba.errors import CheckpointError
from quamba.formats.limits import dt_limits
from quamba.formats.repairs import Repairs

Shapes = Mapping[str, tuple[int, ...]]
TIES = ("tie_word_embeddings", "tie_embeddings")
_BLOCK = re.compile(r"^backbone\.layers\.\d+\.")
_TENSORS = "the tensors leave no other reading"


class Readings:
    """A config's values for one thing under several names: dotted names lead into `ssm_cfg`."""

    def __init__(self, config: Mapping[str, Any], repairs: Repairs):
        self.config, self.repairs = config, repairs

    def all(self, *names: str) -> dict[str, Any]:
        found = {}
        for name in names:
            place: Any = self.config
            for part in name.split("."):
                place = place.get(part) if isinstance(place, Mapping) else None
            if place is not None:
                found[name] = place
        return found

    def first(self, default: Any, *names: str, meaning: Callable[[Any], Any] = lambda value: value) -> Any:
        """What only the config knows: the first of `names` that it has; others of another `meaning` are leftovers."""
        found = self.all(*names)
        if not found:
            return default
        name, value = next(iter(found.items()))
        for other in [other for other in found if meaning(found[other]) != meaning(value)]:
            self.repairs.add(
                f"the config has both {name} = {value} and {other} = {found[other]}; the first is used",
                "it belongs to the naming scheme of the file's model_type",
            )
        return value

    def settle(
        self,
        found: Any,
        tensor: str,
        readings: Mapping[str, Any],
        default: Any = None,
        *,
        what: str = "",
        shown: str | None = None,
    ) -> Any:
        """A size that the tensors give. `readings`: name in the config -> what it makes this size; `default`: what the
        layout assumes where the config says nothing; `what`: the size's name; `shown`: how a refusal tells what was
        found."""
        wrong = {name: value for name, value in readings.items() if value != found}
        inside = _BLOCK.sub("", tensor)  # the same in several blocks is one repair of several tensors
        tensors = () if inside == tensor else (tensor,)
        if not readings and default is not None and default != found:
            self.repairs.add(
                f"the config doesn't say {what or 'this size'}; {inside} shows {found}, not the usual {default}",
                _TENSORS,
                *tensors,
            )
        elif wrong and len(wrong) == len(readings):
            said = " and ".join(f"{name} = {value!r}" for name, value in wrong.items())
            raise CheckpointError(
                f"config and tensors contradict each other: by the config {said}, {shown or f'by {tensor} {found!r}'}"
            )
        for name, value in wrong.items():
            right = next(other for other in readings if other not in wrong)
            self.repairs.add(
                f"the config has both {right} = {readings[right]} and {name} = {value}; the tensors say {found}",
                _TENSORS,
                *tensors,
            )
        return found


def settle_architecture(
    config: Mapping[str, Any], shapes: Shapes, defaults: Mapping[str, Any], repairs: Repairs
) -> QuambaConfig:
    """The architecture of a float Mamba1 or Mamba2 checkpoint with these tensors (by our names).

    defaults: what the layout assumes for `n_groups`, `state_size`, `norm_epsilon`, `tied` and so on where the config is
    silent. Raises CheckpointError.
    """
    read = Readings(config, repairs)
    embedding = _shape(shapes, "backbone.embedding.weight", 2)
    rows, hidden = embedding
    widths = read.all("hidden_size", "d_model", "dim")
    read.settle(hidden, "the embedding", widths, defaults.get("hidden_size"), what="d_model")
    layers = _layers(shapes)
    read.settle(
        layers,
        "the number of blocks",
        read.all("num_hidden_layers", "n_layer", "n_layers"),
        defaults.get("layers"),
        what="n_layer",
    )
    blocks = [_block(read, shapes, f"backbone.layers.{i}.", hidden, defaults) for i in range(layers)]
    return QuambaConfig(
        vocab_size=_vocabulary(read, rows, defaults),
        hidden_size=hidden,
        blocks=blocks,
        layer_norm_epsilon=_epsilon(read, 1e-5, "layer_norm_epsilon"),
        residual_in_fp32=_flag(read.first(True, "residual_in_fp32"), "residual_in_fp32"),
        tie_word_embeddings=_tied(read, shapes, defaults),
        head_bias="lm_head.bias" in shapes,
        pad_token_id=config.get("pad_token_id"),
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id"),
    )


def _vocabulary(read: Readings, rows: int, defaults: Mapping[str, Any]) -> int:
    size = read.config.get("vocab_size", defaults.get("vocab_size"))
    if size is None:
        read.repairs.add(f"the config doesn't say vocab_size; the embedding has {rows} rows", _TENSORS)
    if size is None or size == rows:
        return rows
    multiple = read.config.get("pad_vocab_size_multiple", defaults["pad_vocab_size_multiple"])
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in (size, multiple)):
        raise CheckpointError(f"vocab_size = {size} padded to a multiple of {multiple} is no size")
    if rows != math.ceil(size / multiple) * multiple:
        if not size < rows < size + 512:
            raise CheckpointError(
                f"config and tensors contradict each other: by the config vocab_size = {size}, by the embedding {rows}"
            )
        read.repairs.add(
            f"the embedding has {rows} rows for a vocabulary of {size}: padded otherwise than the config says",
            "rows beyond the vocabulary belong to no token",
        )
    return rows


def _tied(read: Readings, shapes: Shapes, defaults: Mapping[str, Any]) -> bool:
    """Where the config says both, true for now: whether the two tensors differ is not seen here."""
    said = read.all(*TIES)
    tied = any(said.values()) if said else bool(defaults["tied"])
    if "lm_head.weight" in shapes:
        return tied
    if said and not tied:
        names = " and ".join(f"{name} = {value}" for name, value in said.items())
        raise CheckpointError(f"1 tensor is missing: lm_head.weight (by the config, {names}, the head is no embedding)")
    if not (tied and all(said.values())):
        read.repairs.add(
            "there is no lm_head.weight; the embedding serves as head", "a model without a head is a tied one"
        )
    return True


def _layers(shapes: Shapes) -> int:
    numbers = {int(m[1]) for m in (re.match(r"backbone\.layers\.(\d{1,6})\.", name) for name in shapes) if m}
    if not numbers:
        raise CheckpointError("there are no tensors backbone.layers.*: this is no Mamba model, or one without layers")
    if numbers != set(range(len(numbers))):
        gap = min(set(range(max(numbers) + 1)) - numbers)
        raise CheckpointError(f"tensors are missing: block {gap} has none, block {max(numbers)} has")
    return len(numbers)


def _shape(shapes: Shapes, name: str, dims: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None:
        firsts = sorted({other.split(".")[0] for other in shapes} - {"backbone", "lm_head"})
        strange = f" (some names begin with {', '.join(firsts[:3])})" if firsts else ""
        raise CheckpointError(f"1 tensor is missing: {name}{strange}")
    if len(shape) != dims or not all(shape):
        raise CheckpointError(f"{name} has the impossible shape {list(shape)}")
    return shape


def _block(read: Readings, shapes: Shapes, prefix: str, hidden: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
    mamba1 = f"{prefix}mixer.x_proj.weight" in shapes
    if not mamba1 and f"{prefix}mixer.dt_bias" not in shapes:
        raise CheckpointError(
            f"tensors are missing: {prefix}mixer has neither x_proj.weight, as Mamba1, nor dt_bias, as Mamba2"
        )
    family = "mamba1" if mamba1 else "mamba2"
    layer = read.all("ssm_cfg.layer")
    said = {name: str(value).lower() for name, value in layer.items()}
    if "family" in defaults:
        said["model_type"] = defaults["family"]
    read.settle(
        family,
        f"{prefix}mixer",
        said,
        "mamba1" if "ssm_cfg" in read.config and not said else None,
        what="ssm_cfg.layer",
    )
    args = (_mamba1 if mamba1 else _mamba2)(read, shapes, f"{prefix}mixer.", hidden, defaults)
    mlp = None
    if f"{prefix}mlp.fc2.weight" in shapes:
        width = _shape(shapes, f"{prefix}mlp.fc2.weight", 2)[1]
        inner = read.all("d_intermediate")
        read.settle(width, f"{prefix}mlp", {name: -(-value // 128) * 128 for name, value in inner.items()})
        mlp = {"intermediate_size": width}
    elif any(read.all("d_intermediate").values()):
        raise CheckpointError(
            f"1 tensor is missing: {prefix}mlp.fc1.weight, with d_intermediate = {read.config['d_intermediate']}"
        )
    return {"mixer": family, "args": args, "mlp": mlp}


def _epsilon(read: Readings, default: float, name: str) -> float:
    value = read.first(default, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise CheckpointError(f"{name} = {value!r} is no small number")
    return float(value)


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise CheckpointError(f"{name} = {value!r} is neither true nor false")
    return value


def _switch(read: Readings, shapes: Shapes, tensor: str, usual: bool, *names: str) -> bool:
    """Whether a tensor is there. One that is usual may have been lost, so that its absence must be said."""
    found = tensor in shapes
    readings = {name: bool(value) for name, value in read.all(*names).items()}
    if usual and not found and not readings:
        raise CheckpointError(f"1 tensor is missing: {tensor} (a model without it says {names[-1]} = false)")
    shown = f"but {tensor} is {'there' if found else 'missing'}"
    return read.settle(found, tensor, readings, usual, shown=shown, what=names[-1])


def _taps(read: Readings, shapes: Shapes, at: str) -> int:
    taps = _shape(shapes, f"{at}conv1d.weight", 3)[2]
    return read.settle(taps, f"{at}conv1d.weight", read.all("conv_kernel", "ssm_cfg.d_conv"), 4, what="d_conv")


def _biases(read: Readings, shapes: Shapes, at: str) -> dict[str, bool]:
    return {
        "use_bias": _switch(read, shapes, f"{at}in_proj.bias", False, "use_bias", "ssm_cfg.bias"),
        "use_conv_bias": _switch(read, shapes, f"{at}conv1d.bias", True, "use_conv_bias", "ssm_cfg.conv_bias"),
    }


def _inner(read: Readings, inner: int, at: str, hidden: int, *names: str) -> None:
    readings = {}
    for name, value in read.all("expand", "ssm_cfg.expand").items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise CheckpointError(f"{name} = {str(value)[:50]} is no factor")
        readings[f"{name} * {hidden}"] = int(value * hidden)
    read.settle(inner, f"{at}out_proj.weight", readings | read.all(*names), 2 * hidden, what="expand")


def _mamba1(read: Readings, shapes: Shapes, at: str, hidden: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
    inner, states = _shape(shapes, f"{at}A_log", 2)
    _inner(read, inner, at, hidden, "intermediate_size")
    read.settle(states, f"{at}A_log", read.all("state_size", "ssm_cfg.d_state"), 16, what="d_state")
    rank = _shape(shapes, f"{at}dt_proj.weight", 2)[1]
    ranks = {name: value for name, value in read.all("time_step_rank", "ssm_cfg.dt_rank").items() if value != "auto"}
    read.settle(rank, f"{at}dt_proj.weight", ranks, math.ceil(hidden / 16), what="dt_rank")
    args: dict[str, Any] = {
        "intermediate_size": inner,
        "state_size": states,
        "conv_kernel": _taps(read, shapes, at),
        "time_step_rank": rank,
        **_biases(read, shapes, at),
    }
    if defaults.get("normed_parameters"):
        args["norm_epsilon"] = _epsilon(read, 1e-6, "mixer_rms_eps")
    return args


def _mamba2(read: Readings, shapes: Shapes, at: str, hidden: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
    (heads,) = _shape(shapes, f"{at}dt_bias", 1)
    inner = _shape(shapes, f"{at}out_proj.weight", 2)[1]
    if inner % heads:
        raise CheckpointError(f"{at}out_proj.weight has {inner} columns, which {heads} heads (dt_bias) can't share")
    width = inner // heads
    _inner(read, inner, at, hidden, "ssm_cfg.d_ssm")
    read.settle(heads, f"{at}dt_bias", read.all("num_heads"), defaults.get("num_heads"), what="num_heads")
    read.settle(width, f"{at}dt_bias", read.all("head_dim", "ssm_cfg.headdim"), 64, what="headdim")
    groups, states = _groups_and_states(read, _shape(shapes, f"{at}conv1d.weight", 3)[0] - inner, at, defaults)
    hdim = _shape(shapes, f"{at}D", 1)[0] == inner != heads
    args = {
        "num_heads": heads,
        "head_dim": width,
        "state_size": states,
        "n_groups": groups,
        # Not a key of transformers': up to 5.22 it took the norm over all channels, from 5.23 on group by group.
        "norm_groups": read.first(groups, "norm_groups"),
        "conv_kernel": _taps(read, shapes, at),
        "chunk_size": read.first(256, "chunk_size", "ssm_cfg.chunk_size"),
        **_biases(read, shapes, at),
        **dt_limits(read.first((0.0, math.inf), "time_step_limit", "ssm_cfg.dt_limit", meaning=dt_limits)),
    }
    if defaults["native"]:
        args["D_has_hdim"] = read.settle(hdim, f"{at}D", read.all("ssm_cfg.D_has_hdim"), False, what="D_has_hdim")
        args["rms_norm"] = _switch(read, shapes, f"{at}norm.weight", True, "ssm_cfg.rmsnorm")
        args["norm_before_gate"] = read.first(False, "ssm_cfg.norm_before_gate")
    else:
        args["norm_epsilon"] = _epsilon(read, 1e-5, "layer_norm_epsilon")
    return args


def _groups_and_states(read: Readings, both: int, at: str, defaults: Mapping[str, Any]) -> tuple[int, int]:
    """The convolution's rows give 2 * groups * states; which is which, the config must say."""
    product, odd = divmod(both, 2)
    groups, states = read.all("n_groups", "ssm_cfg.ngroups"), read.all("state_size", "ssm_cfg.d_state")
    told = [(g, s) for g in groups.values() for s in states.values()]
    if not groups:
        told += [(product // s if s and product % s == 0 else defaults["n_groups"], s) for s in states.values()]
    elif not states:
        told += [(g, product // g if g and product % g == 0 else defaults["state_size"]) for g in groups.values()]
    if not groups and not states:
        told = [(defaults["n_groups"], defaults["state_size"])]
    right = {(g, s) for g, s in told if g * s == product}
    if odd or product < 1 or len(right) != 1:
        said = " or ".join(f"{g!r} groups of {s!r} states" for g, s in dict.fromkeys(told))
        raise CheckpointError(
            f"config and tensors contradict each other: by the config {said}, "
            f"by {at}conv1d.weight groups * states = {both / 2:g}"
        )
    g, s = right.pop()
    read.settle(g, f"{at}conv1d.weight", groups, defaults["n_groups"], what="ngroups")
    read.settle(s, f"{at}conv1d.weight", states, defaults["state_size"], what="d_state")
    return g, s
