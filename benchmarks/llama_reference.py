"""llama.cpp as an outside reference: our float models written as GGUF, quantized by it, and run by it.

Needs the packages gguf and llama-cpp-python. `python benchmarks/llama_reference.py MODEL` compares its float32 logits
with ours.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

FAMILIES = {"mamba1": "mamba", "mamba2": "mamba2"}
NAMES = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}


def write_gguf(model: str, path: Path) -> None:
    """MODEL, a float checkpoint with tied head, as a GGUF file in float32."""
    from gguf import GGUFWriter, TokenType

    from quamba.formats import open_checkpoint

    checkpoint = open_checkpoint(model)
    config, entry = checkpoint.config, checkpoint.config.blocks[0]
    args, family = entry["args"], entry["mixer"]
    inner = args.get("intermediate_size") or args["num_heads"] * args["head_dim"]
    writer = GGUFWriter(str(path), FAMILIES[family])
    writer.add_name(checkpoint.location.name)
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_ssm_conv_kernel(args["conv_kernel"])
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(args["state_size"])
    writer.add_ssm_time_step_rank(args["time_step_rank"] if family == "mamba1" else args["num_heads"])
    if family == "mamba1":
        writer.add_ssm_dt_b_c_rms(False)
    else:
        writer.add_ssm_group_count(args["n_groups"])

    tokenizer = json.loads((checkpoint.folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = {index: word for word, index in tokenizer["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    words |= special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in range(config.vocab_size)])
    kinds = [TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(config.vocab_size)]
    writer.add_token_types([kind if i in words else TokenType.UNUSED for i, kind in enumerate(kinds)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

    def add(name: str, tensor: Tensor) -> None:
        writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))

    add("token_embd.weight", checkpoint.read(["backbone.embedding.weight"])["backbone.embedding.weight"])
    add("output_norm.weight", checkpoint.read(["backbone.norm_f.weight"])["backbone.norm_f.weight"])
    for index in range(config.num_hidden_layers):
        for name, tensor in checkpoint.block(index).items():
            tensor = tensor.float()
            if name == "mixer.A_log":
                tensor = -tensor.exp()
            if name == "mixer.conv1d.weight":
                tensor = tensor.squeeze(1)
            if family == "mamba2" and name in ("mixer.A_log", "mixer.D"):
                tensor = tensor[:, None]
            if name == "mixer.norm.weight":
                tensor = tensor.view(args["n_groups"], -1)
            add(f"blk.{index}.{NAMES[name]}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(source: Path, target: Path, kind: str, vocabulary: str | None = None) -> None:
    """llama.cpp's own quantization with its defaults: Q8_0, Q4_0 or Q4_K_M. By these an embedding that is the head, too,
    has Q6_K (Q8_0 with Q8_0); `vocabulary` chooses its type instead. Convolution, norms, biases, A and D stay in float32,
    and Mamba1's dt_proj, with fewer inputs than a block, becomes float16."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread = torch.get_num_threads()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if vocabulary is not None:
        options.token_embedding_type = options.output_tensor_type = getattr(llama_cpp, f"GGML_TYPE_{vocabulary}")
    quiet(llama_cpp)
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not quantize {source.name} to {kind}")


def bits(path: Path) -> dict[str, Any]:
    """bytes of the file's tensors; bits a weight of the blocks and of the vocabulary; the type of each kind of tensor."""
    from gguf import GGUFReader

    stored, weights = {"body": 0, "vocabulary": 0}, {"body": 0, "vocabulary": 0}
    types = {}
    for tensor in GGUFReader(str(path)).tensors:
        part = "body" if tensor.name.startswith("blk.") else "vocabulary"
        stored[part] += int(tensor.n_bytes)
        weights[part] += int(tensor.n_elements)
        types[tensor.name.split(".", 2)[-1] if part == "body" else tensor.name] = tensor.tensor_type.name
    return {
        "bytes": sum(stored.values()),
        "body_bits": 8 * stored["body"] / weights["body"],
        "vocabulary_bits": 8 * stored["vocabulary"] / weights["vocabulary"],
        "types": types,
    }


def quiet(llama_cpp: Any) -> None:
    global _silence
    _silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(_silence, None)


class LlamaModel:
    """A GGUF file that answers as our models do: `model(input_ids=[B, L]).logits`, every row from an empty state."""

    def __init__(self, path: Path, context: int = 2048):
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self.llama = Llama(
            str(path),
            n_ctx=context,
            n_batch=context,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=True,
            verbose=False,
        )
        atexit.register(self.llama.close)  # or its own finaliser fails while Python shuts down
        self.config = SimpleNamespace(vocab_size=self.llama.n_vocab(), model_type="mamba")
        self.device, self.dtype, self.name_or_path = torch.device("cpu"), torch.float32, path.name

    def __call__(self, input_ids: Tensor, **_: Any) -> Any:
        rows = []
        for ids in input_ids.tolist():
            self.llama.reset()
            self.llama._ctx.kv_cache_clear()
            self.llama.eval(ids)
            rows.append(torch.from_numpy(self.llama.scores[: len(ids)].copy()))
        return SimpleNamespace(logits=torch.stack(rows))

    def eval(self) -> LlamaModel:
        return self

    def tie_weights(self) -> None:
        """The file is as it is."""


def main() -> None:
    import tempfile

    from quamba import QuambaLMHeadModel
    from quamba.evaluation import encode_text
    from quamba.formats import load_tokenizer

    name = sys.argv[1]
    ids = encode_text(load_tokenizer(name), "wikitext")[None, :300]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "float.gguf"
        write_gguf(name, path)
        ours = QuambaLMHeadModel.from_pretrained(name, dtype="float32")(ids).logits
        theirs = LlamaModel(path)(ids).logits
        print(
            f"{name}: logits differ by up to {(ours - theirs).abs().max():.2e} of {ours.std():.2f} (standard deviation)"
        )
        for kind in ("Q8_0", "Q4_0", "Q4_K_M"):
            target = Path(folder) / f"{kind}.gguf"
            quantize_gguf(path, target, kind)
            print(kind, bits(target))


if __name__ == "__main__":
    main()
