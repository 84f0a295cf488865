"""Tests on a GPU: `make gpu-test`. Every run draws new inputs; `--input-seed N`, printed at the top and with each failure,
draws those of an earlier one."""

import random
import zlib

import pytest
import torch

from tests.kernels.agreement import poison

SEED = random.SystemRandom().randrange(1 << 31)


def pytest_addoption(parser):
    parser.addoption("--input-seed", type=int, dest="input_seed", help="draw the inputs of an earlier run of tests/gpu")


def _seed(config) -> int:
    chosen = config.getoption("input_seed", None)  # unknown where the option came too late to be read
    return SEED if chosen is None else chosen


def pytest_report_header(config):
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    return f"gpu: {device}; inputs: --input-seed {_seed(config)}"


@pytest.fixture
def rng(request):
    """Inputs of this test, on the device."""
    from tests.gpu.cases import Random

    seed = _seed(request.config)
    print(f"repeat with --input-seed {seed}")
    return Random(seed ^ zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison(monkeypatch)
