"""Task files for lm-eval that read `<task>.jsonl` from a folder instead of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quamba.errors import DataError
from quamba.evaluation.catalogue import Catalogue, task_config, template_columns

BUNDLED = "bundled sample"
WHOLE = {"lambada_openai": 5153}  # rows of the data sets that a bundled sample is taken from


def data_folder(data: str | Path) -> tuple[Path, str]:
    """The folder that --data means, and what to call it. Raises DataError."""
    from quamba import bundled

    if str(data) == "bundled":
        return bundled.evaluation_dir(), BUNDLED
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise DataError(f"--data {data} is no folder; it should hold <task>.jsonl (or say --data bundled)")
    return folder, folder.resolve().name


def write_task_file(task: str, tasks: Catalogue, folder: Path | None, scratch: Path) -> None:
    """Write a task file that includes lm-eval's own, and reads `<task>.jsonl` instead of the hub if there is a folder.

    The rows go to the split that the task evaluates. Few-shot examples come from `<task>.<split>.jsonl`.
    """
    path = tasks.tasks[task]
    lines: dict[str, Any] = {"include": str(path), "task": task}
    if folder is not None:
        config = task_config(path)
        if "class" in config:
            raise DataError(f"{task} fetches its data itself: --data can't serve it")
        split = config.get("test_split") or config.get("validation_split") or "test"
        files = {split: _checked(folder, f"{task}.jsonl", config)}
        lines |= {"dataset_path": "json", "dataset_name": None, "training_split": None, "validation_split": None}
        lines |= {"test_split": split, "fewshot_split": None}
        fewshot = dict(config.get("fewshot_config") or {})
        source = fewshot.pop("split", None) or config.get("fewshot_split") or config.get("training_split")
        lines["fewshot_config"] = None
        if (config.get("num_fewshot") or 0) > 0 and "samples" in fewshot:
            del lines["fewshot_config"]
        elif (config.get("num_fewshot") or 0) > 0 and source:
            lines["fewshot_split"] = source
            if source != split:
                files[source] = _checked(folder, f"{task}.{source}.jsonl", config)
        cache = str(scratch / "cache")
        lines["dataset_kwargs"] = {"data_files": {k: str(v) for k, v in files.items()}, "cache_dir": cache}
    # JSON is YAML.
    (scratch / f"{task}.yaml").write_text(json.dumps(lines), encoding="utf-8")


def _checked(folder: Path, name: str, config: dict[str, Any]) -> Path:
    """The file, with a JSON object a line that has the columns the task's templates name; else DataError."""
    file = (folder / name).resolve()
    if not file.is_file():
        have = ", ".join(sorted(p.name for p in folder.glob("*.jsonl"))) or "no .jsonl file"
        raise DataError(f"{folder} has no {name}; it has {have}")
    columns = template_columns(config)
    rows = 0
    try:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                row, rows = json.loads(line), rows + 1
                if not isinstance(row, dict):
                    raise DataError(f"{file}, line {number}, is not a JSON object")
                if missing := sorted(columns - row.keys()):
                    raise DataError(f"{file}, line {number}, lacks {', '.join(missing)} (it has {', '.join(row)})")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not a JSON object a line: {error}") from error
    if not rows:
        raise DataError(f"{file} is empty")
    return file
