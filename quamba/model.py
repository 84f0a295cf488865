"""The language model: embedding, blocks, final norm, head. Written once, for every family and precision."""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from quamba.config import QuambaConfig
from quamba.decoding import Decoder
from quamba.errors import QuambaError
from quamba.generation import check_left_padded
from quamba.layers import Embedding, GatedMLP, Hadamard, Linear, RMSNorm, Sites
from quamba.mixers import MIXERS
from quamba.plan import BlockPlan, Plan
from quamba.schema import read_dataclass
from quamba.state import LayerState, QuambaState, StateSpec, token_mask

if TYPE_CHECKING:
    from quamba.formats.location import Location

MOST_TOKENS = 1 << 13  # of all rows together, that are read at once where their logits aren't asked for
MODES = ("auto", "recurrent", "parallel")
NOT_COMPILED = "quamba replays recorded kernel calls, which torch.compile can't look into; the model runs as it is"
log = logging.getLogger("quamba")


class Block(nn.Module):
    """Norm, mixer, residual, and where the architecture has one norm, MLP, residual. `scales` holds the static scales of
    all its sites. Floats in, floats out."""

    def __init__(self, config: QuambaConfig, index: int, plan: BlockPlan):
        super().__init__()
        entry = config.blocks[index]
        if entry.get("mixer") not in MIXERS:
            raise QuambaError(
                f"block {index} asks for mixer {entry.get('mixer')!r}; this version has {', '.join(MIXERS)}"
            )
        mixer = MIXERS[entry["mixer"]]
        width = config.hidden_size
        args = read_dataclass(mixer.Args, entry["args"], f"blocks[{index}].args")
        self.plan = plan
        self.norm = RMSNorm(width, config.layer_norm_epsilon)
        self.mixer = mixer(args, width, plan)  # type: ignore[call-arg]
        self.norm2, self.mlp = None, None
        widths = mixer.site_widths(args, width)
        if entry.get("mlp") is not None:
            inner = read_dataclass(MLPArgs, entry["mlp"], f"blocks[{index}].mlp").intermediate_size
            self.norm2 = RMSNorm(width, config.layer_norm_epsilon)
            self.mlp = GatedMLP(width, inner, plan)
            widths |= GatedMLP.site_widths(width, inner)
        self.state_shapes = mixer.state_shapes(args)
        self.scales = Sites(widths, plan.sites, {"state": self.state_shapes["recurrent"][-1]})

    def forward(self, residual: Tensor, state: LayerState | None = None, mask: Tensor | None = None) -> Tensor:
        """residual `[B, L, D]` to the next residual, same shape and dtype."""
        y = self.mixer(self.norm(residual, self.scales("mixer_in")), self.scales, state, mask)
        residual = residual + y.to(residual.dtype)
        if self.norm2 is not None and self.mlp is not None:
            y = self.mlp(self.norm2(residual, self.scales("mlp_in")), self.scales)
            residual = residual + y.to(residual.dtype)
        return residual

    def weights(self) -> dict[str, tuple[str, str]]:
        """The plan's name of each weight -> its module's place in the block and the site it reads, in order of use."""
        found = {name: (f"mixer.{name}", site) for name, site in self.mixer.reads.items()}
        if self.mlp is not None:
            found |= {name: (f"mlp.{name}", site) for name, site in self.mlp.reads.items()}
        return found

    def vectors(self) -> dict[str, str]:
        """The plan's name of each small parameter -> its place in the block."""
        return {name: f"mixer.{place}" for name, place in self.mixer.vectors.items()}

    def state_spec(self) -> StateSpec:
        weight = self.mixer.in_proj.weight
        conv_dtype = torch.float32 if weight is None or not weight.is_floating_point() else weight.dtype
        if not self.scales.specs["conv_in"].is_float:
            conv_dtype = torch.int8
        recurrent = torch.float32 if self.scales.specs["state"].is_float else torch.int8
        return StateSpec(self.state_shapes["conv"], conv_dtype, self.state_shapes["recurrent"], recurrent)


@dataclass(frozen=True)
class MLPArgs:
    """A block's `mlp` entry: a gated MLP of so many channels after the mixer."""

    intermediate_size: int


class Backbone(nn.Module):
    """Embedding, blocks and final norm; `scales` holds the model's own site, head_in."""

    def __init__(self, config: QuambaConfig, plan: Plan):
        super().__init__()
        self.embedding: nn.Module = Embedding(config.vocab_size, config.hidden_size, plan.embedding)
        self.layers = nn.ModuleList([Block(config, i, plan.blocks[i]) for i in range(config.num_hidden_layers)])
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.scales = Sites({"head_in": config.hidden_size}, {"head_in": plan.final_norm})
        # Untied, embedding and head hold the rotation in their weights.
        self.rotation = Hadamard(plan.hadamard if config.tie_word_embeddings else None)


