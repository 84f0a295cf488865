"""transformers' own modelling tests, run on our classes: which pass, which fail, which are skipped, and why.

    python -m tests.hf_mixins            # or: make hf-mixins

Fetches the source distribution of the installed transformers into build/hf-mixins (nothing of it is committed), takes
tests/test_modeling_common.py from it, and runs its mixin. A failure that KNOWN doesn't explain, or one that it explains and
that doesn't happen, makes the exit code 1. docs/hf-mixins.md has the outcome.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import subprocess
import sys
import tarfile
import unittest
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hf_tests"

_VOCABULARY = "the vocabulary of a quantized model stays as it is: resize the float model, then quantize that"
KNOWN: dict[str, str] = {
    "test_cannot_load_with_meta_device_context_manager": "weights go where `device` says, whatever torch's default device",
    "test_from_pretrained_no_checkpoint": "a `state_dict` argument is refused, with the way out",
    "test_generation_tester_mixin_inheritance": "the generation mixin is not in the source distribution; see below",
    "test_load_save_without_tied_weights": "it opens model.safetensors; an artifact has a shard for every block",
    "test_model_get_set_embeddings": "the embedding is a class of ours, which also holds integers",
    "test_model_weights_reload_no_missing_tied_weights": "it adds a model.safetensors that the index doesn't name, to replace "
    "the weights; the index decides",
    "test_resize_embeddings_untied": _VOCABULARY,
    "test_resize_tokens_embeddings": _VOCABULARY,
    "test_retain_grad_hidden_states_attentions": "models take no gradients",
}
"""Name of a test, with wildcards -> why it fails on our classes."""


def fetch(work: Path, version: str) -> None:
    """transformers' tests as the package `hf_tests` in `work`, and `parameterized`, which they need."""
    done = work / f"{PACKAGE}-{version}"
    if not done.exists():
        work.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        only = ["--no-deps", "--no-binary", "transformers"]
        subprocess.run([*pip, "download", *only, "-d", str(work), f"transformers=={version}"], check=True)
        subprocess.run([*pip, "install", "-q", "--target", str(work / "site"), "parameterized"], check=True)
        with tarfile.open(work / f"transformers-{version}.tar.gz") as archive:
            top = f"transformers-{version}/tests/"
            members = [m for m in archive.getmembers() if m.name.startswith(top) and m.name.endswith(".py")]
            for member in members:
                member.name = member.name.removeprefix(top)
            archive.extractall(work / f"{PACKAGE}.new", members, filter="data")
        (work / f"{PACKAGE}.new" / "__init__.py").touch()
        (work / f"{PACKAGE}.new").rename(done)
    link = work / PACKAGE
    link.unlink(missing_ok=True)
    link.symlink_to(done.name)
    sys.path[:0] = [str(work), str(work / "site")]
    sys.meta_path.append(_Missing())


