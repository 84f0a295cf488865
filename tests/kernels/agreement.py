"""What the comparisons of backends share: inputs, and the contract's agreement classes."""

import torch


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
