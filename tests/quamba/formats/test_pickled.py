"""Files that `torch.save` wrote, or that pretend to be: numbers among tensors, shards, code, bombs, impossible sizes."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import zipfile

import pytest
import torch

from quamba import QuambaLMHeadModel
from quamba.errors import CheckpointError
from quamba.formats.pickled import load_bin
from quamba.formats.tensors import TensorFiles


def write(path, content, **options):
    torch.save(content, path, **options)
    return path


def rezip(path, change):
    """The same archive, its entries passed through `change(name, data) -> [(ZipInfo, data), ...]`."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries:
            for info, content in change(name, data):
                archive.writestr(info, content)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_numbers_and_none_among_the_tensors(tmp_path, legacy):
    state = collections.OrderedDict(a=torch.arange(6.0).view(2, 3).T, b=0.125, c=None, d=3, e=torch.tensor(2.0), f=True)
    found = load_bin(write(tmp_path / "x.bin", state, _use_new_zipfile_serialization=not legacy))
    assert set(found) == {"a", "b", "d", "e", "f"}
    assert torch.equal(found["a"], state["a"])
    assert (found["b"].item(), found["d"].item(), found["f"].item()) == (0.125, 3.0, 1.0)
    assert found["b"].shape == () and found["b"].dtype == torch.float32


def test_a_state_dict_inside(tmp_path):
    found = load_bin(write(tmp_path / "x.bin", {"state_dict": {"a": torch.ones(2)}, "step": 3}))
    assert list(found) == ["a"]


def test_shards_with_an_index(tmp_path):
    for i in range(2):
        write(tmp_path / f"pytorch_model-{i}.bin", {f"t{i}": torch.full((3,), float(i))})
    index = {"weight_map": {f"t{i}": f"pytorch_model-{i}.bin" for i in range(2)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    files = TensorFiles(tmp_path)
    assert {name: tensor.tolist() for name, tensor in files.read(["t1", "t0"]).items()} == {
        "t0": [0.0] * 3,
        "t1": [1.0] * 3,
    }


@pytest.mark.parametrize(
    "content",
    [
        {"a": "text"},
        {"a": [torch.ones(1)]},
        {1: torch.ones(1)},
        [torch.ones(1)],
        {"a": torch.ones(2, 2).to_sparse()},
        {"a": {"b": torch.ones(1)}},
    ],
    ids=["text", "list", "number as name", "no dict", "sparse", "nested"],
)
def test_what_is_no_dict_of_tensors(tmp_path, content):
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        load_bin(write(tmp_path / "x.bin", content))


class Evil:
    def __reduce__(self):
        return (os.system, ("echo this must never run",))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_not_run(tmp_path, capfd, legacy):
    file = write(tmp_path / "x.bin", {"a": Evil()}, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"x\.bin can't be read as a file of weights: it holds more than weights"):
        load_bin(file)
    (tmp_path / "y.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"y\.bin can't be read as a file of weights"):
        load_bin(tmp_path / "y.bin")
    assert "must never run" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("shape", [(10**6, 10**6), (3, 1000), (2**62,)])
def test_tensors_that_claim_more_than_is_stored(tmp_path, shape):
    tensor = torch.ones(1).expand(shape)
    with pytest.raises(CheckpointError, match=r"x\.bin: a claims \[.*\] values and stores fewer"):
        load_bin(write(tmp_path / "x.bin", {"a": tensor}))


def bomb(name, data):
    info = zipfile.ZipInfo(name)
    if not name.endswith("data/0"):
        return [(info, data)]
    info.compress_type = zipfile.ZIP_DEFLATED
    return [(info, bytes(50_000_000))]


def test_a_zip_bomb_is_not_unfolded(tmp_path):
    file = rezip(write(tmp_path / "x.bin", {"a": torch.ones(4)}), bomb)
    assert file.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"x\.bin is compressed inside"):
        load_bin(file)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name(tmp_path):
    def twice(name, data):
        return [(zipfile.ZipInfo(name), data)] * (2 if name.endswith("data/0") else 1)

    with pytest.raises(CheckpointError, match=r"x\.bin has two entries of the same name"):
        load_bin(rezip(write(tmp_path / "x.bin", {"a": torch.ones(4)}), twice))


def test_entries_that_lie_on_top_of_each_other(tmp_path):
    """A directory that lists the same bytes many times: small on disk, large when read."""
    file = rezip(write(tmp_path / "x.bin", {"a": torch.ones(4000)}), lambda name, data: [(zipfile.ZipInfo(name), data)])
    assert load_bin(file)["a"].sum() == 4000
    data = file.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start, infos = archive.start_dir, archive.infolist()
    at = data.index(b"PK\x01\x02", start)
    entry = next(info for info in infos if info.filename.endswith("data/0"))
    spot = data.index(entry.filename.encode(), at) - 46
    record = data[spot : spot + 46 + len(entry.filename) + len(entry.extra)]
    copies = b"".join(
        record.replace(entry.filename.encode(), entry.filename[:-1].encode() + str(i).encode()) for i in range(2, 8)
    )
    end = data.rindex(b"PK\x05\x06")
    tail = bytearray(data[end:])
    count = len(infos) + 6
    tail[8:12] = count.to_bytes(2, "little") * 2
    tail[12:16] = (int.from_bytes(tail[12:16], "little") + len(copies)).to_bytes(4, "little")
    file.write_bytes(data[:end] + copies + bytes(tail))
    with pytest.raises(CheckpointError, match=r"x\.bin claims more bytes inside than it has: entries overlap"):
        load_bin(file)


def test_an_old_file_with_an_absurd_storage(tmp_path):
    """torch before 1.6: the pickle says how large a storage is. It says four petabytes here."""
    file = write(tmp_path / "x.bin", {"a": torch.ones(17)}, _use_new_zipfile_serialization=False)
    data = file.read_bytes()
    assert data.count(b"K\x11") >= 2  # the storage's and the tensor's 17
    file.write_bytes(data.replace(b"K\x11", b"\x8a\x07" + (2**50).to_bytes(7, "little")))
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        load_bin(file)


def test_damaged_files_name_themselves(tmp_path):
    file = write(tmp_path / "pytorch_model.bin", {"backbone.embedding.weight": torch.ones(4, 4)})
    (tmp_path / "config.json").write_text('{"d_model": 4, "n_layer": 1, "vocab_size": 4}')
    data = file.read_bytes()
    for cut in (0, 3, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            QuambaLMHeadModel.from_pretrained(tmp_path)
