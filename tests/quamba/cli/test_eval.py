import json
import os
import shutil

import pytest
from click.testing import CliRunner

from quamba.cli import main
from tests.quamba.evaluation.local_tasks import write_tasks


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*args):
    return CliRunner().invoke(main, ["eval", *map(str, args)])


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("The old man went to the window and looked at the sea. " * 12)
    return file


def test_it_asks_what_to_measure(tiny_folder):
    result = run(tiny_folder)
    assert result.exit_code == 2
    assert "--task" in result.output and "--perplexity" in result.output and "--against" in result.output


def test_without_a_model_here_it_says_what_to_type(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    result = run("--perplexity", text)
    assert result.exit_code == 2
    assert "quamba quantize mamba1-nano --w8a8" in result.output


def test_it_takes_the_current_folder_or_the_newest_artifact_in_it(tmp_path, monkeypatch, text, tiny_artifact):
    for age, name in ((100, "new"), (900, "old")):
        shutil.copytree(tiny_artifact, tmp_path / name)
        config = tmp_path / name / "config.json"
        os.utime(config, (config.stat().st_mtime - age,) * 2)
    shutil.copytree(tiny_artifact, tmp_path / "unfinished.partial")
    monkeypatch.chdir(tmp_path)
    first = run("--perplexity", text, "--tokenizer", "mamba1-nano")
    assert first.exit_code == 0, first.output
    assert "new" in first.stderr.splitlines()[0] and "newest" in first.stderr.splitlines()[0]
    monkeypatch.chdir(tmp_path / "old")
    here = run("--perplexity", text, "--tokenizer", "mamba1-nano")
    assert here.exit_code == 0 and "current folder" in here.stderr.splitlines()[0]


def test_the_bundled_mamba2(text):
    result = run("mamba2-nano", "--perplexity", text, "--context", "16")
    assert result.exit_code == 0, result.output
    assert "mamba2-nano" in result.output


def test_two_models_side_by_side(tmp_path, text, tiny_artifact, tiny_folder):
    out = tmp_path / "results.json"
    options = ("--against", tiny_folder, "--perplexity", text, "--context", 64, "--tokenizer", "mamba1-nano")
    result = run(tiny_artifact, *options, "--output", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    quantized, reference = (model["texts"]["words.txt"] for model in found["models"])
    assert quantized["tokens"] == reference["tokens"] == quantized["divergence"]["tokens"]
    assert 0 < quantized["divergence"]["mean_kl"] < 0.5
    assert quantized["perplexity"] == pytest.approx(reference["perplexity"], rel=0.2)
    assert "difference" in result.stdout and "top-1" in result.stdout


@pytest.mark.parametrize("missing", ["model", "text"])
def test_what_is_missing_is_named_without_a_traceback(tmp_path, text, tiny_folder, missing):
    gone = tmp_path / "gone"
    result = run(gone, "--perplexity", text) if missing == "model" else run(tiny_folder, "--perplexity", gone)
    assert result.exit_code == 1
    assert str(gone) in result.output and "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def evaluated(*args):
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


def test_several_models_and_tasks_make_one_table(tmp_path, text, tiny_artifact, tiny_folder):
    tasks = write_tasks(tmp_path / "tasks")
    other = tmp_path / "other"
    shutil.copytree(tiny_artifact, other)
    options = ("--include", tasks, "--data", tasks, "--tokenizer", "mamba1-nano", "--perplexity", text)
    names = ("--task", "tiny_loglikelihood,tiny_choice", "--task", "tiny_generation", "--against", tiny_folder)
    result = evaluated(tiny_artifact, other, *options, *names, "--output", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert [model["name"] for model in found["models"]] == ["tiny-w8a8", "other", "tiny"]
    assert found["reference"] == "tiny"
    first, second, reference = found["models"]
    assert [task["task"] for task in first["tasks"]] == ["tiny_loglikelihood", "tiny_choice", "tiny_generation"]
    assert first["tasks"] == second["tasks"] and first["texts"] == second["texts"]  # the same model twice
    change = first["tasks"][0]["metrics"]["loglikelihood_per_word"]["difference"]
    assert 0 < change["p"] <= 1 and change["stderr"] > 0
    assert "difference" not in reference["tasks"][0]["metrics"]["acc"]
    lines = result.stdout.splitlines()
    assert sum("other" in line for line in lines) == sum(len(task["metrics"]) for task in first["tasks"]) + 4
    assert sum(line.lstrip().startswith("model") for line in lines) == 1


def test_json_is_all_that_is_printed(text, tiny_folder, tmp_path):
    result = evaluated(tiny_folder, "--perplexity", text, "--json", "--output", tmp_path / "out.json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "out.json").read_text())


def test_results_go_into_lm_evals_files(tmp_path, tiny_artifact):
    tasks = write_tasks(tmp_path / "tasks")
    options = ("--include", tasks, "--data", tasks, "--tokenizer", "mamba1-nano", "--task", "tiny_loglikelihood")
    result = evaluated(tiny_artifact, *options, "--lm-eval-output", tmp_path / "files")
    (file,) = (tmp_path / "files").rglob("results_*.json")
    assert json.loads(file.read_text())["model_name"] == str(tiny_artifact)
    assert str(file) in result.stderr


def test_a_killed_run_goes_on(tmp_path, monkeypatch, text, tiny_folder):
    from quamba import QuambaLMHeadModel

    arguments = (tiny_folder, "--perplexity", text, "--context", "16", "--json")
    whole = evaluated(*arguments)
    forward, calls = QuambaLMHeadModel.forward, []

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(QuambaLMHeadModel, "forward", dies)
    killed = run(*arguments)
    assert killed.exit_code == 130 and "type the same command again to resume" in killed.stderr
    calls[:] = [1, 1]
    again = evaluated(*arguments)
    assert "going on with 1 answers" in again.stderr and again.stdout == whole.stdout
    resumed = len(calls) - 2
    assert not list((tmp_path / "cache" / "quamba" / "eval").iterdir())
    calls[:] = [1, 1]
    evaluated(*arguments, "--no-resume")
    assert len(calls) - 2 == resumed + 1


def test_models_that_make_other_tokens_are_not_compared(tmp_path, text, tiny_artifact, tiny_folder):
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(words))
    result = run(other, "--against", tiny_folder, "--perplexity", text)
    assert result.exit_code == 1 and "different tokenizers" in result.stderr


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["mamba1-nano", "mamba1-nano", "--perplexity", "novels"], "named twice"),
        (["mamba1-nano", "--perplexity", "novels", "--include", "."], "belong to --task"),
        (["mamba1-nano", "--perplexity", "novels", "--lm-eval-output", "x"], "belong to --task"),
        (["mamba1-nano", "--task", "lambada_openai", "--include", "gone"], "does not exist"),
    ],
)
def test_what_makes_no_sense_is_refused(words, why):
    result = run(*words)
    assert result.exit_code == 2 and why in result.stderr


def test_a_mistyped_task_is_refused_before_any_model_is_loaded(monkeypatch):
    def load(*args, **options):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("quamba.model.QuambaLMHeadModel.from_pretrained", load)
    result = run("mamba1-nano", "--task", "lambada_opnai", "--data", "bundled")
    assert result.exit_code == 1 and "did you mean 'lambada_openai'" in result.stderr
