"""What a pickle of weights asks for, found out without doing it: `torch.load` allocates, hashes and calls as it reads.

`check_pickle` reads the few instructions that `torch.save` writes for dicts of tensors, numbers and texts, and refuses all
others. Instructions only move references here: time and memory are those of the instructions' own bytes.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

MAX_PICKLE = 16 * 2**20  # names and shapes; the largest known checkpoints have some hundred kB of them
_CONSTANTS = ("BINFLOAT", "BININT", "BININT1", "BININT2", "BINUNICODE", "LONG1", "SHORT_BINSTRING")
_EMPTY: dict[str, Any] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_SINGLE = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_WIDTHS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PLAIN = (str, bytes, int, float, type(None))  # bool is an int
_REBUILD = "torch._utils._rebuild_"


@dataclass(frozen=True)
class Name:
    """Something of a module, by its path."""

    path: str


@dataclass(frozen=True)
class Storage:
    key: str
    nbytes: int
    itemsize: int


class Made:
    """A tensor, or something small that nothing here looks into."""


class _Dict(dict):
    """An OrderedDict."""


def check_pickle(stream: BinaryIO, length: int) -> tuple[Any, dict[str, int]]:
    """The pickle at the stream's place, of at most `length` bytes, as plain Python, and the bytes of each storage that it
    asks for. Leaves the stream behind it. ValueError for anything that a file of weights doesn't hold."""
    length = min(length, MAX_PICKLE)
    reader = _Reader()
    # A read is never longer than the file, and no line longer than a name.
    source: Any = SimpleNamespace(
        read=lambda n: stream.read(min(n, length)), readline=partial(stream.readline, 1000), tell=stream.tell
    )
    end = stream.tell() + length
    for opcode, argument, position in pickletools.genops(source):
        if position is None or position >= end:
            raise ValueError("its table of contents is absurdly long")
        try:
            reader.step(opcode.name, argument)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"its table of contents is damaged ({opcode.name})") from error
    return reader.stack.pop() if reader.stack else None, reader.storages


class _Reader:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks below a mark
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, int] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _CONSTANTS:
            stack.append(argument)
        elif name in _SINGLE:
            stack.append(_SINGLE[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name in _WIDTHS:
            width = _WIDTHS[name]
            if len(stack) < width:
                raise LookupError
            stack[-width:] = [tuple(stack[-width:])]
        elif name == "TUPLE":
            self.stack = self.below.pop()
            self.stack.append(tuple(stack))
        elif name in ("APPENDS", "SETITEMS"):
            self.stack = self.below.pop()
            self._fill(self.stack[-1], name, stack)
        elif name in ("APPEND", "SETITEM"):
            items = [stack.pop() for _ in range(1 if name == "APPEND" else 2)]
            self._fill(stack[-1], name, items[::-1])
        elif name == "GLOBAL":
            stack.append(Name(argument.replace(" ", ".")))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(self._call(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            if type(stack[-1]) is not _Dict or not isinstance(state, dict) or set(state) != {"_metadata"}:
                raise ValueError("it holds more than weights (BUILD)")
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"it holds more than weights ({name})")

    def _fill(self, place: Any, name: str, items: list[Any]) -> None:
        if name.startswith("APPEND"):
            if type(place) is not list:
                raise TypeError
            place.extend(items)
            return
        if not isinstance(place, dict) or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2]):
            if not isinstance(key, str | int):  # a tuple's hash may take for ever, or all of the stack
                raise ValueError(f"it holds more than weights (a {type(key).__name__} for a name)")
            place[key] = value

    def _storage(self, claim: Any) -> Storage:
        """`("storage", class, key, location, numel)`, in files before torch 1.6 with a None behind."""
        kind, name, key, _, numel, *view = claim
        if kind != "storage" or type(key) is not str or type(numel) is not int or numel < 0 or view not in ([], [None]):
            raise TypeError
        itemsize = _itemsize(name)
        if self.storages.setdefault(key, numel * itemsize) != numel * itemsize:
            raise ValueError(f"it claims storage {key[:20]} with two sizes")
        return Storage(key, numel * itemsize, itemsize)

    def _call(self, function: Any, arguments: Any) -> Any:
        path = function.path if isinstance(function, Name) else f"a {type(function).__name__}"
        if type(arguments) is not tuple:
            raise TypeError
        if path == "collections.OrderedDict" and not arguments:
            return _Dict()
        if path in (f"{_REBUILD}tensor", f"{_REBUILD}tensor_v2"):
            storage, offset, size, stride, *more = arguments
            return _tensor(storage, offset, size, stride, storage.itemsize, *more)
        if path == f"{_REBUILD}tensor_v3":
            storage, offset, size, stride, grad, hooks, dtype, *more = arguments
            return _tensor(storage, offset, size, stride, _itemsize(dtype), grad, hooks, *more)
        if path in (f"{_REBUILD}parameter", f"{_REBUILD}parameter_with_state"):
            tensor, grad, hooks, *state = arguments
            marks = state[0] if state else {}
            good = isinstance(tensor, Made) and isinstance(grad, bool) and not hooks and isinstance(marks, dict)
            if good and all(isinstance(value, _PLAIN) for value in marks.values()) and not _dunder(marks):
                return tensor
        elif path in ("torch.Size", "torch.device"):
            flat = arguments[0] if len(arguments) == 1 and type(arguments[0]) is tuple else arguments
            if all(isinstance(value, str | int) for value in flat):
                return Made()
        raise ValueError(f"it holds more than weights ({path[:100]})")


def _dunder(names: dict[Any, Any]) -> bool:
    return any(not isinstance(name, str) or name.startswith("__") for name in names)


def _itemsize(name: Name) -> int:
    """Bytes of an entry, from the name of a storage's class or of a dtype."""
    kind = name.path.removeprefix("torch.")
    if kind in ("storage.UntypedStorage", "UntypedStorage"):
        return 1
    known = (
        torch.storage._get_dtype_from_pickle_storage_type(kind) if kind.endswith("Storage") else getattr(torch, kind)
    )
    return known.itemsize


def _tensor(storage: Storage, offset: Any, size: Any, stride: Any, itemsize: int, grad=False, hooks=None, data=None):
    numbers = (offset, *size, *stride)
    if not isinstance(grad, bool) or hooks or data or len(size) != len(stride):
        raise TypeError
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or len(size) > 64:
        raise ValueError("it holds a tensor of an impossible shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if all(size) and (last + 1) * itemsize > storage.nbytes:
        raise ValueError(f"a tensor of shape {list(size)} goes beyond the {storage.nbytes} bytes of its storage")
    return Made()
