"""One model's diagnosis: what it is, what was repaired, what is broken."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from quamba.errors import QuambaError

VERDICTS = ("healthy", "repaired", "broken")


@dataclass(frozen=True)
class Finding:
    """what: one clause; tensors: those concerned."""

    what: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """One thing that was tried out, and how it went."""

    name: str
    passed: bool
    detail: str


@dataclass
class Diagnosis:
    """`facts`: `formats.summarize`'s, empty if the model can't be opened. `notes` are worth knowing and no fault."""

    model: str
    facts: dict[str, Any] = field(default_factory=dict)
    repairs: list[dict[str, Any]] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    broken: list[Finding] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if self.broken or not all(check.passed for check in self.checks):
            return "broken"
        return "repaired" if self.repairs else "healthy"

    @property
    def exit_code(self) -> int:
        return VERDICTS.index(self.verdict)

    def to_dict(self) -> dict[str, Any]:
        lists = {key: [asdict(item) for item in getattr(self, key)] for key in ("notes", "broken", "checks")}
        return {"model": self.model, "verdict": self.verdict, **self.facts, "repairs": self.repairs, **lists}


def diagnose(model: str, *, run: bool = True, verify: bool = False, tokenizer: str | None = None) -> Diagnosis:
    """Read MODEL's headers, then its tensors one block at a time, then (with `run`) try it out on a few tokens.

    Never raises for what is wrong with the model; the diagnosis says it.
    """
    from quamba.formats import check_hashes, find, load_tokenizer, open_checkpoint, summarize

    found = Diagnosis(model)
    try:
        find(model)  # before anything heavy is imported
        checkpoint = open_checkpoint(model)
        if verify and checkpoint.layout == "quamba":
            check_hashes(checkpoint.folder)
    except Exception as error:
        found.broken.append(_finding(error))
        return found
    from quamba.doctor.run import try_out
    from quamba.doctor.tensors import examine
    from quamba.formats.load import build

    found.model, found.repairs = checkpoint.location.name, checkpoint.repairs.to_list()
    found.facts = summarize(checkpoint)
    if verify and checkpoint.layout != "quamba":
        found.notes.append(Finding("nothing to verify: only quamba's own artifacts record hashes of their files"))
    try:
        examine(checkpoint, found)
        words = load_tokenizer(model, tokenizer, required=False)
        if words is None:
            found.notes.append(Finding("it has no tokenizer; name one with --tokenizer where text is read or written"))
        elif len(words) > checkpoint.config.vocab_size:
            what = f"the tokenizer has {len(words)} tokens, the model {checkpoint.config.vocab_size}: it is another model's"
            found.broken.append(Finding(what))
    except Exception as error:
        found.broken.append(_finding(error))
    if run and not found.broken:
        try:
            try_out(build(checkpoint), found)
        except Exception as error:
            found.broken.append(_finding(error))
    return found


def _finding(error: Exception) -> Finding:
    """What a message for people says, or else what kind of surprise it was."""
    known = isinstance(error, QuambaError | OSError)
    return Finding(str(error) if known else f"reading it ends with {type(error).__name__}: {error}")
