"""Recorded calls, replayed by a graph: what eager calls give, for any contents of the inputs and any place of the states."""

import sys
from pathlib import Path

import pytest
import torch

import quamba_kernels as kernels
from quamba_kernels.triton.common import Launch
from tests.gpu.cases import DEVICE, INTERPRETED, RUNS, same_bits

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gpu_models import Model, recurrent_states
from gpu_shapes import FORMATS, Shape

pytestmark = pytest.mark.gpu

WIDTH, MANY, LONG, TURNS = (24, 17, 20, 2) if INTERPRETED else (96, 33, 70, 4)
SHAPES = {
    "mamba1": Shape("mamba1", WIDTH, 2, 70, 5, share=1, rank=7),
    "mamba2": Shape("mamba2", WIDTH, 2, 70, 16, share=1, head_dim=WIDTH // 2, groups=2, tied=False),
}
FEW = 16  # tokens up to which neighbouring kernels become one
CASES = [(f, "float32", batch, length) for f in FORMATS for batch, length in ((1, 1), (5, 1), (MANY, 1), (2, LONG))]
CASES += [(f, "int8", batch, 1) for f in FORMATS for batch in (1, 5, MANY)]


WRITTEN = ("out", "rest", "parts", "total", "normed", "norm_scale", "conved", "dt", "y", "gated", "turned")


@pytest.fixture(autouse=True)
def poisoned():
    """Not here: writing poison would be recorded, and keep neighbouring kernels apart. `poison` does it afterwards."""


def poison(recording):
    """What replays have to write anew."""
    for step in recording.launches:
        for name in WRITTEN if isinstance(step, Launch) else ():
            t = step.given.get(name)
            if isinstance(t, torch.Tensor):
                t.fill_(float("nan") if t.is_floating_point() else -77)


@pytest.fixture(autouse=True)
def on_triton():
    with kernels.backend("triton"), torch.no_grad():
        yield


class Case:
    """A model of two blocks, with its ids and states."""

    def __init__(self, family, format, state, batch, length):
        self.shape, self.state, self.batch = SHAPES[family], state, batch
        self.model = Model(self.shape, FORMATS[format], DEVICE)
        self.ids = torch.zeros(batch, length, dtype=torch.int64, device=DEVICE)

    def states(self):
        return self.model.states(self.batch, recurrent_states(self.shape, self.state, self.batch, DEVICE))

    def draw(self, rng):
        self.ids.copy_(rng.integers(0, self.shape.vocabulary - 1, *self.ids.shape, dtype=torch.int64))

    def record(self, states):
        run = lambda: self.model(self.ids, states)  # noqa: E731
        result, recording = kernels.record(run, [self.ids], tensors(states))
        assert not isinstance(recording, str), recording
        poison(recording)
        return result, recording


def tensors(states):
    return [tensor for state in states for tensor in state.tensors]


def copied(states):
    return [type(s)(s.conv.clone(), s.recurrent.clone(), None if s.scale is None else s.scale.clone()) for s in states]


def same_but_for_rounding(a, b):
    """Floats off by a few roundings, of which some may have tipped a code into its neighbour on the way."""
    off, largest = (a.double() - b.double()).abs(), float(b.double().abs().max())
    step = a.dtype == torch.int8
    return a.dtype == b.dtype and float(off.max()) <= 0.02 * largest + step and float(off.mean()) <= 1e-3 * largest


@pytest.mark.parametrize(("format", "state", "batch", "length"), CASES)
@pytest.mark.parametrize("family", SHAPES)
def test_replayed_as_eager(rng, family, format, state, batch, length):
    case = Case(family, format, state, batch, length)
    # One kernel that does the work of several may add up in another order than they.
    agree = same_but_for_rounding if length == 1 and batch <= FEW else same_bits
    case.draw(rng)
    states = case.states()
    eager = copied(states)
    result, recording = case.record(states)
    assert same_bits(result, case.model(case.ids, eager))
    assert all(same_bits(a, b) for a, b in zip(tensors(states), tensors(eager), strict=True))
    kept = []
    for turn in range(TURNS):
        case.draw(rng)
        states = case.states() if turn == TURNS // 2 else states  # other tensors take the states' places
        eager = copied(states)
        want, got = case.model(case.ids, eager), recording.run(tensors(states))
        kept.append((got, got.clone()))
        assert agree(got, want)
        assert all(agree(a, b) for a, b in zip(tensors(states), tensors(eager), strict=True))
    assert all(same_bits(got, copy) for got, copy in kept)  # results are the caller's own


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", SHAPES)
def test_neighbouring_kernels_become_one(family, format):
    """So that the other tests here see those that do the work of several."""
    case = Case(family, format, "float32", 2, 1)
    _, recording = case.record(case.states())
    found = [step for step in recording.launches if isinstance(step, Launch)]
    names = {step.kernel.__name__ for step in found}
    assert len(found) <= 4 * len(case.model.blocks) + 4, names
    assert not {"_hadamard", "_gate"} & names
    assert any(step.given.get("normed") is not None for step in found)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", SHAPES)
def test_every_replay_gives_the_same_bits(rng, family, format):
    case = Case(family, format, "float32", 3, 1)
    case.draw(rng)
    states = case.states()
    start = copied(states)
    _, recording = case.record(states)
    found = []
    for _ in range(RUNS):
        for state, before in zip(tensors(states), tensors(start), strict=True):
            state.copy_(before)
        found.append([recording.run(tensors(states)), *(s.clone() for s in tensors(states))])
    assert all(same_bits(a, b) for again in found[1:] for a, b in zip(again, found[0], strict=True))


def test_one_kernel_alone(rng):
    """Nothing to make one of: the bits of the eager call."""
    u, A, D = rng.normal(3, 1, 200), -rng.uniform(200, 16), rng.normal(200)
    states = [rng.normal(3, 200, 16)]
    eager = states[0].clone()

    def step(state):
        return kernels.selective_scan(u, u, A, u[..., :16], u[..., 16:32], D, u, D, state=state)

    result, recording = kernels.record(lambda: step(states[0]), [u], states)
    assert not isinstance(recording, str), recording
    assert same_bits(result, step(eager))
    for _ in range(3):
        u.copy_(rng.normal(3, 1, 200))
        want = step(eager)
        assert same_bits(recording.run(states), want) and same_bits(states[0], eager)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_the_current_one():
    other = torch.device("cuda", (DEVICE.index + 1) % torch.cuda.device_count())
    x, weight, state = (torch.randn(shape, device=other) for shape in ((2, 1, 96), (96, 4), (2, 96, 3)))
    eager = state.clone()
    result, recording = kernels.record(lambda: kernels.causal_conv1d(x, weight, state=state), [x], [state])
    assert not isinstance(recording, str), recording
    assert same_bits(result, kernels.causal_conv1d(x, weight, state=eager))
    for _ in range(3):
        x.normal_()
        want = kernels.causal_conv1d(x, weight, state=eager)
        assert same_bits(recording.run([state]), want) and same_bits(state, eager)


def test_what_waits_for_the_device_is_not_recorded(rng):
    """The reason is told, the result is right, and the device is as good as before."""
    x = rng.normal(2, 64)

    def looks():
        y = kernels.hadamard(x, None)
        return y if float(y.sum()) == 0 else y + 0

    result, recording = kernels.record(looks, [x], [])
    assert isinstance(recording, str) and recording
    assert same_bits(result, kernels.hadamard(x, None))
    test_one_kernel_alone(rng)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is chosen by hand")
def test_the_backend():
    with kernels.backend("auto"):
        assert kernels.backend_name(DEVICE) == "triton"
        assert "triton" in kernels.describe(DEVICE).lower()
