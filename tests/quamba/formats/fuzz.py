"""Damage small valid checkpoints at random and load them, in forked children with little memory and an alarm.

    python -m tests.quamba.formats.fuzz [--mutants N] [--seed S]

Of our own artifacts each mutant gives identical logits or a QuambaError, and a flip in tensor data is found by `verify`;
of foreign ones none crashes, hangs, or needs much memory. Prints what went otherwise; exit code 1 if anything did.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import quamba
from quamba import QuambaLMHeadModel
from quamba.errors import QuambaError
from quamba.formats import open_checkpoint
from quamba.formats.load import build
from tests.quamba.formats.published import published, save
from tests.quamba.models import random_model

BATCH = 100  # mutants a child
SECONDS = 20  # for one mutant
MEMORY = 1_500_000_000  # bytes of address space more than the warm process has
JUNK = [None, True, False, -1, 0, 1, 2**31, 2**63, 2**70, 1e308, float("nan"), float("inf"), -0.5, "", "x", "inf"]
JUNK += [[], [1], [[]], {}, {"a": 1}, "\ud800", [None] * 3, "../../etc/passwd", "0" * 5000]

Change = Callable[[random.Random, bytes], bytes]


def checkpoints(root: Path) -> dict[str, Path]:
    """Small valid checkpoints of every layout."""
    from safetensors.torch import load_file, save_file
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    small = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
    heads = {"num_heads": 4, "head_dim": 4, "n_groups": 2}
    MambaForCausalLM(MambaConfig(**small, intermediate_size=16)).save_pretrained(root / "transformers1")
    Mamba2ForCausalLM(Mamba2Config(**small, **heads)).save_pretrained(root / "transformers2")
    tensors = load_file(root / "transformers2" / "model.safetensors")
    tensors = {name.replace("embeddings", "embedding"): tensor for name, tensor in tensors.items()}
    ssm = {"layer": "Mamba2", "d_state": 4, "headdim": 4, "ngroups": 2, "chunk_size": 8, "dt_limit": [0.0, 1.0]}
    config = {
        "d_model": 8,
        "n_layer": 1,
        "vocab_size": 16,
        "ssm_cfg": ssm,
        "attn_layer_idx": [],
        "tie_embeddings": False,
    }
    for name in ("mamba_ssm", "mamba_ssm_bin", "mamba_ssm_old_bin"):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config | {"pad_vocab_size_multiple": 8}))
    save_file(tensors, root / "mamba_ssm" / "model.safetensors")
    torch.save(tensors, root / "mamba_ssm_bin" / "pytorch_model.bin")
    old = root / "mamba_ssm_old_bin" / "pytorch_model.bin"
    torch.save(tensors, old, _use_new_zipfile_serialization=False)
    for family, precision in (("mamba1", "W8A8"), ("mamba2", "W4A8")):
        save(published(family, precision, layers=1), root / f"published {family}")
    ids = torch.arange(16).view(1, 16)
    for family, preset in (("mamba1", "w4a8"), ("mamba2", "w8a8")):
        model = random_model(
            family, hidden=8, inner=16, vocab=16, layers=1, **({"head_dim": 4} if family == "mamba2" else {})
        )
        quamba.quantize(model, preset, calibration=ids, out=root / f"quamba {family}")
    return {path.name: path for path in sorted(root.iterdir())}


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """One change somewhere in `data`."""
    at, some = rng.randrange(len(data)), bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
    kind = rng.randrange(7)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + some + data[at:]
    if kind == 2:
        return data[:at] + data[at + rng.randint(1, 20) :]
    if kind == 3:
        return data[:at]
    digits = [i for i, byte in enumerate(data[:100_000]) if 48 <= byte <= 57]
    if kind < 6 and digits:  # another number, of any length
        at = rng.choice(digits)
        return (
            data[:at]
            + rng.choice([b"9", b"0", b"-1", b"1e9", b"99999999999999999999", b"4611686018427387904"])
            + data[at + 1 :]
        )
    return data[:at] + some + data[at + len(some) :]


def damage_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with its header changed, its length made to fit half of the time."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.1:
        return damage_bytes(rng, data[:8]) + data[8:]
    header = damage_bytes(rng, data[8 : 8 + length])
    size = len(header) if rng.random() < 0.8 else length
    return size.to_bytes(8, "little") + header + data[8 + length :]


def damage_pickle(rng: random.Random, data: bytes) -> bytes:
    """A file of `torch.save` with its pickle changed, in an archive that is whole."""
    if not data.startswith(b"PK"):
        start = data.index(b"torch._utils")
        return data[:start] + damage_bytes(rng, data[start : start + 4000]) + data[start + 4000 :]
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(stream, "w") as changed:
        for entry in archive.namelist():
            content = archive.read(entry)
            changed.writestr(entry, damage_bytes(rng, content) if entry.endswith("data.pkl") else content)
    return stream.getvalue()


def damage_json(rng: random.Random, data: bytes) -> bytes:
    """One field of a JSON file replaced by junk or left out."""
    whole = json.loads(data)
    place = rng.choice(list(_places(whole)))
    changed = copy.deepcopy(whole)
    inner: Any = changed
    for key in place[:-1]:
        inner = inner[key]
    if rng.random() < 0.1:
        del inner[place[-1]]
    else:
        inner[place[-1]] = rng.choice(JUNK)
    return json.dumps(changed).encode()


def _places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from _places(item, (*at, key))


def damage_data(rng: random.Random, data: bytes) -> bytes:
    """One bit of a safetensors file's tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    at = rng.randrange(start, len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def mutate(rng: random.Random, folder: Path) -> tuple[Path, Change]:
    """A file of the folder, and how to change it."""
    texts = [folder / "config.json", *folder.glob("*.index.json"), *folder.glob("generation_config.json")]
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if rng.random() < 0.45:
        file = rng.choice(texts)
        return file, damage_json if rng.random() < 0.8 else damage_bytes
    file = rng.choice(weights)
    if file.suffix == ".safetensors":
        return file, damage_header
    return file, damage_pickle if rng.random() < 0.8 else damage_bytes


