"""transformers' Auto classes and pipelines, in every order of imports."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import quamba
from quamba import QuambaConfig, QuambaLMHeadModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("auto") / "nano"
    quamba.quantize("mamba1-nano", "w8a8", out=out, samples=2, seq_len=64)
    return out


def test_auto_classes_and_pipeline(folder):
    config, model = AutoConfig.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(config, QuambaConfig) and isinstance(model, QuambaLMHeadModel)
    assert config.plan == model.config.plan and not config.plan.is_float
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.padding_side == "left"
    prompts = ["The old man", "A day in the life of"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**batch, max_new_tokens=5, do_sample=False)
    expected = tokenizer.batch_decode(out, skip_special_tokens=True)
    write = pipeline("text-generation", model=str(folder))
    found = [row[0]["generated_text"] for row in write(prompts, max_new_tokens=5, do_sample=False, batch_size=2)]
    assert found == expected
    assert all(text.startswith(prompt) for text, prompt in zip(found, prompts, strict=True))


def test_copies_compute_the_same(folder):
    model, ids = QuambaLMHeadModel.from_pretrained(folder), torch.arange(1, 20)[None]
    expected = model(ids).logits
    assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, expected)


@pytest.mark.parametrize(
    "imports",
    [
        "import quamba; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import quamba",
        "import transformers; import quamba; from transformers import AutoModelForCausalLM",
        "from quamba import QuambaLMHeadModel; from transformers import AutoModelForCausalLM",
        "import quamba, importlib; importlib.reload(quamba); from transformers import AutoModelForCausalLM",
    ],
)
def test_any_order_of_imports(folder, imports):
    script = f"{imports}; print(type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "QuambaLMHeadModel", done.stderr
