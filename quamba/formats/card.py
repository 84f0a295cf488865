"""The model card: README.md of every artifact, as the Hugging Face hub shows it.

Front matter (YAML) for the hub's search, then text for people. The table of measurements stands between two marks, so that
`quamba card --results` can replace it. What the base model's card says of its licence is passed on.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quamba.config import QuambaConfig
from quamba.errors import QuambaError
from quamba.formats.artifact import digest, expected_tensors, is_artifact, read_config, write_atomically
from quamba.formats.checkpoint import Checkpoint
from quamba.formats.summary import bits_of
from quamba.formats.tensors import read_json
from quamba.plan import Plan

PLACE = "path/to/this/folder"
"""Stands for the repository's id until it is known."""

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")
_LICENCE = ("license", "license_name", "license_link")
_BEGIN, _END = "<!-- measured -->", "<!-- /measured -->"
_NOTHING = f"""Nothing yet. To measure it beside its base model and put the numbers here:

```sh
quamba eval {PLACE} --against BASE --perplexity wikitext --task lambada_openai --output results.json
quamba card {PLACE} --results results.json
```"""

_TEXT = """# {title}

{facts}
## Use

```python
import quamba  # makes transformers know the format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
batch = tokenizer(["The old man went to"], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=20))[0])
```

`quamba inspect {place}` prints the plan component by component.

## Measured

{begin}
{nothing}
{end}

## Licence

{licence}
"""


@dataclass
class Card:
    """front: the YAML at the top; text: what follows it."""

    front: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    @classmethod
    def read(cls, folder: Path) -> Card | None:
        """The card in a folder; None without one. YAML that can't be read counts as none."""
        import yaml

        try:
            text = (folder / "README.md").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        if not text.startswith("---\n") or "\n---\n" not in text:
            return cls(text=text)
        top, _, rest = text[4:].partition("\n---\n")
        try:
            front = yaml.safe_load(top)
        except yaml.YAMLError:
            front = None
        return cls(front if isinstance(front, dict) else {}, rest.lstrip("\n"))

    def write(self, folder: Path) -> None:
        write_atomically(folder / "README.md", str(self).encode())

    def __str__(self) -> str:
        import yaml

        front = yaml.safe_dump(self.front, sort_keys=False, allow_unicode=True, width=120)
        return f"---\n{front}---\n\n{self.text}"

    @property
    def is_ours(self) -> bool:
        return self.front.get("library_name") == "quamba"

    @property
    def licence(self) -> dict[str, Any]:
        return {key: self.front[key] for key in _LICENCE if self.front.get(key)}

    def with_tags(self, tags: list[str] | None) -> Card:
        known = self.front.get("tags") or []
        return Card(self.front | {"tags": [*known, *(tag for tag in tags or [] if tag not in known)]}, self.text)

    def at(self, place: str) -> Card:
        """The card with the repository's id where a folder's path stood."""
        return Card(self.front, self.text.replace(PLACE, place))

    def with_results(self, table: str, index: list[dict[str, Any]]) -> Card:
        """Measurements put in: a Markdown table, and the hub's `model-index`."""
        front = {key: value for key, value in self.front.items() if key != "model-index"}
        if index:
            front["model-index"] = index
        before, begin, rest = self.text.partition(_BEGIN)
        _, end, after = rest.partition(_END)
        if begin and end:
            return Card(front, f"{before}{_BEGIN}\n{table}\n{_END}{after}")
        return Card(front, f"{self.text.rstrip()}\n\n## Measured\n\n{_BEGIN}\n{table}\n{_END}\n")


def compose(config: QuambaConfig, title: str, base: str | None, licence: dict[str, Any], more: str = "") -> Card:
    """The card of a model with this architecture and plan.

    base: name of the model that it comes from. licence: what the base's card says of it. more: Markdown below the facts.
    """
    plan = config.plan
    families = sorted({block["mixer"] for block in config.blocks})
    front: dict[str, Any] = {"library_name": "quamba", "pipeline_tag": "text-generation"}
    if base and "/" in base:  # the hub takes ids only
        front["base_model"] = base
        if not plan.is_float:
            front["base_model_relation"] = "quantized"
    front |= licence
    front["tags"] = ["quamba", *families, *([] if plan.is_float else ["quantized"])]
    if plan.recipe:
        front["tags"].append(plan.recipe)
    text = _TEXT.format(
        title=title,
        facts=_facts(config, base) + (f"\n{more.strip()}\n" if more else ""),
        place=PLACE,
        begin=_BEGIN,
        nothing=_NOTHING.replace("BASE", base or "BASE"),
        end=_END,
        licence=_licence(licence, base),
    )
    return Card(front, text)


