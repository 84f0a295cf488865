"""States in float16 and in int8 codes, in both scans: against loops in float64, and rounded as the contract says."""

import pytest
import torch

import quamba_kernels as kernels
from quamba_kernels import cpu
from tests.kernels import test_reference_scan, test_reference_ssd
from tests.kernels.agreement import close, codes, normal, poison, rounded

DTYPES = [torch.float16, torch.int8]
# Where the inputs and the loops are; their sizes with `length` tokens; the state's shape.
SCANS = {
    "selective_scan": (test_reference_scan, lambda length: (2, length, 5, 16), (2, 5, 16)),
    "ssd_scan": (test_reference_ssd, lambda length: (2, length, 4, 5, 2, 12), (2, 4, 5, 12)),
}
PER_TOKEN = ("u", "x", "dt", "B", "C", "z")


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def backend(request, monkeypatch):
    if request.param == "cpu" and not cpu.available():
        pytest.skip(cpu.why_not())
    poison(monkeypatch)
    with kernels.backend(request.param):
        yield request.param


@pytest.fixture(params=SCANS)
def scan(request):
    return request.param


def inputs(rng, scan, length):
    module, sizes, _ = SCANS[scan]
    return module.inputs(rng, *sizes(length))


def start(rng, scan, dtype):
    """A state as keywords, and its real value in float64."""
    shape = SCANS[scan][2]
    if dtype == torch.float16:
        state = normal(rng, *shape).half()
        return {"state": state}, state.double()
    state, scale = codes(rng, *shape), torch.rand(shape[:-1], generator=rng) / 60
    return {"state": state, "state_scale": scale}, state.double() * scale.double().unsqueeze(-1)


def copy(state):
    return {name: t.clone() for name, t in state.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 9])
def test_against_loops(rng, scan, length, dtype):
    i, (state, h) = inputs(rng, scan, length), start(rng, scan, dtype)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, : length // 2] = False
    for m in (None, mask):
        held = copy(state)
        want, last = SCANS[scan][0].naive(i, h, m)
        close(getattr(kernels, scan)(**i, **held, mask=m), want.float())
        rounded(last, **held)


def test_codes_round_half_to_even(scan):
    """One token onto a state of zeros: h = B, since dt * u = 1."""
    h = torch.tensor([127.0, 0.5, 1.5, 2.5, -2.5, -0.5, 126.5, -126.5])
    i, shape = one_token(scan, h), SCANS[scan][2][1:-1]
    state, scale = torch.ones(1, *shape, 8, dtype=torch.int8), torch.zeros(1, *shape)
    getattr(kernels, scan)(**i, state=state, state_scale=scale)
    assert torch.equal(scale, torch.ones_like(scale))
    assert torch.equal(state, torch.tensor([127, 0, 2, 2, -2, 0, 126, -126], dtype=torch.int8).expand_as(state))
    for factor in (2.0**-126, 2.0**20):  # below what inv reaches, codes are 0; the scale is right all the same
        getattr(kernels, scan)(**one_token(scan, h * factor), state=state.zero_(), state_scale=scale.zero_())
        assert torch.equal(scale, torch.full_like(scale, factor))
        assert (state == 0).all() if factor < 1 else state.flatten()[:3].tolist() == [127, 0, 2]


def test_halves_round_to_even_and_saturate(scan):
    h = torch.tensor([2049.0, 2051.0, -2049.0, 70000.0, -1e6, 65519.0, 2.0**-26, 1.5 * 2**-24])
    state = torch.zeros(1, *SCANS[scan][2][1:-1], 8, dtype=torch.float16)
    getattr(kernels, scan)(**one_token(scan, h), state=state)
    want = torch.tensor([2048.0, 2052.0, -2048.0, 65504.0, -65504.0, 65504.0, 0.0, 2.0**-23])
    assert torch.equal(state.float(), want.expand_as(state))


def one_token(scan, h):
    """Inputs of one token, after which a state of zeros is h `[N]` in every row."""
    inner = SCANS[scan][2][1:-1]
    heads = inner[:1]
    one = {"dt": torch.full((1, 1, *heads), 32.0), "D": torch.zeros(heads), "dt_bias": torch.zeros(heads)}
    u = torch.full((1, 1, *inner), 1 / 32)
    if scan == "ssd_scan":
        return one | {"x": u, "A": -torch.ones(heads)} | dict.fromkeys("BC", h.expand(1, 1, 1, -1))
    return one | {"u": u, "z": u, "A": -torch.ones(*heads, len(h))} | dict.fromkeys("BC", h.expand(1, 1, -1))


