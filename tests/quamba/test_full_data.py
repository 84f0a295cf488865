"""The whole LAMBADA file, where it lies beside the checkout (`../shared/data`). Minutes; `make test-slow`."""

import shutil
from pathlib import Path

import pytest

import quamba
from quamba import QuambaLMHeadModel
from quamba.evaluation import run_tasks
from quamba.formats import load_tokenizer

FILE = Path(__file__).parents[2].parent / "shared" / "data" / "eval" / "lambada_openai_test.jsonl"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not FILE.is_file(), reason=f"{FILE.name} is not beside the checkout")
def test_log_likelihood_of_the_last_word_is_within_half_a_percent_of_float(tmp_path):
    shutil.copy(FILE, tmp_path / "lambada_openai.jsonl")
    reference = QuambaLMHeadModel.from_pretrained("mamba1-nano", dtype="float32")
    quantized = quamba.quantize("mamba1-nano", "w8a8", dtype="float32")
    tokenizer = load_tokenizer("mamba1-nano")
    found = [
        run_tasks(m, tokenizer, ["lambada_openai"], data=tmp_path, batch_size=16)[0] for m in (quantized, reference)
    ]
    assert [task.samples for task in found] == [5153, 5153]
    after, before = (task.metrics["loglikelihood_per_word"].value for task in found)
    assert abs(after - before) < 0.005 * abs(before)
    assert found[0].logliks != found[1].logliks
