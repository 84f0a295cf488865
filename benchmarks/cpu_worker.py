"""The measuring side of cpu.py: one engine in a process of its own (llama.cpp, ours or transformers'), which answers one
request a line.

llama.cpp is measured as llama-bench does: through its C functions, n_batch = n_ubatch = 512, logits of the last token
only, the state cleared before each prompt; decoding is one llama_decode a token. It never shares a process with torch,
whose OpenMP runtime is another one.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from cpu_models import make, quiet
from cpu_probe import probe

BATCH = 512
GENERATE_PROMPT = 16
SHORT = 32  # tokens of the untimed run after the number of threads changed


class Engine:
    """Engines know how to `load`, `use` a number of threads, `read` a prompt from an empty state, `step` from the token at a
    position to the next, `write` greedily after a short prompt, with the time of each token, and their `facts`: bytes of
    the weights that one decoded token reads, and kernels. Tokens are `self.ids`, the same for all."""

    load: Any
    use: Any
    read: Any
    step: Any
    write: Any
    facts: Any

    def __init__(self, task: dict[str, Any]):
        self.task, self.threads = task, 0
        self.ids = random.Random(0).choices(range(1, task["vocabulary"]), k=task["longest"])
        self.load()

    def set_threads(self, threads: int) -> None:
        if threads != self.threads:
            self.threads = threads
            self.use(threads)
            self.run(threads, SHORT, 2)

    def run(self, threads: int, prompt: int, decode: int) -> dict[str, float]:
        self.set_threads(threads)
        started = time.perf_counter()
        self.read(prompt)
        read = time.perf_counter()
        for i in range(decode):
            self.step(prompt + i)
        return {"prefill": read - started, "decode": time.perf_counter() - read}

    def generate(self, threads: int, decode: int) -> dict[str, float]:
        """Seconds from the first generated token to `decode` tokens later."""
        self.set_threads(threads)
        times = self.write(decode + 1)
        return {"generate": times[decode] - times[0]}


class Clock:
    """A streamer for `generate`: when the prompt and each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to be shown."""


class Torch(Engine):
    """What ours and transformers' have in common."""

    open: Any

    def load(self) -> None:
        import torch

        self.tokens = torch.tensor([self.ids])
        self.steps = [self.tokens[:, i : i + 1] for i in range(len(self.ids))]
        dtype = self.task["dtype"]
        with quiet():
            self.model = self.open(getattr(torch, dtype) if dtype else "auto")
        self.model.generation_config.eos_token_id = None
        self.mode = torch.inference_mode()
        self.mode.__enter__()

    def use(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)

    def write(self, tokens: int) -> list[float]:
        clock = Clock()
        prompt = self.tokens[:, :GENERATE_PROMPT]
        self.model.generate(prompt, max_new_tokens=tokens, do_sample=False, streamer=clock)
        return clock.times[1:]

    def facts(self) -> dict[str, Any]:
        weights = set(self.model.parameters())
        if self.model.get_output_embeddings().weight is not self.model.get_input_embeddings().weight:
            weights -= set(self.model.get_input_embeddings().parameters())
        return {"bytes": sum(p.nbytes for p in weights)}


class Quamba(Torch):
    def open(self, dtype: Any) -> Any:
        from quamba import QuambaLMHeadModel

        return QuambaLMHeadModel.from_pretrained(self.task["path"], dtype=dtype)

    def read(self, tokens: int) -> None:
        self.state = self.model.new_state()
        self.model(self.tokens[:, :tokens], past_key_values=self.state, logits_to_keep=1)

    def step(self, position: int) -> None:
        self.model(self.steps[position], past_key_values=self.state, logits_to_keep=1)

    def facts(self) -> dict[str, Any]:
        import quamba_kernels

        return super().facts() | {"kernels": quamba_kernels.describe()}

    def outside(self, threads: int, prompt: int, decode: int) -> dict[str, float]:
        """The share of a decoded token that is not spent inside the call that replays it: Python's, ctypes' and torch's."""
        from quamba_kernels.cpu import library

        if not library.available():
            return {}
        self.set_threads(threads)
        inside, loaded = [0.0], library.library()
        replay, decoder = loaded.quamba_replay, self.model._decoder
        loaded.quamba_replay = timed(replay, inside)
        try:
            self.model._decoder = type(self.model._decoder)()  # recordings made now call what is timed
            self.read(prompt)
            for i in range(3):
                self.step(i)
            inside[0] = 0.0
            started = time.perf_counter()
            for i in range(decode):
                self.step(prompt + i)
            whole = time.perf_counter() - started
        finally:
            loaded.quamba_replay, self.model._decoder = replay, decoder
        return {"outside": 1 - inside[0] / whole} if inside[0] else {}

    def reload(self, threads: int) -> dict[str, float]:
        """Seconds of reading the model's files and of loading the model, all of them in the page cache."""
        self.set_threads(threads)
        files = sorted(Path(self.task["path"]).glob("*.safetensors"))
        read_files(files)
        started = time.perf_counter()
        read_files(files)
        read = time.perf_counter()
        with quiet():
            self.open("auto")
        return {"file": read - started, "load": time.perf_counter() - read}


