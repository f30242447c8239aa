"""llama.cpp as a peer of the benchmark: the same random weights in a GGUF file, run by its shared library.

$LLAMA_CPP is the folder of libllama and its ggml libraries, as its builds and releases have them (version 0.5.0 was
tried); the package `gguf` writes the file. A Llama's matrices become Q8_0 or Q4_0, its head Q8_0 with both.
"""

import ctypes
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmcomp.bench_model import Setup

FOLDER = "LLAMA_CPP"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
AT_ONCE = 8192  # rows of a matrix that are quantized together


def file_name(parameter: str) -> str:
    """What GGUF calls a parameter of a Llama: model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    module = parameter.removesuffix(".weight")
    if module in OUTER:
        return f"{OUTER[module]}.weight"
    number, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[inner]}.weight"


def write(path: Path, setup: Setup, weights: str) -> None:
    """Write the model of `setup` with its matrices in `weights`, a type of GGUF."""
    gguf: Any = importlib.import_module("gguf")
    model = setup.build()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    for name, parameter in model.named_parameters():  # shared ones once
        kind = gguf.GGMLQuantizationType["F32" if parameter.ndim == 1 else weights]
        if name.startswith(tuple(OUTER)) and parameter.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
        matrix = parameter.detach()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # the halves of a head take turns
            matrix = matrix.view(-1, 2, config.head_dim // 2, config.hidden_size).transpose(1, 2).reshape(matrix.shape)
        pieces = [gguf.quants.quantize(rows.float().numpy(), kind) for rows in matrix.split(AT_ONCE)]
        writer.add_tensor(file_name(name), np.concatenate(pieces), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class _Settings(ctypes.Structure):
    """Settings as the library returns them by value, with room for more than they have; some begin with numbers."""

    _fields_ = [("numbers", ctypes.c_uint32 * 3), ("rest", ctypes.c_uint32 * 253)]


class _Batch(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int32), ("parts", ctypes.c_void_p * 6)]


class Library:
    """The few functions of libllama that greedy decoding takes."""

    def __init__(self, folder: Path, model: Path, setup: Setup, room: int) -> None:
        ggml = ctypes.CDLL(str(library(folder, "ggml")), ctypes.RTLD_GLOBAL)
        self.llama = ctypes.CDLL(str(library(folder, "llama")), ctypes.RTLD_GLOBAL)
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        self.llama.llama_backend_init()
        for name in ("llama_model_default_params", "llama_context_default_params"):
            getattr(self.llama, name).restype = _Settings
        for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory"):
            getattr(self.llama, name).restype = ctypes.c_void_p  # an item is a new function each time
        self.llama.llama_batch_get_one.restype = _Batch
        self.llama.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
        loaded = self.llama.llama_model_load_from_file(str(model).encode(), self.llama.llama_model_default_params())
        assert loaded, f"{model} was not loaded"
        settings = self.llama.llama_context_default_params()
        settings.numbers[:] = (room, room, min(512, room))  # context, tokens of a batch, of those computed together
        self.context = ctypes.c_void_p(self.llama.llama_init_from_model(ctypes.c_void_p(loaded), settings))
        assert self.context, "no context was made"
        self.llama.llama_set_n_threads(self.context, setup.threads, setup.threads)
        self.vocabulary = int(setup.settings["vocab_size"])

    def forget(self) -> None:
        """Empty the cache."""
        memory = ctypes.c_void_p(self.llama.llama_get_memory(self.context))
        self.llama.llama_memory_clear(memory, ctypes.c_bool(True))

    def next(self, tokens: list[int]) -> int:
        """The most likely token behind those so far and `tokens`."""
        given = (ctypes.c_int32 * len(tokens))(*tokens)
        status = self.llama.llama_decode(self.context, self.llama.llama_batch_get_one(given, len(tokens)))
        assert status == 0, f"llama_decode gave {status}"
        logits = self.llama.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def generate(self, tokens: list[int], new: int) -> dict[str, Any]:
        """Seconds to the first token and from there to the last, and the tokens."""
        self.forget()
        start = time.perf_counter()
        found = [self.next(tokens)]
        first = time.perf_counter()
        while len(found) < new:
            found.append(self.next(found[-1:]))
        return {"first": first - start, "rest": time.perf_counter() - first, "tokens": found}


def library(folder: Path, name: str) -> Path:
    """The file of a library: libggml.so, or with a version in its name.

    Raises:
        SystemExit: the folder does not have it.
    """
    found = sorted(folder.glob(f"lib{name}.so")) + sorted(folder.glob(f"lib{name}.*so*"))
    if not found:
        raise SystemExit(f"expected lib{name}.so in the folder that ${FOLDER} names, found none in {folder}")
    return found[0]


def serve(weights: str, setup: Setup, room: int = 4096) -> Any:
    """Write the model in a process of its own, whose memory is not ours; load it.

    Returns:
        the library, and the bytes of the weights.
    """
    folder = Path(os.environ.get(FOLDER, "."))
    library(folder, "llama")
    with tempfile.TemporaryDirectory(prefix="llmcomp-gguf-") as place:
        path = Path(place) / "model.gguf"
        described = json.dumps([setup.config, setup.settings, setup.dtype, setup.device, setup.threads])
        command = [sys.executable, "-m", "llmcomp.bench_llama_cpp", str(path), weights, described]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return Library(folder, path, setup, room), path.stat().st_size  # the mapped file outlives its name


def answer_command(peer: Library, setup: Setup, command: Mapping[str, Any]) -> dict[str, Any]:
    """What a command of the benchmark (llmcomp/bench_peer.py) is answered with."""
    if command["do"] == "generate" and command["batch"] == 1:
        return peer.generate(setup.prompt(1, command["prompt"])[0].tolist(), command["new"])
    raise SystemExit(f"expected decoding at batch 1, found {dict(command)}: run llama.cpp with --batch 1")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Setup(*json.loads(sys.argv[3])), sys.argv[2])