def outcome(folder: Path, expected: torch.Tensor | None, verify: bool) -> str:
    """ "" if it went as it should."""
    try:
        if verify:
            open_checkpoint(str(folder), verify=True)
            return "a flipped bit went unnoticed by verify"
        logits = build(open_checkpoint(str(folder)))(torch.arange(8).view(1, 8)).logits
    except QuambaError:
        return ""
    if expected is not None and not torch.equal(logits, expected):
        return "other logits"
    return ""


def child(jobs: list[tuple[int, Path, Path, bytes, torch.Tensor | None, bool]], pipe: int) -> None:
    """Try mutants one after the other; a line for each that is begun and for each that went wrong."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    logging.disable(logging.CRITICAL)
    for number, folder, file, data, expected, verify in jobs:
        os.write(pipe, f"{number}\n".encode())
        signal.alarm(SECONDS)
        original = file.read_bytes()
        file.write_bytes(data)
        try:
            wrong = outcome(folder, expected, verify)
        except BaseException as error:
            wrong = f"{type(error).__name__}: {str(error)[:200]}"
        file.write_bytes(original)
        if wrong:
            os.write(
                pipe, f"! {number} {folder.name}/{file.name}: {wrong}\n".replace("\0", "").encode("utf-8", "replace")
            )
    os._exit(0)


def run_batch(jobs: list) -> list[str]:
    """Fork children until all jobs are done; what went wrong."""
    wrong: list[str] = []
    while jobs:
        back, front = os.pipe()
        originals = {job[2]: job[2].read_bytes() for job in jobs}
        pid = os.fork()
        if pid == 0:
            os.close(back)
            child(jobs, front)
        os.close(front)
        with os.fdopen(back, encoding="utf-8", errors="replace") as stream:
            lines = stream.read().splitlines()
        _, status = os.waitpid(pid, 0)
        wrong += [line for line in lines if line.startswith("!")]
        if status == 0:
            return wrong
        last = int([line for line in lines if not line.startswith("!")][-1])
        place = next(job for job in jobs if job[0] == last)
        wrong.append(f"! {last} {place[1].name}/{place[2].name}: killed by signal {os.waitstatus_to_exitcode(status)}")
        for file, data in originals.items():
            file.write_bytes(data)
        jobs = [job for job in jobs if job[0] > last]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng, wrong = random.Random(options.seed), []
    with tempfile.TemporaryDirectory(prefix="quamba-fuzz-") as root, torch.no_grad():
        folders = checkpoints(Path(root))
        ids = torch.arange(8).view(1, 8)
        expected = {name: QuambaLMHeadModel.from_pretrained(path)(ids).logits for name, path in folders.items()}
        for start in range(0, options.mutants, BATCH):
            jobs = []
            for number in range(start, min(start + BATCH, options.mutants)):
                name = rng.choice(list(folders))
                ours = name.startswith("quamba")
                file, change = mutate(rng, folders[name])
                verify = ours and rng.random() < 0.2
                if verify:
                    file, change = rng.choice(sorted(folders[name].glob("*.safetensors"))), damage_data
                data = change(rng, file.read_bytes())
                if data != file.read_bytes():
                    jobs.append((number, folders[name], file, data, expected[name] if ours else None, verify))
            wrong += run_batch(jobs)
    print(f"{options.mutants} mutants with seed {options.seed}: {len(wrong)} went wrong", *wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
