"""Pickles that say other than weights: refused by their instructions, before torch follows any of them."""

from __future__ import annotations

import io
import os
import pickle
import resource
import signal
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from quamba.errors import CheckpointError
from quamba.formats.pickled import load_bin

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


# Instructions, written by hand.


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if 0 <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, what: str) -> bytes:
    return f"c{module}\n{what}\n".encode()


def group(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + group(*arguments) + b"R"


def storage(count: int, kind: str = "FloatStorage", behind: tuple[bytes, ...] = ()) -> bytes:
    claim = (text("storage"), name("torch", kind), text("0"), text("cpu"), number(count), *behind)
    return group(*claim) + b"Q"


def tensor(source: bytes, offset: int, shape: list[int], strides: list[int]) -> bytes:
    hooks = name("collections", "OrderedDict") + b")R"
    sizes = (group(*map(number, shape)), group(*map(number, strides)))
    return call(name("torch._utils", "_rebuild_tensor_v2"), source, number(offset), *sizes, b"\x89", hooks)


def state(**items: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in items.items()) + b"u."


# Files around them: 16 float32 in storage "0".


def zipped(contents: bytes, **more: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        entries = {"a/data.pkl": contents, "a/version": b"3\n", "a/byteorder": b"little", "a/data/0": bytes(64)}
        for key, value in {**entries, **more}.items():
            archive.writestr(key, value)
    return stream.getvalue()


def old(contents: bytes, keys: tuple[str, ...] = ("0",), data: bytes = struct.pack("<q", 16) + bytes(64)) -> bytes:
    start = b"".join(pickle.dumps(value, 2) for value in (MAGIC, 1001, SYSTEM))
    return start + contents + pickle.dumps(list(keys), 2) + data


def old_storage(count: int) -> bytes:
    return storage(count, behind=(b"N",))


def whole(source: bytes) -> bytes:
    return tensor(source, 0, [4, 4], [4, 1])


DEEP = b")" + b"\x85" * 500_000  # ((((...)))): its hash needs a stack as deep
WIDE = b")" + b"q\0h\0\x86" * 60  # each twice the one before: a hash of 2**60 steps

BAD: dict[str, tuple[bytes, str]] = {
    "beyond its storage": (zipped(state(a=tensor(storage(16), 0, [2**33], [1]))), r"goes beyond the 64 bytes"),
    "beyond by stride": (zipped(state(a=tensor(storage(16), 0, [4], [2**62]))), "goes beyond the 64 bytes"),
    "beyond by offset": (zipped(state(a=tensor(storage(16), 2**61, [4], [1]))), "goes beyond the 64 bytes"),
    "one value beyond": (zipped(state(a=tensor(storage(16), 1, [4, 4], [4, 1]))), "goes beyond the 64 bytes"),
    "10,000 dimensions": (zipped(state(a=tensor(storage(16), 0, [1] * 10000, [1] * 10000))), "impossible shape"),
    "storage larger than its entry": (zipped(state(a=whole(storage(17)))), "claims more bytes inside than it has"),
    "one storage, two sizes": (
        zipped(state(a=whole(storage(16)), b=tensor(storage(16, "ByteStorage"), 0, [16], [1]))),
        "claims storage 0 with two sizes",
    ),
    "old: beyond its storage": (old(state(a=tensor(old_storage(16), 0, [1000], [1]))), "goes beyond the 64 bytes"),
    "old: 40 GB of storage": (
        old(state(a=tensor(old_storage(10**10), 0, [4], [1])), data=struct.pack("<q", 10**10)),
        "claims more bytes inside than it has",
    ),
    "old: a storage never filled": (old(state(a=whole(old_storage(16))), keys=(), data=b""), "its storages are not"),
    "unset memory": (zipped(state(a=call(name("torch", "FloatTensor"), number(10**6)))), r"torch\.FloatTensor"),
    "1 GB of bytes": (zipped(state(a=call(name("builtins", "bytearray"), number(10**9)))), r"builtins\.bytearray"),
    "40 GB of storage": (
        zipped(state(a=call(name("torch.storage", "UntypedStorage"), number(4 * 10**10)))),
        "more than weights",
    ),
    "object without its constructor": (zipped(state(a=name("torch", "Tensor") + b")\x81")), r"more than weights"),
    "unknown function": (zipped(state(a=call(name("os", "system"), text("true")))), r"more than weights \(os\.system\)"),
    "deep tuple as name": (zipped(b"\x80\x02}(" + DEEP + b"K\x01u."), "a tuple for a name"),
    "wide tuple as name": (zipped(b"\x80\x02}" + WIDE + b"K\x01s."), "a tuple for a name"),
    "wide tuple called": (zipped(b"\x80\x02" + WIDE + b")R."), "more than weights"),
    "wide tuple as value": (zipped(b"\x80\x02}" + text("a") + WIDE + b"s."), "a is no plain tensor but tuple"),
    "number of 600 digits": (zipped(state(a=number(2**2000))), "the number a is too large"),
    "memo never written": (zipped(state(a=b"h\x07")), r"damaged \(BINGET\)"),
    "stack empty": (zipped(b"\x80\x02s."), r"damaged \(SETITEM\)"),
    "half a character as name": (zipped(state() [:-2] + text(b"\xed\xa0\x80") + b"G?\xe0\0\0\0\0\0\0u."), "impossible name"),
    "name of two lines": (zipped(state(**{"a\nb": whole(storage(16))})), "impossible name"),
    "name of a megabyte": (zipped(state(**{"a" * 10**6: whole(storage(16))})), "impossible name"),
    "two tables, by case": (
        zipped(state(a=whole(storage(16))), **{"a/DATA.PKL": state(b=whole(storage(16)))}),
        "two entries of the same name",
    ),
    "neither format": (b"<html>404</html>", "can't be read as a file of weights"),
    "a pointer to the file": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
}  # fmt: skip


@pytest.mark.parametrize("make", [zipped, old])
def test_what_is_written_by_hand_can_be_read(tmp_path, make):
    """So that the files below are refused for what is wrong with them."""
    (tmp_path / "x.bin").write_bytes(make(state(a=whole(storage(16) if make is zipped else old_storage(16)))))
    assert torch.equal(load_bin(tmp_path / "x.bin")["a"], torch.zeros(4, 4))


def test_parameters_and_halves_and_metadata(tmp_path):
    """What training scripts save: parameters, buffers of many dtypes, views of one storage, `_metadata`."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).bfloat16()
    written = module.state_dict()  # an OrderedDict with _metadata
    written["parameter"] = module[0].weight
    written["float8"] = torch.ones(3).to(torch.float8_e4m3fn)
    written["view"] = torch.arange(12.0)[3:].view(3, 3).T
    written["uint16"] = torch.arange(3).to(torch.uint16)
    torch.save(written, tmp_path / "x.bin")
    found = load_bin(tmp_path / "x.bin")
    assert found.keys() == written.keys()
    for key, value in written.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key].double(), value.double()), key


def attempt(file: Path) -> str:
    """What `load_bin` says, in a child with little more memory than it has, and five seconds."""
    back, front = os.pipe()
    pid = os.fork()
    if pid == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 300_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        try:
            said = f"read: {list(load_bin(file))}"
        except CheckpointError as error:
            said = f"refused: {error}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(front, said[:2000].encode("utf-8", "replace"))
        os._exit(0)
    os.close(front)
    with os.fdopen(back, encoding="utf-8") as stream:
        said = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return said or f"died of signal {-status}"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, forks, and limits its memory")
@pytest.mark.parametrize("case", BAD)
def test_refused_in_one_short_line(tmp_path, case):
    data, reason = BAD[case]
    file = tmp_path / "x.bin"
    file.write_bytes(data)
    said = attempt(file)
    assert said.startswith(f"refused: {file}"), said
    assert len(said) < 500
    assert "\n" not in said
    with pytest.raises(CheckpointError, match=reason):
        raise CheckpointError(said)