def test_rows_of_zeros(rng, scan):
    i = inputs(rng, scan, 3)
    i["u" if "u" in i else "x"].zero_()
    shape = SCANS[scan][2]
    state, scale = codes(rng, *shape), torch.zeros(shape[:-1])
    assert (getattr(kernels, scan)(**i, state=state, state_scale=scale) == 0).all()
    assert (state == 0).all() and (scale == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_leaves_the_state(rng, scan, dtype):
    """No tokens leave it to the bit; masked ones let it be written again, from the same reals."""
    i, (state, _) = inputs(rng, scan, 4), start(rng, scan, dtype)
    if dtype == torch.int8:  # as rows are stored
        state["state"].clamp_(min=-127)[..., 0] = 127
    held = copy(state)
    getattr(kernels, scan)(**{name: t[:, :0] if name in PER_TOKEN else t for name, t in i.items()}, **held)
    assert all(torch.equal(held[name], state[name]) for name in state)
    getattr(kernels, scan)(**i, **held, mask=torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(held["state"], state["state"])
    if "state_scale" in state:
        torch.testing.assert_close(held["state_scale"], state["state_scale"], rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_add_up_decayed(rng, scan, dtype):
    """Token by token: each call adds half a step of every row, and what was there decays with the state."""
    i, (state, h) = inputs(rng, scan, 30), start(rng, scan, dtype)
    exact = h.float()
    bound = torch.zeros_like(h)
    for t in range(30):
        token = {name: v[:, t : t + 1] if name in PER_TOKEN else v for name, v in i.items()}
        getattr(kernels, scan)(**token, **state)
        getattr(kernels, scan)(**token, state=exact)
        dt = torch.nn.functional.softplus(token["dt"][:, 0] + i["dt_bias"]).double()
        decay = (dt.unsqueeze(-1) * i["A"]).exp() if scan == "selective_scan" else (dt * i["A"]).exp()[..., None, None]
        step = state["state_scale"].unsqueeze(-1) if "state_scale" in state else state["state"].float().abs() * 2**-10
        bound = bound * decay + step.double() / 2 + 1e-5
    value = state["state"].double() * (state["state_scale"].unsqueeze(-1) if "state_scale" in state else 1)
    assert ((value - exact).abs() <= bound).all()
    assert (value - exact).abs().max() > 0.05 * bound.max()  # and they are there


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_in_other_strides(rng, scan, dtype):
    i, (state, _) = inputs(rng, scan, 5), start(rng, scan, dtype)
    turned = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in state.items()}
    assert not turned["state"].is_contiguous()
    close(getattr(kernels, scan)(**i, **turned), getattr(kernels, scan)(**i, **state))
    assert (turned["state"].float() - state["state"].float()).abs().max() <= (1 if dtype == torch.int8 else 0.01)
    if dtype == torch.int8:
        close(turned["state_scale"], state["state_scale"])


def test_scales_belong_to_codes(rng, scan, backend):
    i, shape = inputs(rng, scan, 2), SCANS[scan][2]
    state, scale = codes(rng, *shape), torch.rand(shape[:-1], generator=rng)
    for wrong in (
        {"state": state},
        {"state_scale": scale},
        {"state": state.float(), "state_scale": scale},
        {"state": state.half(), "state_scale": scale},
    ):
        with pytest.raises(ValueError, match=r"^state_scale\b"):
            getattr(kernels, scan)(**i, **wrong)
    if backend == "cpu":
        with pytest.raises(ValueError, match=r"^state_scale: expected shape"):
            getattr(kernels, scan)(**i, state=state, state_scale=scale[:1])
        with pytest.raises(TypeError, match=r"^state_scale"):
            getattr(kernels, scan)(**i, state=state, state_scale=scale.half())
        with pytest.raises(TypeError, match=r"^state: expected float32 or float16 or int8"):
            getattr(kernels, scan)(**i, state=state.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_such_a_call_is_not_recorded(rng, scan, dtype):
    """It is done all the same; the recording's place is taken by the reason why there is none."""
    i, (state, _) = inputs(rng, scan, 1), start(rng, scan, dtype)
    other = copy(state)
    got, why = kernels.record(lambda: getattr(kernels, scan)(**i, **state), [i["dt"]], list(state.values()))
    assert isinstance(why, str)
    assert torch.equal(got, getattr(kernels, scan)(**i, **other))
    assert all(torch.equal(other[name], state[name]) for name in state)