class QuambaLMHeadModel(PreTrainedModel, GenerationMixin):
    """Causal language model; the float model is the same class with float components. For inference: no gradients.

    Load with `from_pretrained(name, folder or hub id)`: our artifacts and the layouts listed in docs/formats.md.
    """

    config_class = QuambaConfig
    base_model_prefix = "backbone"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True  # assisted decoding would have to crop the state

    def __init__(self, config: QuambaConfig):
        super().__init__(config)
        plan = config.plan
        if len(plan.blocks) != config.num_hidden_layers:
            raise QuambaError(f"the plan has {len(plan.blocks)} blocks, the architecture {config.num_hidden_layers}")
        if config.tie_word_embeddings and plan.lm_head != plan.embedding:
            raise QuambaError(
                f"head and embedding are tied, one matrix in one format, but the plan has {plan.lm_head.bits} bits for "
                f"one and {plan.embedding.bits} for the other"
            )
        self.backbone = Backbone(config, plan)
        integer = not plan.final_norm.is_float
        self.lm_head = Linear(config.hidden_size, config.vocab_size, config.head_bias, plan.lm_head, integer)
        names = [name for name, _ in self.lm_head.named_parameters() if name != "bias"]
        self._tied_weights_keys = {f"lm_head.{name}": f"backbone.embedding.{name}" for name in names}
        self.residual_dtype = torch.float32 if config.residual_in_fp32 else None
        self.post_init()
        self.requires_grad_(False)
        self._check_logits = False
        self._decoder = Decoder()
        self.origin: Location | None = None  # where it was loaded from

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        reset = getattr(module, "reset_parameters", None)
        if reset is not None and not module.__module__.startswith("torch."):
            reset()

    @property
    def tied(self) -> dict[str, str]:
        """Names of the head's tensors that are the embedding's, -> their names there; empty where they are its own."""
        return self._tied_weights_keys if self.config.tie_word_embeddings else {}

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """Load a model: a bundled name, a folder of any layout in docs/formats.md, a hub id or short name; or a live model
        of transformers or mamba-ssm, whose tensors are then shared.

        dtype: "auto" (as stored, the default) or a torch dtype for the float parts; device or device_map: where to, whole;
        strict: refuse a checkpoint that needs repairs (otherwise they are logged once); verify: check the hashes of an
        artifact's files; config: settings such as `output_hidden_states`, not another architecture; revision, token,
        cache_dir, local_files_only: passed to the hub. Raises QuambaError.
        """
        from quamba.formats import load_model

        return load_model(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _from_config(cls, config: QuambaConfig, **kwargs: Any):
        """What `AutoModelForCausalLM.from_config` calls: a float model with random weights."""
        if not config.plan.is_float:
            raise QuambaError("a quantized model can't be started at random: load its files with from_pretrained")
        return super()._from_config(config, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write an artifact: safetensors shards (one a block, whatever `max_shard_size`), index, config, generation config,
        tokenizer, model card. Replaces the files of an earlier one.

        tokenizer: an object, folder or hub id; by default that of the folder the model was loaded from. tags: for the card.
        push_to_hub=True uploads the folder, with `push_to_hub`'s arguments and `repo_id`. Raises QuambaError.
        """
        from quamba.formats import save_model

        save_model(self, save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Save into a repository of the hub, in one commit: the same files as `save_pretrained`. Returns its CommitInfo.

        tokenizer, tags, commit_message, commit_description, private, token, revision, create_pr. A README.md that is there
        and isn't quamba's stays. Raises QuambaError if the hub refuses or can't be reached.
        """
        from quamba.formats import push_model

        return push_model(self, repo_id, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """Only to the size there is: QuambaError for another one."""
        if new_num_tokens not in (None, self.config.vocab_size) or kwargs.get("pad_to_multiple_of"):
            raise QuambaError(
                f"the vocabulary stays at {self.config.vocab_size}: resize transformers' float model, then quantize that"
            )
        return self.get_input_embeddings()

    def new_state(self) -> QuambaState:
        """A state to pass as `past_key_values`; the first forward allocates it."""
        return QuambaState([cast(Block, block).state_spec() for block in self.backbone.layers])

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        mode: str = "auto",
        **kwargs: Any,
    ):
        """transformers' `generate` with one argument more.

        mode: "recurrent" gives each new token to the state; "parallel" computes the whole text anew at every step, without
        a state, to check the other by: tokens and scores are the same. "auto": recurrent, unless the generation config has
        `use_cache=False`. num_beams may be None or 0: no beams. Padding belongs on the left.

        Raises ValueError if arguments contradict each other, for a prompt without a token or an attention mask that isn't
        padded on the left, QuambaError if the first logits are NaN or infinite.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; choose {', '.join(MODES)}")
        given = kwargs.get("input_ids") if inputs is None else inputs
        if given is not None and given.shape[-1] == 0:
            raise ValueError(f"the prompt has shape {list(given.shape)}, no token to go on from: give one or more")
        if mode == "parallel" and kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "mode='parallel' needs input_ids: from inputs_embeds transformers generates with a state only"
            )
        if mode != "auto":
            cached = mode == "recurrent"
            if kwargs.get("use_cache") not in (None, cached):
                raise ValueError(f"mode={mode!r} and use_cache={kwargs['use_cache']} contradict each other")
            if generation_config is None:
                kwargs["use_cache"] = cached
            else:
                generation_config = copy.deepcopy(generation_config)
                generation_config.use_cache = cached
        if kwargs.get("num_beams", 1) in (None, 0):
            kwargs["num_beams"] = 1
        self._check_logits = True
        return super().generate(inputs, generation_config, *args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args: Any, **kwargs: Any) -> None:
        mask, state = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        if mask is not None and mask.ndim == 2:
            check_left_padded(
                mask, "; where none was given, transformers took every pad_token_id for padding: give one"
            )
        cached = generation_config.use_cache is not False
        log.debug("generating in mode %s", "recurrent" if cached else "parallel")
        length = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        if isinstance(state, QuambaState) and length is not None and state.columns >= length:
            raise ValueError(
                f"past_key_values has read {state.columns} tokens and the text has {length}: give the whole text, of which the "
                "state has read all but the last token, or less"
            )
        if cached and state is None:
            model_kwargs["past_key_values"] = self.new_state()
        elif state is not None and not cached:
            raise ValueError(
                "mode 'parallel' (use_cache=False) gives the model the whole text at every step and can't continue "
                "past_key_values: leave one of them out"
            )

    @torch.compiler.disable(reason=NOT_COMPILED)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: QuambaState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """input_ids int64 `[B, L]` (or inputs_embeds `[B, L, D]`) to logits `[B, L, V]` in the head's dtype.

        attention_mask `[B, L or longer]`, 1 for real tokens: without a state one run of ones a row, with a state zeros
        only in front of a row's first real token. past_key_values: a state, continued and updated in place; `use_cache`
        alone makes a new one. logits_to_keep: only the last so many positions (0: all), or an index of positions; with a
        number and a state, prompts of more than MOST_TOKENS tokens are read in pieces, so that their activations fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given = inputs_embeds if input_ids is None else input_ids
        assert given is not None
        batch, length = given.shape[:2]
        state = past_key_values
        if state is None and use_cache:
            state = self.new_state()
        if state is not None:
            if not isinstance(state, QuambaState):
                raise TypeError(f"past_key_values must come from model.new_state(), not be a {type(state).__name__}")
            state.allocate(batch, given.device)
        mask = token_mask(attention_mask, length, state)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        keep = logits_to_keep if isinstance(logits_to_keep, Tensor) else kept
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        layers = None if state is None else state.layers

        def run(ids_or_embeds: Tensor, tokens: slice = slice(None), keep: slice | Tensor = keep) -> Tensor:
            x = ids_or_embeds[:, tokens]
            x = x if input_ids is None else self.backbone.embedding(x)
            return self._logits(x, layers, None if mask is None else mask[:, tokens], keep, hidden)

        one_plain_token = length == 1 and mask is None and hidden is None and not isinstance(keep, Tensor)
        if state is not None and input_ids is not None and one_plain_token:
            logits = self._decoder(self, input_ids, state, run)
        else:
            start = 0
            if state is not None and hidden is None and isinstance(logits_to_keep, int) and logits_to_keep:
                most = max(1, MOST_TOKENS // max(1, batch))
                for end in range(most, length - logits_to_keep + 1, most):  # only the last piece's logits are asked for
                    run(given, slice(start, end), slice(0, 0))
                    start = end
            logits = run(given, slice(start, None))
        if state is not None:
            state.advance(length, mask)
        if self._check_logits:
            self._check_logits = False
            if not bool(torch.isfinite(logits[:, -1]).all()):
                raise QuambaError("the model's logits are NaN or infinite: its weights or scales are damaged")
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=state,  # type: ignore[arg-type]
            hidden_states=None if hidden is None else tuple(hidden),
        )
        return output if return_dict else output.to_tuple()

    def _logits(
        self,
        x: Tensor,
        layers: list[LayerState] | None,
        mask: Tensor | None,
        keep: slice | Tensor,
        hidden: list[Tensor] | None,
    ) -> Tensor:
        """Embeddings `[B, L, D]` to the logits of the positions `keep`. Each residual is appended to `hidden`."""
        x = self.backbone.rotation.turn(x if self.residual_dtype is None else x.to(self.residual_dtype))
        for i, block in enumerate(self.backbone.layers):
            if hidden is not None:
                hidden.append(x)
            x = block(x, None if layers is None else layers[i], mask)
        if hidden is not None:
            hidden.append(x)
        x = self.backbone.rotation.turn_back(x[:, keep])
        return self.lm_head(self.backbone.norm_f(x, self.backbone.scales("head_in")))


from quamba.auto import register  # noqa: E402

register()
