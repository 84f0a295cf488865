"""transformers' Auto classes and pipelines, in every order of imports."""

import copy
import importlib.metadata
import pickle
import re
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MambaConfig, pipeline

import quamba
from quamba import QuambaConfig, QuambaLMHeadModel
from quamba.errors import QuambaError

ROOT = Path(__file__).resolve().parents[2]


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
        "from quamba.inplace.quantizer import QuambaHfQuantizer; from transformers import AutoModelForCausalLM",
    ],
)
def test_any_order_of_imports(folder, forks, imports):
    script = f"{imports}; print(type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__name__)\n"
    script += (
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING; assert 'quamba' in AUTO_QUANTIZER_MAPPING"
    )
    done = forks.run("-c", script)
    assert (done.stdout.strip(), done.returncode) == ("QuambaLMHeadModel", 0), done.stderr


REIMPORT = """
import importlib, sys
import quamba

def check():
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
    quamba.auto.register_lazily(); quamba.auto.register_lazily()
    model = AutoModelForCausalLM.from_pretrained({folder!r})
    assert type(model) is quamba.QuambaLMHeadModel, type(model)
    assert type(AutoConfig.from_pretrained({folder!r})) is quamba.QuambaConfig
    from quamba.inplace.quantizer import QuambaHfQuantizer
    assert AUTO_QUANTIZER_MAPPING["quamba"] is QuambaHfQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["quamba"] is quamba.QuambaQuantizationConfig
    assert sum(getattr(finder, "of_quamba", False) for finder in sys.meta_path) == 1

importlib.reload(quamba)
importlib.reload(quamba.auto)  # before transformers
check()
importlib.reload(quamba)
importlib.reload(quamba.auto)
check()
for name in [name for name in sys.modules if name.split(".")[0] == "quamba"]:
    del sys.modules[name]
import quamba  # anew, and transformers knows the old one
check()
"""


def test_registered_once_whatever_is_imported_again(folder, forks):
    script = REIMPORT.format(folder=str(folder))
    done = forks.run("-c", script)
    assert done.returncode == 0, done.stderr


def test_somebody_else_s_method_of_that_name_stays(monkeypatch, caplog):
    from transformers.quantizers import auto

    from quamba.auto import register

    stranger = auto.AUTO_QUANTIZER_MAPPING["gptq"]
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "quamba", stranger)
    with caplog.at_level("WARNING", logger="quamba"):
        register()
    assert auto.AUTO_QUANTIZER_MAPPING["quamba"] is stranger
    assert "has registered the quantization method 'quamba'" in caplog.text


def test_a_random_model_from_a_config(folder):
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(QuambaError, match="can't be started at random: load its files with from_pretrained"):
        AutoModelForCausalLM.from_config(config)
    config.quantization_config = None
    for dtype in (torch.float32, torch.float16):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        assert isinstance(model, QuambaLMHeadModel) and model.dtype == dtype
        mixer = model.backbone.layers[0].mixer
        assert mixer.A_log.dtype == mixer.dt_proj.bias.dtype == torch.float32 and mixer.conv1d.bias.dtype == dtype
        assert torch.isfinite(model(torch.arange(1, 9)[None]).logits).all()


