import pytest

from tests.quamba.inplace.models import CONFIGS, write_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """`folders["mamba2"]`: a float model of that kind. Only for reading."""
    root = tmp_path_factory.mktemp("inplace")
    return {kind: write_model(kind, root / kind) for kind in CONFIGS}
