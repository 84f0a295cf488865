"""QuambaConfig: a model's architecture block by block, and its plan."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

from quamba.plan import Plan


class QuambaConfig(PreTrainedConfig):
    """Configuration of a `QuambaLMHeadModel`, float or quantized. Field names are transformers'.

    blocks: one entry a layer, even when all are equal: `{"mixer": "mamba1", "args": {...}, "mlp": null}`.
    quantization_config: the plan as a dict (see `quamba.plan.Plan`), or None for a float model.
    """

    model_type = "quamba"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 50280
    hidden_size: int = 768
    num_hidden_layers: int = 0
    blocks: list[Any] = field(default_factory=list)
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = True
    head_bias: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_hidden_layers not in (0, len(self.blocks)):
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}, but there are {len(self.blocks)} blocks")
        self.num_hidden_layers = len(self.blocks)
        kwargs.pop("layer_types", None)
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """transformers' own vocabulary, derived from the blocks."""
        return ["linear_attention"] * self.num_hidden_layers

    @property
    def plan(self) -> Plan:
        data = getattr(self, "quantization_config", None)
        return Plan.from_dict(data) if data else Plan.floating(self.num_hidden_layers)

    def with_plan(self, plan: Plan) -> QuambaConfig:
        data = self.to_dict()
        data["quantization_config"] = plan.to_dict()
        return QuambaConfig.from_dict(data)