class Transformers(Torch):
    def open(self, dtype: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.task["path"], dtype=dtype).eval()

    def read(self, tokens: int) -> None:
        out = self.model(input_ids=self.tokens[:, :tokens], use_cache=True, logits_to_keep=1)
        name = "past_key_values" if "past_key_values" in out else "cache_params"
        self.state = {name: out[name]}

    def step(self, position: int) -> None:
        self.model(input_ids=self.steps[position], **self.state, use_cache=True)


class Llama(Engine):
    def load(self) -> None:
        import llama_cpp

        self.c = llama_cpp
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silence, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            self.task["path"].encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp can't load {self.task['path']}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = len(self.ids)
        options.n_batch = options.n_ubatch = BATCH
        options.n_threads = options.n_threads_batch = self.task["threads"]
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.array = (ctypes.c_int32 * len(self.ids))(*self.ids)
        self.sampler = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        llama_cpp.llama_sampler_chain_add(self.sampler, llama_cpp.llama_sampler_init_greedy())

    def use(self, threads: int) -> None:
        self.c.llama_set_n_threads(self.context, threads, threads)

    def feed(self, tokens: Any, count: int) -> None:
        if self.c.llama_decode(self.context, self.c.llama_batch_get_one(tokens, count)):
            raise RuntimeError("llama_decode failed")

    def at(self, position: int) -> Any:
        return ctypes.cast(ctypes.byref(self.array, 4 * position), ctypes.POINTER(ctypes.c_int32))

    def read(self, tokens: int) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), False)
        for start in range(0, tokens, BATCH):
            self.feed(self.at(start), min(BATCH, tokens - start))
        self.c.llama_synchronize(self.context)

    def step(self, position: int) -> None:
        self.feed(self.at(position), 1)
        self.c.llama_synchronize(self.context)

    def write(self, tokens: int) -> list[float]:
        self.read(GENERATE_PROMPT)
        token, times = (ctypes.c_int32 * 1)(), []
        for _ in range(tokens):
            token[0] = self.c.llama_sampler_sample(self.sampler, self.context, -1)
            times.append(time.perf_counter())
            if len(times) < tokens:
                self.feed(token, 1)
        return times

    def facts(self) -> dict[str, Any]:
        """Here the embedding is the head: the files are written from tied models."""
        system = self.c.llama_print_system_info().decode()
        on = [part.split(" = ")[0].split(":")[-1].strip() for part in system.split("|") if part.strip().endswith("= 1")]
        return {"bytes": self.c.llama_model_size(self.model), "kernels": " ".join(on)}


ENGINES: dict[str, type[Engine]] = {"quamba": Quamba, "transformers": Transformers, "llama.cpp": Llama}


def start(task: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    """Load a model and read a prompt: seconds to the first logits with and without the start of Python and the imports."""
    kind = ENGINES[task["engine"]]
    if kind is Llama:
        import llama_cpp  # noqa: F401
    else:
        import torch
        import transformers  # noqa: F401
        from transformers import AutoModelForCausalLM  # noqa: F401

        torch.set_num_threads(task["threads"])
        if kind is Quamba:
            import quamba.formats
            import quamba.model  # noqa: F401
    ready = time.monotonic()
    engine = kind(task)
    engine.threads = task["threads"]
    engine.read(task["prompt"])
    first = time.monotonic()
    engine.run(engine.threads, min(SHORT, task["prompt"]), 4)
    status = Path("/proc/self/status")
    peak = [line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line] if status.exists() else []
    found = {"first_token": first - ready, "first_token_and_imports": first - task["spawned"]}
    return engine, found | engine.facts() | ({"peak_memory": 1024 * int(peak[0])} if peak else {})


def timed(call: Any, total: list[float]) -> Any:
    def wrapper(*args: Any) -> Any:
        started = time.perf_counter()
        result = call(*args)
        total[0] += time.perf_counter() - started
        return result

    return wrapper


def read_files(files: list[Path]) -> None:
    buffer = bytearray(8 << 20)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not become an answer
    engine: Any = None
    for line in sys.stdin:
        task = json.loads(line)
        do = task.pop("do")
        try:
            if do == "start":
                engine, answer = start(task)
            else:
                answer = {"make": make, "probe": probe}[do](task) if engine is None else getattr(engine, do)(**task)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
