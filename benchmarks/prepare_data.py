"""Turn downloaded evaluation files into the task folder that `quamba eval --data DIR` reads.

    python benchmarks/prepare_data.py SOURCE DIR

SOURCE (or SOURCE/eval) holds any of the files on the left; DIR gets one file for each, with the columns that
lm-eval's task of that name reads:

    lambada_openai_test.jsonl   lambada_openai.jsonl   text
    piqa_valid.jsonl            piqa.jsonl             goal, sol1, sol2, label
    hellaswag_val_1000.jsonl    hellaswag.jsonl        activity_label, ctx_a, ctx_b, endings, label
    wikitext2_raw_test.txt      wikitext.jsonl         page
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def lambada_row(row: Row) -> Row:
    """The passage; its last word is the target."""
    return {"text": row["text"]}


def piqa_row(row: Row) -> Row:
    """From {query, choices, gold}. The task's prompt adds "Question: " itself, so the source's own is taken off."""
    first, second = row["choices"]
    label = int(row["gold"])
    if label not in (0, 1):
        raise ValueError(f"gold is {label}, not 0 or 1")
    return {"goal": row["query"].removeprefix("Question: "), "sol1": first, "sol2": second, "label": label}


def hellaswag_row(row: Row) -> Row:
    """The official columns that the task's `process_docs` reads; the label is a string, as in the official data."""
    kept = {key: row[key] for key in ("activity_label", "ctx_a", "ctx_b", "endings")}
    return {**kept, "label": str(row["label"])}


def wikitext_pages(text: str) -> Iterator[Row]:
    """One row a page, in the tokenised form: the task takes ` @-@ ` and the like out itself.

    A page begins at every first-level heading, found by the rule of the public document-level data set.
    """
    page: list[str] = []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            if any(map(str.strip, page)):
                yield {"page": "\n".join(page)}
            page = []
        page.append(line)
    if any(map(str.strip, page)):
        yield {"page": "\n".join(page)}


def each_row(convert: Callable[[Row], Row]) -> Callable[[str], Iterator[Row]]:
    """A converter of a whole .jsonl text from a converter of one row. Errors name the line."""

    def rows(text: str) -> Iterator[Row]:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    yield convert(json.loads(line))
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"line {number}: {type(error).__name__}: {error}") from error

    return rows


TASKS: dict[str, tuple[str, Callable[[str], Iterator[Row]]]] = {
    "lambada_openai": ("lambada_openai_test.jsonl", each_row(lambada_row)),
    "piqa": ("piqa_valid.jsonl", each_row(piqa_row)),
    "hellaswag": ("hellaswag_val_1000.jsonl", each_row(hellaswag_row)),
    "wikitext": ("wikitext2_raw_test.txt", wikitext_pages),
}
"""Task name -> (source file, text of that file -> rows)."""


def prepare(source: Path, out: Path) -> dict[str, int]:
    """Write DIR/<task>.jsonl for every source file that exists; returns the number of rows of each task.

    Raises ValueError, naming the file and line, for a row that lacks what its task needs.
    """
    written = {}
    for task, (name, rows_of) in TASKS.items():
        path = next((folder / name for folder in (source, source / "eval") if (folder / name).is_file()), None)
        if path is None:
            continue
        try:
            rows = list(rows_of(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        out.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
        written[task] = len(rows)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="DIR")
    options = parser.parse_args()
    try:
        written = prepare(options.source, options.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not written:
        print(f"error: {options.source} holds none of {', '.join(name for name, _ in TASKS.values())}", file=sys.stderr)
        return 2
    for task, rows in written.items():
        print(f"{rows:>6} rows  {options.out / task}.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
