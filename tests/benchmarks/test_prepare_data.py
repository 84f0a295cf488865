import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "prepare_data.py"

PIQA = {"query": "Question: How do I cool tea?", "choices": ["Wait.", "Boil it."], "gold": 0}
HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "endings": ["sings.", "starts pulling up roofing.", "sleeps.", "swims."],
    "label": 1,
    "source_id": "activitynet~v_1",
}
WIKITEXT = "\n".join(
    [
        " ",
        " = First page = ",
        " ",
        " A @-@ b . ",
        " = = Section = = ",
        " ",
        " c , d ",
        " ",
        " = Second = ",
        " ",
        " e ",
        "",
    ]
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_task_gets_the_columns_it_reads(script: ModuleType, tmp_path: Path) -> None:
    source, out = tmp_path / "data", tmp_path / "tasks"
    (source / "eval").mkdir(parents=True)
    (source / "lambada_openai_test.jsonl").write_text(jsonl({"text": "I don\u2019t\u2028know why"}))
    (source / "eval" / "piqa_valid.jsonl").write_text(jsonl(PIQA, {**PIQA, "query": "dresser", "gold": 1}))
    (source / "eval" / "hellaswag_val_1000.jsonl").write_text(jsonl(HELLASWAG))
    (source / "eval" / "wikitext2_raw_test.txt").write_text(WIKITEXT)

    assert script.prepare(source, out) == {"lambada_openai": 1, "piqa": 2, "hellaswag": 1, "wikitext": 2}

    assert json.loads((out / "lambada_openai.jsonl").read_text(encoding="utf-8")) == {
        "text": "I don\u2019t\u2028know why"
    }
    assert read(out / "piqa.jsonl") == [
        {"goal": "How do I cool tea?", "sol1": "Wait.", "sol2": "Boil it.", "label": 0},
        {"goal": "dresser", "sol1": "Wait.", "sol2": "Boil it.", "label": 1},
    ]
    assert read(out / "hellaswag.jsonl") == [
        {
            "activity_label": "Roof shingle removal",
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "endings": HELLASWAG["endings"],
            "label": "1",
        }
    ]


def test_wikitext_pages_are_whole_and_in_the_original_form(script: ModuleType) -> None:
    pages = [row["page"] for row in script.wikitext_pages(WIKITEXT)]
    assert pages == [
        " = First page = \n \n A @-@ b . \n = = Section = = \n \n c , d \n ",
        " = Second = \n \n e \n",
    ]


def test_only_the_leading_question_is_taken_off(script: ModuleType) -> None:
    assert script.piqa_row({**PIQA, "query": "Question: Question: x"})["goal"] == "Question: x"
    assert script.piqa_row({**PIQA, "query": "The Question: x"})["goal"] == "The Question: x"


@pytest.mark.parametrize("bad", [{"query": "x", "gold": 0}, {**PIQA, "gold": 2}, {**PIQA, "choices": ["one"]}])
def test_a_bad_row_is_named_and_nothing_is_written(script: ModuleType, tmp_path: Path, bad: dict) -> None:
    (tmp_path / "piqa_valid.jsonl").write_text(jsonl(PIQA, bad))
    with pytest.raises(ValueError, match=r"piqa_valid\.jsonl: line 2"):
        script.prepare(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_any_source_is_an_error(script: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["prepare_data.py", str(tmp_path), str(tmp_path / "out")])
    assert script.main() == 2
    assert "lambada_openai_test.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
