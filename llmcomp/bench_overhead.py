"""What a call costs beside its kernels: a decoding step of a model so narrow that its kernels take little time.

    python -m llmcomp.bench --overhead --dtype bfloat16 --threads 1

The compiled program is called directly, without Dynamo's guards and AOTAutograd's wrappers; the same host function
with foreign calls that launch nothing gives the part that is ours. Then the same model generates, by transformers'
loop and by llmcomp.generate.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from llmcomp.backend import compile_aten
from llmcomp.bench_model import Setup
from llmcomp.bench_peer import generate, loop_of
from llmcomp.capture import capture
from llmcomp.codegen.build import build
from llmcomp.codegen.cache import Cache
from llmcomp.codegen.cpp_plan import render_plan
from llmcomp.hostcode import plan_function
from llmcomp.options import read_options
from llmcomp.program import Executable

CALLS = 32  # in a row, less than the cache has room for
ROOM = 64
ROUNDS = 200


@dataclass(frozen=True)
class Overhead:
    """Seconds of one call, and of the part of it that is not kernels."""

    call: float
    host: float
    kernels: int
    inputs: int

    def __str__(self) -> str:
        return (
            f"one decoding step, {self.kernels} kernels, {self.inputs} inputs: {self.call * 1e6:.1f} us, "
            f"of which {self.host * 1e6:.1f} us are not kernels"
        )


def measure_overhead(setup: Setup, rounds: int = ROUNDS) -> Overhead:
    """Time a decoding step on the CPU with a static cache: the fastest of `rounds` rounds of CALLS calls."""
    torch.set_num_threads(setup.threads)
    program, inputs = decoding_step(setup)
    idle = without_kernels(program)
    with torch.no_grad():
        call, host = fastest([lambda: program(*inputs), lambda: idle(*inputs)], inputs, rounds)
    return Overhead(call, host, len(program.report.kernels), len(inputs))


@dataclass(frozen=True)
class Loops:
    """Seconds from one token to the next."""

    transformers: float
    ours: float

    def __str__(self) -> str:
        return (
            f"one token of model.generate: {self.transformers * 1e6:.0f} us, "
            f"of llmcomp.generate: {self.ours * 1e6:.0f} us"
        )


def measure_loops(setup: Setup, rounds: int = 20, new: int = 65) -> Loops:
    """Time both loops on one compiled model: the fastest of `rounds` greedy generations of `new` tokens, in turns."""
    torch.set_num_threads(setup.threads)
    model = setup.build()
    model.compile(backend="llmcomp")
    runs = [loop_of(model, loop) for loop in ("transformers", "llmcomp")]
    best = [float("inf")] * len(runs)
    for _ in range(rounds + 1):
        for i, run in enumerate(runs):
            best[i] = min(best[i], generate(run, setup, 1, 16, new)["rest"] / (new - 1))
    return Loops(*best)


def decoding_step(setup: Setup) -> tuple[Executable, Sequence[Any]]:
    """The compiled program of one token after a prompt, and its inputs."""
    model = setup.build()
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    with torch.no_grad():
        model(setup.prompt(1, 4), past_key_values=cache, use_cache=True)
    token = setup.prompt(1, 1)
    gm = capture(lambda ids: model(ids, past_key_values=cache, use_cache=True).logits, token)
    program, _ = compile_aten(gm, read_options({"target": "cpp"}))
    assert isinstance(program, Executable), "no compiler"
    return program, gm.meta["inputs"]


def without_kernels(program: Executable) -> Callable[..., object]:
    """The host function of `program` with foreign calls that launch nothing."""
    (built,) = build([render_plan("plan_of_nothing", [], [], [])], Cache(read_options().cache))
    nothing = plan_function(ctypes.CDLL(str(built.path)), "plan_of_nothing")
    run = program.run
    assert isinstance(run, FunctionType)
    plans = {name: nothing for name in run.__globals__ if name.startswith("plan_")}
    return FunctionType(run.__code__, {**run.__globals__, **plans})


def fastest(calls: Sequence[Callable[[], object]], inputs: Sequence[Any], rounds: int) -> list[float]:
    """Seconds of each of `calls`, taken in turns; positions in the cache start anew in every round."""
    start = [(x, x.clone()) for x in inputs if isinstance(x, Tensor) and not x.is_floating_point()]
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            for x, value in start:
                x.copy_(value)
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[i] = min(best[i], (time.perf_counter() - begin) / CALLS)
    return best
