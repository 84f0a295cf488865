"""What ships with the package: two small trained models and the texts to calibrate and evaluate them with.

    models        mamba1-nano, mamba2-nano: complete transformers-layout folders, float16, about 9 MB each
    calibration   about 1 MB: half WikiText-2, half English novels, from the training texts of the models
    evaluation    wikitext2_sample.txt, novels_sample.txt, lambada_openai.jsonl (500 of 5,153 rows)

LICENSES.md names the origin and licence of every file. `benchmarks/make_bundled.py` writes them all.
"""

from pathlib import Path

from quamba.errors import DataError

_HERE = Path(__file__).resolve().parent

MODELS: tuple[str, ...] = ("mamba1-nano", "mamba2-nano")
"""The names of the bundled models, accepted wherever a model is."""

SEPARATOR = "\n<|endoftext|>\n"
"""What stands between two excerpts in the calibration text."""


def model_path(name: str) -> Path:
    """The folder of a bundled model. Raises DataError for a name that isn't in `MODELS`."""
    if name not in MODELS:
        raise DataError(f"no bundled model is called {name!r}; there are {', '.join(MODELS)}")
    return _HERE / name


def calibration_text() -> str:
    """Excerpts of about 4,000 characters, novels and WikiText-2 in turn, with `SEPARATOR` between."""
    return (_HERE / "calibration.txt").read_text(encoding="utf-8")


def evaluation_dir() -> Path:
    """The folder of the evaluation samples. A `<task>.jsonl` has the columns that lm-eval's task of that name reads."""
    return _HERE / "eval"


def sample(name: str) -> Path:
    """The evaluation sample of this file name, with or without its suffix: `sample("novels_sample")`.

    Raises DataError, listing what there is.
    """
    files = sorted(path for path in evaluation_dir().iterdir() if path.is_file())
    for path in files:
        if name in (path.name, path.stem):
            return path
    raise DataError(f"no bundled sample is called {name!r}; there are {', '.join(path.stem for path in files)}")
