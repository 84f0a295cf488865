"""What lm-eval's own task files are called and where they lie, read in a second; its full index takes twenty."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_KEY = re.compile(
    r"""^["']?(task|group|tag|include|class)["']?[ \t]*:[ \t]*(.*?)[ \t]*\r?$((?:\n[ \t]*-[ \t]+.*$)*)""", re.M
)
_ITEM = re.compile(r"^[ \t]*-[ \t]+(.*?)[ \t]*\r?$", re.M)


@dataclass(frozen=True)
class Catalogue:
    """tasks: name -> its file. collections: names of groups and tags, which stand for several tasks."""

    tasks: dict[str, Path]
    collections: frozenset[str]

    @property
    def names(self) -> list[str]:
        return sorted({*self.tasks, *self.collections})


def task_folder() -> Path:
    """The folder of lm-eval's task files, without importing lm-eval."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("lm_eval is not installed")
    return Path(spec.submodule_search_locations[0]) / "tasks"


def catalogue(include: Path | None = None) -> Catalogue:
    """lm-eval's own tasks, and those of the folder `include`, which win."""
    ours = _scan(task_folder())
    if include is None:
        return ours
    theirs = _scan(include.expanduser().resolve())
    return Catalogue(ours.tasks | theirs.tasks, ours.collections | theirs.collections)


@cache
def _scan(folder: Path) -> Catalogue:
    """Scan the top-level `task`, `group`, `tag` and `include` keys of every task file.

    Files that name a list of tasks without a group, or nothing, are bases for others and not listed. Of two files with
    one task name the first in path order counts, as in lm-eval.
    """
    paths = sorted(_yaml_files(folder), key=Path.as_posix)
    files = {path: _keys(path) for path in paths}
    tasks: dict[str, Path] = {}
    collections: set[str] = set()
    for path in paths:
        keys = files[path]
        if "group" in keys and "class" not in keys:
            collections.update(keys["group"])
        elif len(keys.get("task", ())) == 1:
            tasks.setdefault(keys["task"][0], path)
            collections.update(_inherited(path, "tag", files))
    return Catalogue(tasks, frozenset(collections - {""}))


def _yaml_files(root: Path) -> list[Path]:
    return [Path(folder, name) for folder, _, names in os.walk(root) for name in names if name.endswith(".yaml")]


def _keys(path: Path) -> dict[str, list[str]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    found: dict[str, list[str]] = {}
    for key, value, items in _KEY.findall(text):
        values = _ITEM.findall(items) or (value.strip("[]").split(",") if value.startswith("[") else [value])
        found[key] = [name for value in values if (name := _bare(value))]
    return found


def _bare(value: str) -> str:
    return re.sub(r"(^|[ \t])#.*$", "", value).strip(" \t\"'")


def _inherited(path: Path, key: str, files: dict[Path, dict[str, list[str]]], depth: int = 8) -> list[str]:
    """The value of a key in this file or in what it includes, which need not end in .yaml."""
    if path not in files:
        files[path] = _keys(path) if path.is_file() else {}
    keys = files[path]
    if key in keys or depth == 0:
        return keys.get(key, [])
    includes = (Path(os.path.normpath(path.parent / name)) for name in keys.get("include", ()))
    return next((values for file in includes if (values := _inherited(file, key, files, depth - 1))), [])


def task_config(path: Path) -> dict[str, Any]:
    """A task file with everything it includes, local keys winning. `!function` values become the function's name."""
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    merged: dict[str, Any] = {}
    includes = config.pop("include", [])
    for name in [includes] if isinstance(includes, str) else includes:
        merged |= task_config(path.parent / name)
    return merged | config


class Function(str):
    """The name of a Python function that a task file refers to."""


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda _, node: Function(node.value))


def template_columns(config: dict[str, Any]) -> set[str]:
    """The columns that a task's templates name; empty if Python code prepares its rows (then nobody can tell)."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    if config.get("process_docs") is not None:
        return set()
    columns: set[str] = set()
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        value = config.get(key)
        if not isinstance(value, str) or isinstance(value, Function):
            continue
        if value.isidentifier():
            columns.add(value)
            continue
        try:
            columns |= meta.find_undeclared_variables(Environment().parse(value))
        except TemplateSyntaxError:  # a filter block or extension of lm-eval's own
            continue
    return columns
