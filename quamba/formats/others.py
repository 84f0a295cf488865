"""Any causal language model in a folder: as quamba's where its layout is read here, else with transformers' own class."""

from __future__ import annotations

from typing import Any

from quamba.errors import CheckpointError
from quamba.formats.checkpoint import layout_of
from quamba.formats.load import as_device, as_dtype, load_model
from quamba.formats.location import locate
from quamba.formats.repairs import some


def load_any(model: str, *, dtype: Any = "auto", device: Any = None, transformers: bool = False) -> Any:
    """MODEL, ready to answer. transformers: with its own class although quamba reads the layout. Raises CheckpointError for
    what neither can open, QuambaError for a dtype or device that can't be. No code from the model's folder is run."""
    if not transformers and layout_of(model) is not None:
        return load_model(model, dtype=dtype, device=device)
    from transformers import AutoModelForCausalLM

    location, wanted, place = locate(model), as_dtype(dtype), as_device(device, None)
    try:
        found, facts = AutoModelForCausalLM.from_pretrained(
            location.path, dtype=wanted or "auto", output_loading_info=True
        )
    except Exception as error:  # whatever its readers raise for a damaged file
        raise CheckpointError(f"transformers can't load {model}: {(str(error).splitlines() or [''])[0]}") from error
    if missing := sorted(facts["missing_keys"]):
        raise CheckpointError(f"{model} has no {some(missing)}: transformers would start that at random")
    found.eval()
    return found if place is None else found.to(place)
