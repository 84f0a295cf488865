"""The README that lies in every artifact."""

from __future__ import annotations

from quamba.config import QuambaConfig
from quamba.formats.checkpoint import Checkpoint
from quamba.plan import Plan

_CARD = """---
library_name: quamba
base_model: {base}
tags: [quamba, mamba, quantized]
---

# {name}, quantized with recipe `{recipe}`

Made with quamba {version} from `{base}`: {layers} blocks, {hidden} wide,
float parts in {dtype}. Static scales come from {samples} windows of {seq_len} tokens of the calibration text
`{source}` (seed {seed}).

```python
from quamba import QuambaLMHeadModel

model = QuambaLMHeadModel.from_pretrained("path/to/this/folder")
```

`quamba inspect path/to/this/folder` prints the plan component by component. The licence is the base model's.
"""


def model_card(config: QuambaConfig, plan: Plan, checkpoint: Checkpoint) -> str:
    calibration = plan.provenance["calibration"]
    return _CARD.format(
        base=plan.provenance["base_model"],
        name=checkpoint.location.name,
        recipe=plan.recipe,
        version=plan.provenance["quamba"],
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        dtype=str(config.dtype).removeprefix("torch."),
        samples=calibration["samples"],
        seq_len=calibration["seq_len"],
        source=calibration["source"],
        seed=calibration["seed"],
    )
