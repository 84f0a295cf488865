"""What is recorded in Triton's backend is done again: kernels and torch's operations, wherever the state stands."""

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

import quamba_kernels as kernels
from quamba_kernels.triton import recording
from tests.kernels.agreement import codes, normal


@pytest.fixture(autouse=True)
def poisoned():
    """Not here: writing poison is a step that would be recorded."""


@pytest.fixture(autouse=True)
def on_triton():
    with kernels.backend("triton"):
        yield


def record(function, inputs, moving=()):
    result, found = kernels.record(function, list(inputs), list(moving))
    assert not isinstance(found, str), found
    return result, found


def test_kernels_and_torchs_operations(rng):
    x, weight, scale = normal(rng, 3, 24), codes(rng, 40, 24), torch.rand(40, generator=rng)

    def function():
        q, s = kernels.quantize_per_token(x.to(torch.float16).float())
        y = kernels.w8a8_linear(q, s, weight, scale * 2)
        a, b = y.split([16, 24], dim=-1)
        return x.exp() + b * kernels.rms_norm(b, scale[:24].exp(), 1e-5) + a[:, :1] * 3.0 - torch.cat([a, b[:, :8]], -1)

    first, recorded = record(function, [x])
    kept = first.clone()
    for _ in range(2):
        x.copy_(normal(rng, 3, 24))
        assert torch.equal(recorded.run([]), function())
    assert torch.equal(first, kept)  # the first result isn't written to again


def test_constants_are_computed_once(rng):
    x, weight = normal(rng, 2, 8), normal(rng, 8)
    _, recorded = record(lambda: kernels.rms_norm(x, weight.exp() * 2, 1e-5), [x])
    assert len(recorded.launches) == 1
    assert recorded.computed_from(weight)
    assert not recorded.computed_from(x)


def test_what_cannot_be_done_again_says_so(rng):
    x = normal(rng, 2, 8)
    for function, why in ((lambda: x + float(x.sum()), "aten"), (lambda: x.view(4, 4), "isn't made by the function")):
        result, problem = kernels.record(function, [x], [])
        assert isinstance(problem, str) and why in problem
        assert torch.equal(result, function())


def conv(rng):
    x, weight, states = normal(rng, 2, 1, 8), normal(rng, 8, 4), [normal(rng, 2, 8, 3) for _ in range(3)]
    _, recorded = record(lambda: kernels.causal_conv1d(x, weight, state=states[0]), [x], moving=[states[0]])

    def step(state):
        x.copy_(normal(rng, 2, 1, 8))
        before = state.clone()
        want = kernels.causal_conv1d(x, weight, state=before)
        assert torch.equal(recorded.run([state]), want)
        assert torch.equal(state, before)

    return recorded, states, step


def test_what_moves(rng):
    _, states, step = conv(rng)
    for _ in range(2):
        for state in (states[1], states[2], states[1], states[0]):
            step(state)


def test_a_graph_for_each_place(rng, monkeypatch):
    """With a stand-in for CUDA graphs: what is captured stays bound to the places of then."""
    made = []

    class Graph:
        def __init__(self, steps, device):
            self.steps = list(steps)
            made.append(self)

        def replay(self):
            recording.play(self.steps)

    monkeypatch.setattr(recording, "can_capture", lambda result: True)
    monkeypatch.setattr(recording, "captured", Graph)
    monkeypatch.setattr(recording, "MOST_GRAPHS", 2)
    recorded, states, step = conv(rng)
    for state in (states[0], states[1], states[0], states[1]):
        step(state)
    assert len(made) == 2
    for state in (states[2], states[1], states[0]):  # the third displaces the first
        step(state)
    assert len(made) == 4 and len(recorded.graphs) == 2


def test_no_graph_is_no_recording(rng, monkeypatch):
    def refuse(steps, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recording, "can_capture", lambda result: True)
    monkeypatch.setattr(recording, "captured", refuse)
    x = normal(rng, 2, 8)
    result, problem = kernels.record(lambda: kernels.rms_norm(x, torch.ones(8), 1e-5), [x], [])
    assert "no CUDA graph could be made" in problem and "not permitted" in problem
    assert torch.equal(result, kernels.rms_norm(x, torch.ones(8), 1e-5))


def test_no_graph_for_other_places_is_told_once(rng, monkeypatch, caplog):
    monkeypatch.setattr(recording, "can_capture", lambda result: True)
    monkeypatch.setattr(recording, "captured", lambda steps, device: SimpleNamespace(replay=lambda: None))
    _, states, step = conv(rng)

    def refuse(steps, device):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(recording, "captured", refuse)
    step(states[1])
    step(states[1])
    assert [record.message for record in caplog.records] == [
        "no CUDA graph could be made, kernels are launched one by one: out of memory"
    ]


def test_what_moves_in_a_list(rng):
    """Of an operation on several tensors."""
    x, states = normal(rng, 2, 8), [normal(rng, 2, 8) for _ in range(2)]
    _, recorded = record(lambda: torch.cat([states[0], kernels.rms_norm(x, torch.ones(8), 1e-5)]), [x], [states[0]])
    assert torch.equal(recorded.run([states[1]])[:2], states[1])


def test_states_are_not_held(rng):
    recorded, states, step = conv(rng)
    step(states[1])
    held = [weakref.ref(state) for state in states]
    del states, step
    gc.collect()
    assert recorded.launches and not any(state() is not None for state in held)


def test_a_graph_is_made_on_the_device_of_the_steps(monkeypatch):
    """Which need not be the current one."""
    now, seen = ["cuda:0"], []

    @contextlib.contextmanager
    def on(device):
        before, now[0] = now[0], str(device)
        yield
        now[0] = before

    class Stream:
        def __init__(self):
            seen.append(now[0])

        def wait_stream(self, other):
            seen.append(now[0])

    graph = SimpleNamespace(capture_begin=lambda **options: None, capture_end=lambda: None)
    names = {"device": on, "Stream": Stream, "current_stream": Stream, "CUDAGraph": lambda: graph}
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    assert recording.captured([lambda: seen.append(now[0])], torch.device("cuda:1")) is graph
    assert set(seen) == {"cuda:1"} and now == ["cuda:0"]