class _Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of transformers' tests that its source distribution leaves out: any name in them is an empty class."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None):
        if not fullname.startswith(f"{PACKAGE}."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda name: type(name, (), {})  # type: ignore[method-assign]


@dataclass
class Tester:
    """What the mixin asks for a configuration and inputs."""

    family: str
    recipe: str | None
    batch_size: int = 3
    seq_length: int = 7
    hidden_size: int = 32
    num_hidden_layers: int = 2
    vocab_size: int = 99
    is_training: bool = False

    def get_config(self) -> Any:
        from quamba import QuambaConfig
        from quamba.recipe import Recipe

        args: dict[str, Any] = {"intermediate_size": 64, "state_size": 8, "time_step_rank": 2}
        if self.family == "mamba2":
            args = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "norm_groups": 1, "chunk_size": 4}
        block = {"mixer": self.family, "args": args, "mlp": None}
        size = {"vocab_size": self.vocab_size, "hidden_size": self.hidden_size}
        config = QuambaConfig(**size, blocks=[block] * self.num_hidden_layers, pad_token_id=0, eos_token_id=0)
        return (
            config if self.recipe is None else config.with_plan(Recipe.find(self.recipe, self.family).resolve(config))
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        import torch

        ids = torch.randint(1, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


CASES = {
    "mamba1": Tester("mamba1", None),
    "mamba2": Tester("mamba2", None),
    "mamba2 w8a8": Tester("mamba2", "w8a8"),
}


def case_class(name: str, tester: Tester, mixin: type) -> type[unittest.TestCase]:
    from quamba import QuambaLMHeadModel

    def set_up(self: Any) -> None:
        self.model_tester = tester

    return type(
        name,
        (mixin, unittest.TestCase),
        {
            "all_model_classes": (QuambaLMHeadModel,),
            "all_generative_model_classes": (QuambaLMHeadModel,),
            "pipeline_model_mapping": {},
            "has_attentions": False,
            "setUp": set_up,
        },
    )


def fill_integers() -> None:
    """A model made from a quantized config has no weights to start with: make some up, for these tests."""
    import torch

    from quamba import QuambaLMHeadModel

    plain = QuambaLMHeadModel._init_weights

    @torch.no_grad()
    def filled(self: Any, module: torch.nn.Module) -> None:
        plain(self, module)
        if self.config.plan.is_float:
            return
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype == torch.int8:
                parameter.copy_(torch.randint(-127, 128, parameter.shape))
            elif name.endswith("_scale"):
                parameter.fill_(1e-3)
            elif name in ("A_log", "D", "dt_bias"):
                parameter.fill_(0.5)
        for name, buffer in module.named_buffers(recurse=False):
            buffer.fill_(0 if name.endswith("_group") else 1)

    QuambaLMHeadModel._init_weights = filled  # type: ignore[method-assign]


class Outcomes(unittest.TestResult):
    """Test -> ("pass" | "skip" | "fail", reason)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[str, str]] = {}

    def note(self, test: unittest.TestCase, outcome: str, reason: str = "") -> None:
        name = test.id().rpartition(".")[2]
        if self.found.get(name, ("",))[0] != "fail":
            self.found[name] = (outcome, reason)

    def addSuccess(self, test: unittest.TestCase) -> None:
        self.note(test, "pass")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.note(test, "skip", reason)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        self.note(test, "fail", said(err))

    addError = addFailure

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        if err is not None:
            self.note(test, "fail", said(err))


def said(err: tuple[type[BaseException], BaseException, TracebackType]) -> str:
    """One line of an error."""
    lines = str(err[1]).strip().splitlines() or [""]
    return f"{err[0].__name__}: {lines[0][:160]}"


def explanation(test: str) -> str:
    return next((why for pattern, why in KNOWN.items() if fnmatch.fnmatch(test, pattern)), "")


def report(results: dict[str, dict[str, tuple[str, str]]]) -> int:
    """Print the outcome as Markdown. 1 if there is anything that KNOWN doesn't say."""
    tests = sorted({test for found in results.values() for test in found})
    unexplained = []
    groups: dict[str, list[str]] = {"pass": [], "skip": [], "fail": []}
    for test in tests:
        outcomes = {case: found[test] for case, found in results.items() if test in found}
        worst = next(kind for kind in ("fail", "pass", "skip") if kind in [o for o, _ in outcomes.values()])
        where = [case for case, (outcome, _) in outcomes.items() if outcome == worst]
        reason = next(reason for outcome, reason in outcomes.values() if outcome == worst)
        why = explanation(test)
        if (worst == "fail") != bool(why):
            unexplained.append(
                f"{test}: {'fails without an explanation' if worst == 'fail' else 'is explained, but passes'}"
            )
        some = "" if len(where) == len(results) else f" ({', '.join(where)})"
        if worst == "pass":
            groups["pass"].append(f"`{test}`{some}")
        elif worst == "skip":
            groups["skip"].append(f"| `{test}`{some} | {reason} |")
        else:
            groups["fail"].append(f"| `{test}`{some} | {why or '?'} | {reason.replace('|', '/')} |")
    counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in groups.items())
    print(f"{len(tests)} tests of {', '.join(results)}: {counts}\n")
    print("### Pass\n\n" + ", ".join(groups["pass"]) + "\n")
    print("### Fail\n\n| test | why | what it says |\n|---|---|---|\n" + "\n".join(groups["fail"]) + "\n")
    print("### Skipped\n\n| test | why |\n|---|---|\n" + "\n".join(groups["skip"]))
    for line in unexplained:
        print(line, file=sys.stderr)
    return int(bool(unexplained))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "hf-mixins")
    parser.add_argument("-k", dest="pattern", default="test_*", help="only tests of this name (wildcards)")
    options = parser.parse_args()
    import transformers

    fetch(options.work.absolute(), transformers.__version__)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    mixin = importlib.import_module(f"{PACKAGE}.test_modeling_common").ModelTesterMixin
    fill_integers()
    results = {}
    for name, tester in CASES.items():
        case = case_class(name, tester, mixin)
        names = unittest.TestLoader().getTestCaseNames(case)
        outcomes = Outcomes()
        for test in (test for test in names if fnmatch.fnmatch(test, options.pattern)):
            print(f"\r{name}: {test}".ljust(100), end="", file=sys.stderr, flush=True)
            case(test).run(outcomes)
        results[name] = outcomes.found
    print("\r".ljust(100), file=sys.stderr)
    return report(results)


if __name__ == "__main__":
    sys.exit(main())
