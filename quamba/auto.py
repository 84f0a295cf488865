"""Makes transformers know quamba's models and its quantization method, without importing transformers before it is needed.

Everything is registered as soon as the transformers module concerned is there, by `import quamba` or by one import hook,
whichever comes first; again does nothing. A copy of quamba imported anew (a notebook's reload) replaces the earlier one.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
from types import ModuleType
from typing import Any

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"
_QUANTIZERS = "transformers.quantizers.auto"
_HOOKED = (_CONFIGS, _MODELS, _QUANTIZERS)

log = logging.getLogger("quamba")


def register() -> None:
    """Register what can be registered now: idempotent, and safe while one of the modules is half imported."""
    _register_model()
    _register_method()


def _register_model() -> None:
    configs, models = sys.modules.get(_CONFIGS), sys.modules.get(_MODELS)
    if configs is None or not hasattr(configs, "AutoConfig"):
        return
    from quamba.config import QuambaConfig

    configs.AutoConfig.register(QuambaConfig.model_type, QuambaConfig, exist_ok=True)
    if models is not None and hasattr(models, "AutoModelForCausalLM"):
        model = _whole("quamba.model", "QuambaLMHeadModel")
        if model is not None:
            models.AutoModelForCausalLM.register(QuambaConfig, model, exist_ok=True)


def _register_method() -> None:
    """The quantization method: in config.json of our artifacts, and of models quantized in place."""
    auto = sys.modules.get(_QUANTIZERS)
    if auto is None or not hasattr(auto, "register_quantizer"):
        return
    quantizer = _whole("quamba.inplace.quantizer", "QuambaHfQuantizer")
    config = _whole("quamba.inplace.config", "QuambaQuantizationConfig")
    if quantizer is None or config is None:
        return
    from quamba.plan import QUANT_METHOD

    for known, put, ours in (
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.register_quantization_config, config),
        (auto.AUTO_QUANTIZER_MAPPING, auto.register_quantizer, quantizer),
    ):
        there = known.get(QUANT_METHOD)
        if there is ours:
            continue
        if there is not None and not there.__module__.startswith("quamba."):
            log.warning(
                "%s has registered the quantization method %r: quantization_config= won't reach quamba",
                there.__module__,
                QUANT_METHOD,
            )
            continue
        known.pop(QUANT_METHOD, None)
        put(QUANT_METHOD)(ours)


def _whole(module: str, name: str) -> Any:
    """`name` of one of our modules, imported if it wasn't; None while it is being imported (it registers at its end)."""
    return getattr(sys.modules.get(module) or importlib.import_module(module), name, None)


def register_lazily() -> None:
    """Register at once if transformers' modules are loaded, else as soon as they are."""
    register()
    sys.meta_path[:] = [finder for finder in sys.meta_path if not getattr(finder, "of_quamba", False)]
    sys.meta_path.insert(0, _Hook())


class _Hook(importlib.abc.MetaPathFinder):
    """Lets the usual machinery find transformers' modules, and registers once their code has run."""

    of_quamba = True

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None):
        if fullname not in _HOOKED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader):
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
