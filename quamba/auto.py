"""Makes transformers' Auto classes know quamba's models, without importing transformers before it is needed."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Register what can be registered now: idempotent, and safe while one of the modules is half imported."""
    configs, models = sys.modules.get(_CONFIGS), sys.modules.get(_MODELS)
    if configs is not None and hasattr(configs, "AutoConfig"):
        from quamba.config import QuambaConfig

        configs.AutoConfig.register(QuambaConfig.model_type, QuambaConfig, exist_ok=True)
        if models is not None and hasattr(models, "AutoModelForCausalLM"):
            ours = sys.modules.get("quamba.model") or importlib.import_module("quamba.model")
            if hasattr(ours, "QuambaLMHeadModel"):
                _register_plan()
                models.AutoModelForCausalLM.register(QuambaConfig, ours.QuambaLMHeadModel, exist_ok=True)


def _register_plan() -> None:
    """Let `AutoQuantizationConfig` parse our plan: lm-eval, for one, asks it about any `quantization_config`."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from quamba.plan import QUANT_METHOD

    if QUANT_METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return

    @register_quantization_config(QUANT_METHOD)
    class PlanConfig(QuantizationConfigMixin):
        """The plan as it stands in config.json."""

        def __init__(self, **plan: Any):
            self.__dict__.update(plan | {"quant_method": QUANT_METHOD})


def register_lazily() -> None:
    """Register at once if transformers' auto modules are loaded, else as soon as they are."""
    register()
    if not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


class _Hook(importlib.abc.MetaPathFinder):
    """Lets the usual machinery find the two auto modules, and registers once their code has run."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None):
        if fullname not in (_CONFIGS, _MODELS):
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
