"""Safetensors headers: what a valid one says, and every way in which one can lie."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save, save_file

from quamba.errors import CheckpointError
from quamba.formats.headers import DTYPES, read_header
from quamba.formats.tensors import LiveTensors, TensorFiles


def craft(path, header, data=b"", length=None):
    """A safetensors file from its parts, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_header_agrees_with_the_safetensors_library(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b.c": torch.arange(4, dtype=torch.int8),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 7),
        "half": torch.randn(2, 2).half(),
        "bf": torch.randn(3).bfloat16(),
        "long": torch.arange(3),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "x"})
    entries, metadata = read_header(path)
    assert {name: (e.shape, e.dtype) for name, e in entries.items()} == {
        name: (tuple(t.shape), t.dtype) for name, t in tensors.items()
    }
    assert metadata == {"format": "pt", "note": "x"}
    files = TensorFiles(tmp_path)
    assert files.nbytes == sum(t.nbytes for t in tensors.values())
    read = files.read(["a", "scalar", "long"])
    assert list(read) == ["a", "scalar", "long"]
    assert all(torch.equal(read[name], tensors[name]) for name in read)
    with pytest.raises(CheckpointError, match="no tensor nothing"):
        files.read(["nothing"])


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_one_that_safetensors_writes(name, tmp_path):
    raw = save({"x": torch.zeros(2, dtype=DTYPES[name])})
    (tmp_path / "x.safetensors").write_bytes(raw)
    (found,) = read_header(tmp_path / "x.safetensors")[0].values()
    assert found.dtype == DTYPES[name]
    assert json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["x"]["dtype"] == name


LIES = {
    "nothing at all": (b"", b"", None),
    "a length beyond the file": (b"{}", b"", 1000),
    "a length of 2^63": (b"{}", b"", 2**63),
    "no JSON": (b"\xff\xfe\x00garbage", b"", None),
    "a list": ([1, 2], b"", None),
    "deep nesting": (b"[" * 100_000, b"", None),
    "a key twice": (b'{"a": %s, "a": %s}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), b"\0" * 4, None),
    "an entry without dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4, None),
    "an unknown dtype": ({"a": entry([1], 0, 4, "F31")}, b"\0" * 4, None),
    "an entry that is a list": ({"a": [1, 2]}, b"", None),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"\0" * 4, None),
    "a negative size": ({"a": entry([-1], 0, 4)}, b"\0" * 4, None),
    "a fractional size": ({"a": entry([1.0], 0, 4)}, b"\0" * 4, None),
    "a size in words": ({"a": entry(["1"], 0, 4)}, b"\0" * 4, None),
    "a true size": ({"a": entry([True], 0, 4)}, b"\0" * 4, None),
    "an end before the begin": ({"a": entry([1], 4, 0)}, b"\0" * 4, None),
    "a shape larger than its bytes": ({"a": entry([10**12, 10**12], 0, 4)}, b"\0" * 4, None),
    "a shape smaller than its bytes": ({"a": entry([1], 0, 8)}, b"\0" * 8, None),
    "two tensors on the same bytes": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12, None),
    "a gap": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12, None),
    "a gap in front": ({"a": entry([1], 4, 8)}, b"\0" * 8, None),
    "bytes missing at the end": ({"a": entry([2], 0, 8)}, b"\0" * 7, None),
    "bytes behind the end": ({"a": entry([2], 0, 8)}, b"\0" * 9, None),
    "huge offsets": ({"a": entry([2**60], 0, 2**62)}, b"\0" * 8, None),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", None),
    "metadata of a list": ({"__metadata__": []}, b"", None),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lying_header_is_refused_in_one_line(tmp_path, lie):
    header, data, length = lie
    path = craft(tmp_path / "model.safetensors", header, data, length)
    if header == b"" and length is None:
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged or no safetensors file") as caught:
        TensorFiles(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_every_truncation_of_a_real_file_is_refused(tmp_path):
    whole = save({"a": torch.randn(4, 4), "b": torch.arange(3)})
    path = tmp_path / "model.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            TensorFiles(tmp_path)
    path.write_bytes(whole)
    assert set(TensorFiles(tmp_path).entries) == {"a", "b"}


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="tensor b stands in two files"):
        TensorFiles(tmp_path)


def test_a_fingerprint_changes_with_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    before = TensorFiles(tmp_path).fingerprint()
    assert TensorFiles(tmp_path).fingerprint() == before
    save_file({"a": torch.zeros(4), "b": torch.zeros(1)}, path)
    assert TensorFiles(tmp_path).fingerprint() != before


def test_live_tensors_answer_like_files(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4, dtype=torch.int8)}
    save_file(tensors, tmp_path / "model.safetensors")
    live, files = LiveTensors(tensors), TensorFiles(tmp_path)
    assert live.nbytes == files.nbytes == 28
    assert {n: (e.shape, e.dtype) for n, e in live.entries.items()} == {
        n: (e.shape, e.dtype) for n, e in files.entries.items()
    }
    assert all(torch.equal(live.read(["a", "b"])[n], files.read(["a", "b"])[n]) for n in tensors)
    before = live.fingerprint()
    tensors["a"][0, 0] += 1  # the live weights changed
    assert live.fingerprint() != before
