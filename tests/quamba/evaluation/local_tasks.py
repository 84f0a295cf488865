"""Tiny tasks of each of lm-eval's kinds, and their data, as files."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

SENTENCES = [
    "The old man went to the window and looked at the sea.",
    "It rained.",
    "She had never seen so many people in one room, and she did not know what to say to any of them, so she said nothing.",
    "Nobody answered him; the house was dark, and the door stood open.",
    "In the morning the boat was gone",
    "A letter lay on the table. He read it twice, put it back, and went out into the garden without his hat.",
    "Once upon a time",
]
KINDS = {
    "tiny_loglikelihood": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.rsplit(' ', 1)[0]}}",
        "doc_to_target": "{{' ' + text.rsplit(' ', 1)[1]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "tiny_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 7, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(folder: Path, rows: int = len(SENTENCES)) -> Path:
    """`<kind>.yaml`, complete for lm-eval, and `<kind>.jsonl` of every kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in KINDS.items():
        file = folder / f"{name}.jsonl"
        with file.open("w", encoding="utf-8") as stream:
            for i, text in enumerate((SENTENCES * 10)[:rows]):
                text = text if i < len(SENTENCES) else f"{text} And {i} more."
                row = {"text": text, "choices": [" yes", " no", " it was so"], "label": i % 3, "answer": "nothing"}
                stream.write(json.dumps(row) + "\n")
        config = {"task": name, "dataset_path": "json", "test_split": "test", **task}
        config["dataset_kwargs"] = {"data_files": {"test": str(file)}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder
