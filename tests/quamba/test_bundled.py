import json
from pathlib import Path

import pytest

from quamba import bundled
from quamba.errors import DataError

FOLDER = Path(bundled.__file__).parent
FILES = sorted(
    p for p in FOLDER.rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"} and p.name != "LICENSES.md"
)
SAMPLES = ("novels_sample", "wikitext2_sample")


@pytest.mark.parametrize("name", bundled.MODELS)
def test_a_model_folder_is_complete(name: str) -> None:
    folder = bundled.model_path(name)
    assert {p.name for p in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"


def test_the_two_models_share_a_tokenizer() -> None:
    first, second = (bundled.model_path(name) / "tokenizer.json" for name in bundled.MODELS)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_file_is_small_and_has_its_licence_listed(path: Path) -> None:
    assert 0 < path.stat().st_size < 10_000_000
    assert f"`{path.relative_to(FOLDER).as_posix()}`" in (FOLDER / "LICENSES.md").read_text()


def test_calibration_is_a_megabyte_of_both_kinds_of_text() -> None:
    text = bundled.calibration_text()
    assert 1_000_000 <= len(text.encode()) <= 1_200_000
    excerpts = text.split(bundled.SEPARATOR)
    assert len(excerpts) == 250
    novels, wikitext = (sum(map(len, excerpts[kind::2])) / len(text) for kind in (0, 1))
    assert novels == pytest.approx(0.5, abs=0.1)
    assert wikitext == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", SAMPLES)
def test_no_200_characters_of_a_sample_are_calibrated_on(name: str) -> None:
    # Any run of 200 characters holds a whole block of 100 that starts at a multiple of 100.
    calibration = bundled.calibration_text()
    sample = bundled.sample(name).read_text(encoding="utf-8")
    blocks = (sample[i : i + 100] for i in range(0, len(sample), 100))
    assert [block for block in blocks if len(block) == 100 and block in calibration] == []


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_long_enough_to_measure_on(name: str) -> None:
    assert 100_000 <= bundled.sample(name).stat().st_size <= 200_000


def test_lambada_rows_are_passages_of_several_words() -> None:
    rows = [json.loads(line) for line in bundled.sample("lambada_openai").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 500
    assert all(row.keys() == {"text"} and len(row["text"].split(" ")) > 10 for row in rows)


def test_a_sample_is_found_with_and_without_suffix() -> None:
    assert (
        bundled.sample("novels_sample.txt")
        == bundled.sample("novels_sample")
        == bundled.evaluation_dir() / "novels_sample.txt"
    )


@pytest.mark.parametrize("find", [bundled.model_path, bundled.sample])
def test_an_unknown_name_is_answered_with_the_known_ones(find) -> None:
    known = bundled.MODELS if find is bundled.model_path else ("lambada_openai", *SAMPLES)
    with pytest.raises(DataError, match="'mamba3-nano'") as caught:
        find("mamba3-nano")
    assert all(name in str(caught.value) for name in known)