def _facts(config: QuambaConfig, base: str | None) -> str:
    plan, facts = config.plan, {}
    if base:
        facts["base model"] = f"[{base}](https://huggingface.co/{base})" if "/" in base else f"`{base}`"
    if plan.recipe:
        facts["recipe"] = f"`{plan.recipe}`"
    calibration = plan.provenance.get("calibration") or {}
    if {"samples", "seq_len", "source", "seed"} <= calibration.keys():
        facts["calibration"] = (
            f"{calibration['samples']} windows of {calibration['seq_len']} tokens of `{calibration['source']}`, "
            f"seed {calibration['seed']}"
        )
    facts["size"] = _size(config)
    facts["architecture"] = (
        f"{', '.join(sorted({block['mixer'] for block in config.blocks}))}, {config.num_hidden_layers} blocks, "
        f"{config.hidden_size} wide, vocabulary {config.vocab_size}, float parts {_name(config.dtype)}"
    )
    if version := plan.provenance.get("quamba"):
        facts["made with"] = f"quamba {version}"
    return "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in facts.items())


def _size(config: QuambaConfig) -> str:
    """Bytes of the tensors, beside those of the float model; bits a weight."""
    sizes = _bytes(config)
    total = sum(sizes.values())
    if config.plan.is_float:
        return f"{total / 1e6:,.2f} MB"
    floating = config.with_plan(Plan.floating(config.num_hidden_layers))
    bits = bits_of(config, sizes)
    return (
        f"{total / 1e6:,.2f} MB ({_name(config.dtype)}: {sum(_bytes(floating).values()) / 1e6:,.2f} MB); "
        f"{bits['body_bits']:.2f} bits a weight in the blocks, {bits['vocabulary_bits']:.2f} in the vocabulary"
    )


def _bytes(config: QuambaConfig) -> dict[str, int]:
    tensors = expected_tensors(config).items()
    return {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in tensors}


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _licence(licence: dict[str, Any], base: str | None) -> str:
    of = f"`{base}`" if base else "the model that it was made from"
    if not licence:
        return f"That of {of}, whose files don't name one."
    name = licence.get("license_name") or licence.get("license")
    link = licence.get("license_link")
    return f"That of {of}: {f'[{name}]({link})' if str(link).startswith('http') else name}."


def quantized_card(config: QuambaConfig, checkpoint: Checkpoint) -> Card:
    """Of a model that `quamba.quantize` has made from `checkpoint`."""
    title = f"{checkpoint.location.name}, quantized with recipe `{config.plan.recipe}`"
    return compose(config, title, config.plan.provenance["base_model"], licence_of(checkpoint))


def converted_card(config: QuambaConfig, checkpoint: Checkpoint) -> Card:
    """Of a checkpoint that `quamba convert` has rewritten."""
    name, repairs = checkpoint.location.name, checkpoint.repairs
    more = f"Converted from the {checkpoint.layout} layout."
    if repairs.found:
        more += f" Repaired on the way:\n\n{repairs}"
    return compose(
        config, f"{name}, as a quamba artifact", checkpoint.location.repo or name, licence_of(checkpoint), more
    )


def licence_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the card beside a checkpoint says of its licence; nothing for a live model."""
    card = Card.read(checkpoint.folder) if checkpoint.live is None else None
    return card.licence if card is not None else {}


def copy_licence(checkpoint: Checkpoint, folder: Path) -> None:
    """The licence's own text, where the source has it as a file."""
    if checkpoint.live is None:
        copy_files(checkpoint.folder, folder, LICENCE_FILES)


def copy_files(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    """Files of one folder into another; a file that is the same one stays."""
    for file in sorted(path for pattern in patterns for path in source.glob(pattern) if path.is_file()):
        if not (folder / file.name).exists() or not file.samefile(folder / file.name):
            shutil.copyfile(file, folder / file.name)


def saved_card(model: Any, config: QuambaConfig) -> Card:
    """Of a model in memory, about to be saved with `config`: the card it was loaded with if it is still that model, else
    a new one."""
    origin, plan = model.origin, config.plan
    old = None if origin is None else Card.read(origin.path)
    if old is not None and old.is_ours and _same_model(origin.path, config):
        return old
    name = (origin.repo or origin.name) if origin is not None else model.name_or_path
    base = plan.provenance.get("base_model") or name or None
    title = Path(base).name if base else type(model).__name__
    title += f", quantized with recipe `{plan.recipe}`" if plan.recipe else ", as a quamba artifact"
    return compose(config, title, base, old.licence if old is not None else {})


def _same_model(folder: Path, config: QuambaConfig) -> bool:
    """Whether a folder holds an artifact of this architecture and plan in this dtype."""
    try:
        return is_artifact(folder) and digest(read_config(read_json(folder / "config.json"))) == digest(config)
    except QuambaError:
        return False
