"""Every way in which a model folder can be wrong: one line that names the culprit, exit code 1, nothing on disk."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from quamba.cli import main
from quamba.errors import CheckpointError
from quamba.formats import load_model


def edit_json(path, **changes):
    data = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (data | changes).items() if value is not ...}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def tensors(change):
    return lambda folder: edit_tensors(folder, change)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lying_header(folder):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**82]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def overlapping(folder):
    spans = {"a": [0, 8], "b": [4, 12]}
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": span} for name, span in spans.items()}
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 12)


def as_index(content):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_bytes(content)

    return damage


def index(**files):
    return as_index(json.dumps({"weight_map": files}).encode())


def evil_index(folder):
    save_file({"backbone.norm_f.weight": torch.zeros(1)}, folder.parent / "evil.safetensors")
    index(**{"backbone.norm_f.weight": "../evil.safetensors"})(folder)


class Payload:
    def __reduce__(self):
        return (print, ("this must never run",))


def as_bin(content, legacy=False):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        path = folder / "pytorch_model.bin"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)

    return damage


def nan(t):
    t["backbone.layers.1.mixer.x_proj.weight"][3, 4] = torch.nan


def infinite(t):
    t["backbone.layers.0.norm.weight"][0] = -torch.inf


NAME = "backbone.layers.0.mixer.D"
DAMAGES = {
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "has no config.json"),
    "no config.json": (lambda f: (f / "config.json").unlink(), "tiny has no config.json"),
    "config is not JSON": (write("config.json", b"{nope"), "can't read .*config.json: Expecting"),
    "config is not text": (write("config.json", b"\xff\xfe\x00"), "can't read .*config.json"),
    "config is a list": (write("config.json", b"[]"), "config.json is not a JSON object"),
    "config is bottomless": (write("config.json", b"[" * 10**6), "can't read .*config.json"),
    "no architecture": (write("config.json", b"{}"), "isn't supported.*supported: Mamba1"),
    "another architecture": (
        write("config.json", b'{"model_type": "llama", "hidden_size": 32}'),
        r"config.json .*isn't supported \(llama\); supported: Mamba1",
    ),
    "a later family of transformers": (
        write("config.json", b'{"model_type": "mamba3"}'),
        r"isn't supported \(mamba3\)",
    ),
    "a later family of mamba-ssm": (
        config(ssm_cfg={"layer": "Mamba3"}),
        "layers are Mamba3; this version reads Mamba1 and Mamba2",
    ),
    "Mamba1's weights called Mamba2": (
        config(ssm_cfg={"layer": "Mamba2", "headdim": 8}),
        "by the config ssm_cfg.layer = 'mamba2', by backbone.layers.0.mixer 'mamba1'",
    ),
    "hybrid": (config(attn_layer_idx=[1]), r"attn_layer_idx = \[1\]; this version reads"),
    "MLP": (config(d_intermediate=64), "1 tensor is missing: .*mlp.fc1.weight"),
    "layer norm": (config(rms_norm=False), "rms_norm = False"),
    "size in words": (config(d_model="wide"), "by the config d_model = 'wide', by the embedding 32"),
    "negative size": (config(d_model=-32), "by the config d_model = -32, by the embedding 32"),
    "state size in words": (config(ssm_cfg={"d_state": "16"}), "by the config ssm_cfg.d_state = '16', by .*A_log 16"),
    "padding by 0": (config(vocab_size=4090, pad_vocab_size_multiple=0), "a multiple of 0 is no size"),
    "no layers": (config(n_layer=0), "by the config n_layer = 0, by the number of blocks 2"),
    "layers in words": (config(n_layer="two"), "n_layer = 'two', by the number of blocks 2"),
    "more layers than stored": (config(n_layer=3), "n_layer = 3, by the number of blocks 2"),
    "fewer layers than stored": (config(n_layer=1), "n_layer = 1, by the number of blocks 2"),
    "another width": (config(d_model=48), "d_model = 48, by the embedding 32"),
    "another vocabulary": (config(vocab_size=80), "vocab_size = 80, by the embedding 4096"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "tiny holds no weights: expected model.safetensors"),
    "truncated safetensors": (truncate, r"model.safetensors is damaged .*\(truncated\?\)"),
    "empty safetensors": (write("model.safetensors", b""), "model.safetensors is damaged"),
    "garbage": (write("model.safetensors", bytes(range(256)) * 8), "model.safetensors is damaged.*header claims"),
    "garbage header": (write("model.safetensors", (9).to_bytes(8, "little") + b"\xffnot JSON"), "header is not JSON"),
    "huge sizes": (lying_header, "model.safetensors is damaged"),
    "overlapping tensors": (overlapping, "the bytes of b overlap"),
    "missing tensor": (tensors(lambda t: t.pop(NAME)), f"1 tensor is missing: {NAME}"),
    "missing embedding": (
        tensors(lambda t: t.pop("backbone.embedding.weight")),
        "1 tensor is missing: backbone.embedding.weight",
    ),
    "extra tensor in a block": (
        tensors(lambda t: t.update({"backbone.layers.1.mixer.extra": torch.zeros(2)})),
        "1 tensor is not of this architecture: backbone.layers.1.mixer.extra",
    ),
    "missing block": (
        tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith("backbone.layers.0.")]),
        "block 0 has none, block 1 has",
    ),
    "wrong shape": (tensors(lambda t: t.update({NAME: torch.zeros(63)})), rf"{NAME} has shape \[63\].*\[64\]"),
    "transposed": (
        tensors(lambda t: t.update({NAME[:-1] + "x_proj.weight": torch.zeros(64, 34)})),
        r"x_proj.weight has shape \[64, 34\].*\[34, 64\]",
    ),
    "integers for floats": (
        tensors(lambda t: t.update({NAME: torch.zeros(64, dtype=torch.int8)})),
        f"{NAME} is stored as torch.int8; expected torch.float32",
    ),
    "integer embedding": (
        tensors(lambda t: t.update({"backbone.embedding.weight": torch.zeros(4096, 32, dtype=torch.int64)})),
        "backbone.embedding.weight is stored as torch.int64",
    ),
    "NaN": (tensors(nan), "tensor backbone.layers.1.mixer.x_proj.weight holds NaN or infinite"),
    "infinite": (tensors(infinite), "tensor backbone.layers.0.norm.weight holds NaN or infinite"),
    "tied, with a head of its own": (
        tensors(lambda t: t.update({"lm_head.weight": torch.zeros(64, 32)})),
        "tied, but lm_head.weight differs.*set tie_embeddings",
    ),
    "index to a parent folder": (evil_index, r"names the file '../evil.safetensors': only plain names"),
    "index to an absolute path": (index(a="/etc/passwd.bin"), "names the file '/etc/passwd.bin'"),
    "index to a script": (index(a="run.py"), "names the file 'run.py'"),
    "index to nothing": (
        index(a="absent.safetensors"),
        "lacks the file absent.safetensors that model.safetensors.index",
    ),
    "index of numbers": (index(a=1), "no usable weight_map"),
    "empty index": (index(), "no usable weight_map"),
    "index without map": (as_index(b"{}"), "no usable weight_map"),
    "pickled code": (as_bin({"a": Payload()}), "pytorch_model.bin can't be read as a file of weights"),
    "bare pickle": (as_bin(pickle.dumps(Payload())), "pytorch_model.bin can't be read as a file of weights"),
    "pickled numbers": (as_bin({"a": "b"}), "pytorch_model.bin: a is no plain tensor but str"),
    "a pickled tensor": (as_bin(torch.zeros(3)), "pytorch_model.bin holds something else than a dict of tensors"),
    "empty bin": (as_bin(b""), "pytorch_model.bin can't be read as a file of weights"),
    "garbage bin": (as_bin(b"PK\x03\x04" + bytes(200)), "pytorch_model.bin can't be read as a file of weights"),
    "text as bin": (as_bin(b"version https://git-lfs.github.com/spec/v1\n"), "pytorch_model.bin is a git-lfs pointer"),
}


@pytest.fixture
def calibration(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 20)
    return path


@pytest.fixture
def work(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def refuse(arguments, why):
    """Run the command line; it ends with one line, exit code 1, no traceback."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.stderr.splitlines() if not line.startswith("running on ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert re.search(why, lines[0]), lines[0]
    assert "Traceback" not in result.output
    return lines[0]


