"""One peer of a benchmark, in a process of its own: builds the model, then does what it reads from stdin.

    {"do": "generate", "batch": 1, "prompt": 64, "new": 64}  ->  {"first": 0.1, "rest": 2.5, "tokens": [...]}
    {"do": "grow", "start": 64, "stop": 128, ...}            ->  {"seconds": {...}, "chosen": {...}, "tokens": [...]}
    {"do": "steps", "batch": 1, "context": 64, ...}          ->  {"seconds": [...], "host": 2e-5, "tokens": [...]}
    {"do": "memory"}                                         ->  {"peak": 2.5e9, "base": 0.4e9}
    {"do": "compiling"}                                      ->  {"dynamo": 5.1, "backend": 4.2, "llmcomp": 1.2}

Answers are lines that begin with MARK; anything else on stdout is chatter of the libraries.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from llmcomp import bench_llama_cpp, compat, generation
from llmcomp.bench_model import Setup, bytes_per_token
from llmcomp.bench_steps import Steps
from llmcomp.masks import release
from llmcomp.pruning import prune_
from llmcomp.quantization import quantize_
from llmcomp.sparsity import NM, Block, Sparsity, Structured

MARK = "bench:"


@dataclass(frozen=True)
class Peer:
    """A way to run the model: a backend of torch.compile or none, and what is set before torch starts."""

    backend: str | None
    mode: str | None = None
    loop: str = "transformers"  # whose generate: model.generate or llmcomp.generate
    static: bool = False  # a static cache, for which transformers compiles decoding itself
    weights: str = ""  # a format of ours for the weights, or (with another backend) the name of a config of torchao's
    environment: Mapping[str, str] = field(default_factory=dict)
    pruned: Sparsity | None = None


# Inductor's programmatic dependent launch; torch reads it when it starts.
PDL = {"TORCHINDUCTOR_ENABLE_PDL": "1"}
FREEZING = {"TORCHINDUCTOR_FREEZING": "1"}
PEERS = {
    "eager": Peer(None),
    "dynamo": Peer("eager"),  # Dynamo's own trace, which every backend pays for
    "inductor": Peer("inductor"),
    "inductor-freezing": Peer("inductor", environment=FREEZING),
    "inductor-max-autotune": Peer("inductor", "max-autotune"),
    "inductor-reduce-overhead": Peer("inductor", "reduce-overhead"),
    "hf-static": Peer(None, static=True),
    "hf-reduce-overhead": Peer("inductor", "reduce-overhead", static=True),
    "hf-max-autotune": Peer("inductor", "max-autotune", static=True),
    "hf-reduce-overhead-pdl": Peer("inductor", "reduce-overhead", static=True, environment=PDL),
    "hf-max-autotune-pdl": Peer("inductor", "max-autotune", static=True, environment=PDL),
    "hf-torchao-int8": Peer("inductor", "max-autotune", static=True, weights="Int8WeightOnlyConfig"),
    "hf-torchao-fp8": Peer("inductor", "max-autotune", static=True, weights="Float8WeightOnlyConfig"),
    "hf-torchao-int4": Peer("inductor", "max-autotune", static=True, weights="Int4WeightOnlyConfig"),
    "hf-llmcomp": Peer("llmcomp", "reduce-overhead", static=True),
    "hf-llmcomp-int8": Peer("llmcomp", "reduce-overhead", static=True, weights="int8"),
    "hf-llmcomp-fp8": Peer("llmcomp", "reduce-overhead", static=True, weights="fp8"),
    "hf-llmcomp-int4": Peer("llmcomp", "reduce-overhead", static=True, weights="int4"),
    "llmcomp": Peer("llmcomp"),
    "llmcomp-max-autotune": Peer("llmcomp", "max-autotune"),
    "llmcomp-generate": Peer("llmcomp", loop="llmcomp"),
    "llmcomp-int8": Peer("llmcomp", weights="int8"),
    "llmcomp-int8_dynamic": Peer("llmcomp", weights="int8_dynamic"),
    "llmcomp-fp8": Peer("llmcomp", weights="fp8"),
    "llmcomp-int4": Peer("llmcomp", weights="int4"),
    "llmcomp-int4_g32": Peer("llmcomp", weights="int4_g32"),
    "llmcomp-nf4": Peer("llmcomp", weights="nf4"),
    "llmcomp-2:4": Peer("llmcomp", pruned=NM(2, 4)),
    "llmcomp-int8-2:4": Peer("llmcomp", pruned=NM(2, 4), weights="int8"),
    "llmcomp-channels": Peer("llmcomp", pruned=Structured(channels=0.25)),
    "llmcomp-channels-50": Peer("llmcomp", pruned=Structured(channels=0.5)),
    "llmcomp-blocks": Peer("llmcomp", pruned=Block(0.5, 32, 32)),
    "eager-2:4": Peer(None, pruned=NM(2, 4)),
    "torchao-int8": Peer("inductor", weights="Int8WeightOnlyConfig", environment=FREEZING),
    "llama.cpp-q8_0": Peer("llama.cpp", weights="Q8_0"),
    "llama.cpp-q4_0": Peer("llama.cpp", weights="Q4_0"),
    "torchao-w8a8": Peer("inductor", weights="Int8DynamicActivationInt8WeightConfig", environment=FREEZING),
}


class Clock(BaseStreamer):
    """Notes when each token arrives; the first call is that of the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called by generate with the prompt, then with the tokens of each step."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by generate at the end."""