def test_dtype_and_low_cpu_mem_usage(folder):
    ids = torch.arange(1, 20)[None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert model.dtype == dtype and model.config.dtype == dtype
        assert model.backbone.layers[0].mixer.in_proj.weight_scale.dtype == torch.float32
        named = AutoModelForCausalLM.from_pretrained(folder, dtype=str(dtype).removeprefix("torch."))
        lean = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=True)
        assert torch.equal(named(ids).logits, model(ids).logits) and torch.equal(lean(ids).logits, model(ids).logits)
    stored = AutoModelForCausalLM.from_pretrained(folder)
    assert stored.dtype == AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float16
    with pytest.raises(QuambaError, match="choose float32, float16, bfloat16"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def test_device_map(folder):
    ids = torch.arange(1, 20)[None]
    expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    one = {"backbone": "cpu", "lm_head": "cpu"}
    for device_map in ("cpu", torch.device("cpu"), {"": "cpu"}, one):
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
        assert model.hf_device_map == {"": torch.device("cpu")}
        assert torch.equal(model(ids).logits, expected)
    auto = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    assert auto.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(QuambaError, match="device_map can't split a model over cpu, disk: a model is loaded whole"):
        AutoModelForCausalLM.from_pretrained(folder, device_map={"backbone": "cpu", "lm_head": "disk"})
    with pytest.raises(QuambaError, match="can't take max_memory: a model is loaded whole, onto one device"):
        AutoModelForCausalLM.from_pretrained(folder, device_map="auto", max_memory={"cpu": "1GB"})


def test_pipeline_on_a_device(folder):
    for options in ({"device": "cpu"}, {"device_map": "cpu"}, {"model_kwargs": {"device_map": {"": "cpu"}}}):
        write = pipeline("text-generation", model=str(folder), **options)
        assert write.device.type == "cpu"
        text = write("The old man", max_new_tokens=3, do_sample=False, return_full_text=False)[0]["generated_text"]
        assert text


def test_config_settings(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, output_hidden_states=True)
    ids = torch.arange(1, 9)[None]
    assert len(model(ids).hidden_states) == model.config.num_hidden_layers + 1
    config = AutoConfig.from_pretrained(folder)
    config.return_dict = False
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder, config=config)(ids), tuple)
    other = AutoConfig.from_pretrained(folder)
    other.vocab_size += 8
    with pytest.raises(QuambaError, match="config= describes another model than the files"):
        AutoModelForCausalLM.from_pretrained(folder, config=other)
    with pytest.raises(QuambaError, match="config must be a QuambaConfig, not MambaConfig"):
        QuambaLMHeadModel.from_pretrained(folder, config=MambaConfig())


def test_loading_info_and_what_is_not_known(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, QuambaLMHeadModel) and not any(info.values())
    with pytest.raises(QuambaError, match="can't take subfolder"):
        QuambaLMHeadModel.from_pretrained(folder, subfolder="inner")
    with pytest.raises(TypeError, match="from_pretrained doesn't know load_in_8bit"):
        QuambaLMHeadModel.from_pretrained(folder, load_in_8bit=True)


@pytest.mark.parametrize("how", ["function", "method"])
def test_compiled_it_runs_as_it_is(folder, how):
    """Nothing is compiled: the recorded kernel calls are what a compiler would aim at."""
    torch.compiler.reset()
    model, ids = QuambaLMHeadModel.from_pretrained(folder), torch.arange(1, 12)[None]
    expected = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    compiled = model
    if how == "function":
        compiled = torch.compile(model)
    else:
        model.compile()
    assert torch.equal(compiled(ids).logits, expected[0])
    assert torch.equal(compiled.generate(ids, max_new_tokens=4, do_sample=False), expected[1])
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="quamba replays recorded kernel calls"):
        torch.compile(QuambaLMHeadModel.from_pretrained(folder), fullgraph=True)(ids)
    torch.compiler.reset()


def test_the_vocabulary_stays(folder):
    model = QuambaLMHeadModel.from_pretrained(folder)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.resize_token_embeddings(4096) is model.get_input_embeddings()
    with pytest.raises(QuambaError, match="resize transformers' float model, then quantize that"):
        model.resize_token_embeddings(4100)


def test_the_versions_that_are_documented_are_those_that_are_required():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    least = next(line for line in needed if line.startswith("transformers")).removeprefix("transformers>=")
    pinned = re.search(r"^transformers==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M)
    for page in ("README.md", "docs/hugging-face.md"):
        text = (ROOT / page).read_text()
        assert f"{least} or newer" in text and f"tested with {pinned[1].rsplit('.', 1)[0]}" in text
    assert Version(importlib.metadata.version("transformers")) >= Version(least)