@pytest.mark.parametrize(("damage", "why"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_folder_is_refused_and_leaves_nothing(tiny, calibration, work, capfd, damage, why):
    folder = tiny(files="safetensors", tokenizer=True)
    damage(folder)
    with pytest.raises(CheckpointError, match=why):
        load_model(str(folder))
    options = ["--calibration", str(calibration), "--samples", "2", "--seq-len", "8"]
    before = sorted(p.name for p in folder.iterdir())
    refuse(["quantize", str(folder), "--w8a8", "-o", "new/parents/out", *options], why)
    assert list(work.iterdir()) == []
    assert sorted(p.name for p in folder.iterdir()) == before
    assert "must never run" not in capfd.readouterr().out


PLACES = {
    "absolute path": ("/nonexistent/model", "no such folder: /nonexistent/model"),
    "relative path": ("./nonexistent", "no such folder: ./nonexistent"),
    "deep path": ("a/b/c", "no such folder: a/b/c"),
    "neither folder nor name": ("mamba1-nanno", "'mamba1-nanno' is no folder here, no bundled model .*mamba1-nano"),
    "odd characters": ("what is this?", "no such folder"),
    "no hub id": ("a--b/c", "no hub id either: a--b/c"),
}


@pytest.mark.parametrize("command", ["quantize", "generate", "inspect"])
@pytest.mark.parametrize(("model", "why"), PLACES.values(), ids=PLACES.keys())
def test_a_model_that_is_not_there(work, command, model, why):
    more = {"quantize": ["--w8a8"], "generate": ["--prompt", "x"], "inspect": []}[command]
    refuse([command, model, *more], why)
    assert list(work.iterdir()) == []


def test_a_file_in_place_of_a_folder(tiny, work):
    folder = tiny(files="safetensors")
    why = "model.safetensors is a file; give the folder that holds config.json"
    refuse(["inspect", str(folder / "model.safetensors")], why)
    assert list(work.iterdir()) == []


def test_a_quantized_model_is_not_quantized_again(tiny_artifact, calibration, work):
    refuse(
        ["quantize", str(tiny_artifact), "--w8a8", "--tokenizer", "mamba1-nano", "--calibration", str(calibration)]
        + ["--seq-len", "8"],
        "tiny-w8a8 is quantized already; give the float model",
    )
    assert list(work.iterdir()) == []


def test_nan_weights_are_found_in_the_last_component_too(tiny, calibration, work):
    folder = tiny(files="safetensors", tokenizer=True)
    edit_tensors(folder, lambda t: t["backbone.norm_f.weight"].fill_(torch.nan))
    options = ["--calibration", str(calibration), "--samples", "2", "--seq-len", "8"]
    refuse(["quantize", str(folder), "--w8a8", *options], "backbone.norm_f.weight holds NaN")
    assert list(work.iterdir()) == []