def loop_of(model: Any, loop: str) -> Callable[..., Tensor]:
    """The function that generates: transformers' own or ours."""
    generates: Callable[..., Any] = model.generate if loop == "transformers" else partial(generation.generate, model)
    return generates


def settings_of(peer: Peer) -> dict[str, Any]:
    """What a generation of `peer` is asked for beside its length."""
    if not peer.static:
        return {"disable_compile": True}
    if peer.backend is None:
        return {"cache_implementation": "static", "disable_compile": True}
    compiling = transformers.CompileConfig(backend=peer.backend, mode=peer.mode or "default")
    return {"cache_implementation": "static", "compile_config": compiling}


def generate(
    run: Callable[..., Tensor],
    setup: Setup,
    batch: int,
    prompt: int,
    new: int,
    settings: Mapping[str, Any] = MappingProxyType({"disable_compile": True}),
) -> dict[str, Any]:
    """Seconds to the first token and from there to the last, and the tokens of the first row."""
    ids, clock = setup.prompt(batch, prompt), Clock()
    start = time.perf_counter()
    with torch.no_grad():
        out = run(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            streamer=clock,
            **settings,
        )
    first, last = clock.times[1], clock.times[-1]
    return {"first": first - start, "rest": last - first, "tokens": out[0, prompt:].tolist()}


def grow(
    model: Any, setup: Setup, start: int, stop: int, stride: int, tokens: list[int], chooses: bool
) -> dict[str, Any]:
    """Calls of the model with `start` to `stop` - 1 tokens: `tokens` and what comes of them where the peer `chooses`,
    else those given. Seconds and the token chosen, by length.
    """
    known = setup.prompt(1, start)[0].tolist() if not tokens else list(tokens)
    seconds, chosen = {}, {}
    for length in range(start, stop, stride):
        ids = torch.tensor([known[:length]], device=setup.device)
        begin = time.perf_counter()
        with torch.no_grad():
            token = int(model(ids).logits[0, -1].argmax())
        seconds[length], chosen[length] = time.perf_counter() - begin, token
        if chooses:
            known.append(token)
    return {"seconds": seconds, "chosen": chosen, "tokens": known}


def memory(device: str, base: float) -> dict[str, float]:
    """The most bytes that this process has held, and those it held before the model."""
    if device == "cuda":
        return {"peak": float(torch.cuda.max_memory_allocated()), "base": 0.0}
    return {"peak": resident(), "base": base}


def resident() -> float:
    """The largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def answer(fields: Mapping[str, object]) -> None:
    """Write one line to the parent."""
    print(MARK + json.dumps(fields), flush=True)


def commands() -> Iterator[dict[str, Any]]:
    """What the parent asks, until it closes the pipe."""
    return map(json.loads, sys.stdin)


def quantize_one(peer: Peer, model: Any, weight: Tensor) -> None:
    """Quantize a weight as ours are: one by one, while they are loaded; those that are pruned are so before."""
    if peer.weights and peer.backend == "llmcomp" and not peer.pruned:
        quantize_(model, peer.weights, lambda other: other is weight)


def quantize(model: Any, peer: Peer) -> None:
    """Quantize the weights of a pruned model, or as the others do it."""
    if not peer.weights or peer.backend == "llmcomp":
        if peer.weights and peer.pruned:
            quantize_(model, peer.weights)
        return
    torchao: Any = importlib.import_module("torchao.quantization")
    torchao.quantize_(model, getattr(torchao, peer.weights)())


def prune(model: Any, peer: Peer) -> None:
    """Prune the weights of the model as the peer has it."""
    if peer.pruned:
        prune_(model, peer.pruned)
        release(model)  # nothing is trained, and masks take memory


def serve_llama_cpp(peer: Peer, setup: Setup, base: float) -> None:
    """Serve the peer that runs no model of transformers."""
    library, size = bench_llama_cpp.serve(peer.weights, setup)
    answer({"weights": size, "pid": os.getpid()})
    for command in commands():
        match command["do"]:
            case "compiling":
                answer({"dynamo": 0.0, "backend": 0.0, "llmcomp": 0.0})
            case "memory":
                answer(memory(setup.device, base))
            case _:
                answer(bench_llama_cpp.answer_command(library, setup, command))


def main() -> None:
    """Serve one peer: `python -m llmcomp.bench_peer PEER SETUP`."""
    peer, setup = PEERS[sys.argv[1]], Setup(**json.loads(sys.argv[2]))
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(setup.threads)
    base = resident()
    if peer.backend == "llama.cpp":
        return serve_llama_cpp(peer, setup, base)
    model = setup.build(partial(quantize_one, peer))
    prune(model, peer)
    quantize(model, peer)
    if peer.backend is not None and not peer.static:
        model.compile(backend=peer.backend, mode=peer.mode)
    answer({"weights": bytes_per_token(model), "pid": os.getpid()})
    run, steps = loop_of(model, peer.loop), Steps(model, setup, peer.backend, peer.mode)
    for command in commands():
        match command.pop("do"):
            case "generate":
                answer(generate(run, setup, settings=settings_of(peer), **command))
            case "grow":
                answer(grow(model, setup, **command))
            case "steps":
                answer(steps.measure(**command))
            case "compiling":
                answer(compat.compile_seconds())
            case _:
                answer(memory(setup.device, base))


if __name__ == "__main__":
    main()
