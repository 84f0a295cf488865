"""What the comparisons of backends share: inputs, and the contract's agreement classes."""

import torch

from quamba_kernels.reference import quantize_per_token


def codes(rng, *shape):
    return torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8)


def normal(rng, *shape):
    return torch.randn(shape, generator=rng)


def same_codes(got, want):
    """At most 1 apart, in at most 0.1 % of the elements (of small tensors: one)."""
    assert got.dtype == want.dtype == torch.int8 and got.shape == want.shape
    apart = (got.int() - want.int()).abs()
    assert apart.max() <= 1 and apart.sum() <= max(1, want.numel() // 1000)


def close(got, want, tolerance=1e-5):
    """Relative to the largest entry."""
    assert got.dtype == want.dtype and got.shape == want.shape
    assert (got.double() - want.double()).abs().max() <= tolerance * want.abs().max() + 1e-30


def stored(h, dtype):
    """The keywords of a scan's state that hold float32 `h [..., N]` in `dtype`, and the reals that they hold."""
    if dtype == torch.int8:
        codes, scale = quantize_per_token(h)
        return {"state": codes, "state_scale": scale.squeeze(-1)}, codes * scale
    return {"state": h.to(dtype)}, h.to(dtype).float()


def rounded(h, state, state_scale=None):
    """Float16 `state`, or codes with their scale, is float `h [..., N]`, with a scan's tolerance, to the nearest entry."""
    h = h.double()
    if state_scale is None:
        assert state.dtype == torch.float16
        got, step = state.double(), h.abs() * 2**-10 + 2**-24
    else:
        assert state.dtype == torch.int8
        close(state_scale, (h.abs().amax(-1) / 127).float())
        step = state_scale.double().unsqueeze(-1)
        got = state.double() * step
    assert ((got - h).abs() <= step / 2 + 1e-5 * h.abs().max()).all()


def on_threads(run):
    """`run()` on 1 and 2 threads, which must give the same bits."""
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    one, two = ([r] if isinstance(r, torch.Tensor) else list(r) for r in results)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    return results[0]


def poison(monkeypatch):
    """From now on outputs start as NaN or -77: an entry that isn't written shows."""
    empty = torch.empty

    def filled(*shape, **kwargs):
        t = empty(*shape, **kwargs)
        return t.fill_(float("nan") if t.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", filled)
