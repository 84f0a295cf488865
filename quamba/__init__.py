"""Post-training quantization for state space language models.

The public names load on first use, so that `import quamba` stays well under a second:
`QuambaLMHeadModel`, `QuambaConfig`, `QuambaQuantizationConfig`, `Recipe`, `quantize`, `last_logits`, `backend`,
`QuambaError`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from quamba.auto import register_lazily

__version__ = "0.1.0"

_HOME = {
    "QuambaLMHeadModel": "quamba.model",
    "QuambaConfig": "quamba.config",
    "QuambaQuantizationConfig": "quamba.inplace.config",
    "Recipe": "quamba.recipe",
    "quantize": "quamba.quantizer",
    "last_logits": "quamba.generation",
    "backend": "quamba_kernels",
    "QuambaError": "quamba.errors",
}

__all__ = [
    "QuambaConfig",
    "QuambaError",
    "QuambaLMHeadModel",
    "QuambaQuantizationConfig",
    "Recipe",
    "__version__",
    "backend",
    "last_logits",
    "quantize",
]

if TYPE_CHECKING:
    from quamba.config import QuambaConfig
    from quamba.errors import QuambaError
    from quamba.generation import last_logits
    from quamba.inplace.config import QuambaQuantizationConfig
    from quamba.model import QuambaLMHeadModel
    from quamba.quantizer import quantize
    from quamba.recipe import Recipe
    from quamba_kernels import backend


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'quamba' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_lazily()
