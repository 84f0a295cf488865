import json
import os

from quamba.evaluation.kept import Answers, digest, run_folder


def test_answers_outlive_the_process(tmp_path):
    first = Answers(tmp_path / "run")
    assert first.left == 0 and first.get("a") is None
    first.put("a", [-1.25, True])
    first.of("m/").put("a", 0.1 + 0.2)
    # Every put is on disk at once: nothing was closed.
    again = Answers(tmp_path / "run")
    assert again.left == 2
    assert again.get("a") == [-1.25, True] and again.of("m/").get("a") == 0.1 + 0.2
    assert again.of("n/").get("a") is None
    again.discard()
    assert not (tmp_path / "run").exists()


def test_a_torn_line_is_no_answer_and_spoils_no_other(tmp_path):
    first = Answers(tmp_path)
    first.put("a", 1)
    first.put("b", "long" * 100)
    first.close()
    file = tmp_path / "0.jsonl"
    file.write_bytes(file.read_bytes()[:-150])
    second = Answers(tmp_path)
    assert (second.get("a"), second.get("b")) == (1, None)
    second.put("c", 3)
    second.close()
    third = Answers(tmp_path)
    assert (third.get("a"), third.get("b"), third.get("c")) == (1, None, 3)


def test_every_process_writes_its_own_file_and_reads_all(tmp_path):
    for rank in (0, 1):
        part = Answers(tmp_path, rank)
        part.put(f"of {rank}", rank)
        part.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.jsonl", "1.jsonl"]
    whole = Answers(tmp_path, 1)
    assert (whole.get("of 0"), whole.get("of 1")) == (0, 1)


def test_nothing_kept_leaves_no_folder(tmp_path):
    parts = [Answers(tmp_path / "run", rank) for rank in (0, 1)]
    parts[0].close()
    assert (tmp_path / "run").is_dir()
    parts[1].close()
    assert not (tmp_path / "run").exists()
    again = Answers(tmp_path / "run")
    again.put("a", 1)
    again.close()
    for part in (Answers(tmp_path / "run", 1), Answers(tmp_path / "run")):
        part.close()
    assert Answers(tmp_path / "run").get("a") == 1


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nowhere = Answers()
    nowhere.put("a", 1)
    nowhere.of("b").put("a", 1)
    assert nowhere.get("a") is None
    nowhere.discard()
    assert list(tmp_path.iterdir()) == []


def test_what_the_answers_depend_on_chooses_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models = {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"123")
        models[name] = tmp_path / name
    folder = run_folder(models, {"dtype": "auto"})
    assert folder == run_folder(models, {"dtype": "auto"})
    assert folder.parent == tmp_path / "cache" / "quamba" / "eval"
    assert not folder.exists()
    others = [run_folder(models, {"dtype": "float32"}), run_folder({"a": models["a"]}, {"dtype": "auto"})]
    (models["a"] / "README.md").write_text("a card is not the model")
    assert run_folder(models, {"dtype": "auto"}) == folder
    os.utime(models["a"] / "model.safetensors", (1, 1))
    others.append(run_folder(models, {"dtype": "auto"}))
    assert len({folder, *others}) == 4


def test_digests_are_of_plain_data():
    assert digest("a", {"b": 1, "c": [1, 2]}) == digest("a", json.loads('{"c": [1, 2], "b": 1}'))
    assert digest("a", "b") != digest("ab")
