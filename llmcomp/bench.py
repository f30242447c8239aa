"""Compare ways to run a language model on this machine, side by side in one run.

    python -m llmcomp.bench                                          Llama-3.2-1B's dimensions, random weights
    python -m llmcomp.bench --model tiny --peers eager,llmcomp --json out.json
    python -m llmcomp.bench --config Qwen3Config --set num_hidden_layers=8 --dtype float32
    python -m llmcomp.bench --context 64,2048                        decoding behind long prompts too
    python -m llmcomp.bench --growing 512 --peers llmcomp,inductor   a loop of model(ids) without a cache
    python -m llmcomp.bench --peers llmcomp-int8,torchao-int8        quantized weights, with torchao if installed
    python -m llmcomp.bench --overhead                               what a call costs beside its kernels

Every peer is a process of its own, started twice: with empty caches (cold) and with those that this left
(warm). The warm ones stay, and are measured in turns: A B C A B C. What is printed is the median of the rounds.
The read bandwidth of the machine is measured in the same rounds; decoding at batch 1 cannot be faster than
reading the weights.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmcomp.bench_growing import compile_first, growing_table, measure_growing
from llmcomp.bench_machine import Bandwidth, describe, free_memory
from llmcomp.bench_model import MODELS, Setup
from llmcomp.bench_overhead import measure_loops, measure_overhead
from llmcomp.bench_peer import PEERS
from llmcomp.bench_process import Died, Process, running, say

DEFAULT_PEERS = "eager,inductor,inductor-freezing,llmcomp"


@dataclass(frozen=True)
class Load:
    """One thing to measure: a prompt of `prompt` tokens for each of `batch` rows, then `new` tokens."""

    name: str
    batch: int
    prompt: int
    new: int


@dataclass
class Measured:
    """What one peer showed: seconds of the first call, and per load tokens per second of every round."""

    cold: float | None = None
    warm: float = 0.0
    weights: int = 0
    peak: float = 0.0
    base: float = 0.0
    rates: dict[str, list[float]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    compiling: dict[str, float] = field(default_factory=dict)  # seconds of the parts of a warm start
    died: str = ""  # how, if its process did not live to the end


def loads(batches: Sequence[int], contexts: Sequence[int], prefill: int, new: int) -> tuple[Load, ...]:
    """Decoding at every batch size behind prompts of every length, and prefill."""
    first = contexts[0]
    decode = [Load(f"decode b{b}{'' if c == first else f' at {c}'}", b, c, new) for c in contexts for b in batches]
    return (*decode, Load(f"prefill {prefill}", 1, prefill, 2))


def run_load(process: Process, load: Load) -> dict[str, Any]:
    """Run a load once."""
    return process.ask("generate", batch=load.batch, prompt=load.prompt, new=load.new)


def rate(load: Load, answer: Mapping[str, Any]) -> float:
    """Tokens per second: of the prompt for a prefill load, of the tokens after the first for the others."""
    if load.name.startswith("prefill"):
        return float(load.batch * load.prompt / answer["first"])
    return float(load.batch * (load.new - 1) / answer["rest"])


def first_call(process: Process) -> float:
    """Seconds of the first short generation, in which everything is compiled."""
    answer = run_load(process, Load("first", 1, 64, 4))
    return float(answer["first"] + answer["rest"])


def measure(
    names: Sequence[str], setup: Setup, work: Sequence[Load], rounds: int, cold: bool
) -> tuple[dict[str, Measured], list[float]]:
    """Run all peers; also the bandwidth of each round, in bytes per second."""
    results = {name: Measured() for name in names}
    with tempfile.TemporaryDirectory(prefix="llmcomp-bench-") as folder, ExitStack() as stack:
        caches = Path(folder)
        for name, found in results.items() if cold else ():
            with surviving(name, found), running(name, setup, caches) as process:
                found.cold = first_call(process)
                say(f"{name}: first call {found.cold:.1f} s with empty caches")
        processes: dict[str, Process] = {}
        for name, found in living(results):
            with surviving(name, found):
                processes[name] = stack.enter_context(running(name, setup, caches))
                found.weights, found.warm = processes[name].weights, first_call(processes[name])
                say(f"{name}: first call {found.warm:.1f} s with warm caches; {free_memory()}")
                found.compiling = processes[name].ask("compiling")
                for load in work:
                    run_load(processes[name], load)
        bandwidth = Bandwidth(setup.device, setup.threads)
        speeds = [run_round(i, rounds, processes, results, work, bandwidth) for i in range(rounds)]
        for name, found in living(results):
            with surviving(name, found):
                memory = processes[name].ask("memory")
                found.peak, found.base = memory["peak"], memory["base"]
    return results, speeds


@contextmanager
def surviving(name: str, found: Measured) -> Iterator[None]:
    """Go on without a peer whose process dies."""
    try:
        yield
    except Died as death:
        found.died = str(death)
        say(f"{name} died: {found.died}")


def living(results: Mapping[str, Measured]) -> Iterator[tuple[str, Measured]]:
    """The peers whose processes have not died so far."""
    return ((name, found) for name, found in results.items() if not found.died)


def run_round(
    index: int,
    rounds: int,
    processes: Mapping[str, Process],
    results: Mapping[str, Measured],
    work: Sequence[Load],
    bandwidth: Bandwidth,
) -> float:
    """Every load once on every peer, in turns; return the bandwidth of the machine meanwhile."""
    for load in work:
        for name, found in living(results):
            with surviving(name, found):
                answer = run_load(processes[name], load)
                found.rates.setdefault(load.name, []).append(rate(load, answer))
                found.tokens = found.tokens or answer["tokens"]
    say(f"round {index + 1} of {rounds}")
    return bandwidth.measure()


def grow(names: Sequence[str], setup: Setup, prompt: int, new: int, stride: int) -> None:
    """Measure a loop without a cache, and print its table."""
    with tempfile.TemporaryDirectory(prefix="llmcomp-bench-") as folder, ExitStack() as stack:
        processes = {name: stack.enter_context(running(name, setup, Path(folder))) for name in names}
        for name, process in processes.items():
            say(f"{name}: compiled in {compile_first(process, prompt):.1f} s; {free_memory()}")
        results = measure_growing(processes, prompt, new, stride)
    print(f"{describe(setup.device, setup.threads)}\n{setup.config} {setup.settings} {setup.dtype}\n")
    print(growing_table(results, prompt, new))


def table(results: Mapping[str, Measured], work: Sequence[Load], bandwidth: float) -> str:
    """The medians as a Markdown table; the last two columns belong to decoding at batch 1."""
    reference = next((found.tokens for _, found in living(results)), [])
    speeds = [f"{load.name} tok/s" for load in work]
    head = ["peer", *speeds, "cold s", "warm s", "peak GB", "of read", "tokens"]
    rows = [head, ["---"] * len(head)]
    for name, found in results.items():
        if found.died:
            rows.append([name, f"died: {found.died}", *["-"] * (len(head) - 2)])
            continue
        middle = [statistics.median(found.rates[load.name]) for load in work]
        equal = sum(a == b for a, b in zip(found.tokens, reference, strict=False))
        rows.append(
            [
                name,
                *(f"{m:.1f}" for m in middle),
                "-" if found.cold is None else f"{found.cold:.1f}",
                f"{found.warm:.1f}",
                f"{(found.peak - found.base) / 1e9:.2f}",
                f"{100 * middle[0] * found.weights / bandwidth:.0f}%",
                f"{equal}/{len(reference)}",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def split(found: Measured) -> str:
    """What a warm start spends on compiling, by part."""
    parts = found.compiling
    text = f"{parts['dynamo']:.1f} s in Dynamo, {parts['backend']:.1f} s in the backend"
    if not parts["llmcomp"]:
        return text
    return f"{text} (AOTAutograd {parts['backend'] - parts['llmcomp']:.1f} s, llmcomp {parts['llmcomp']:.1f} s)"


NOTES = """\
cold, warm: seconds of the first generation (64 tokens in, 4 out) with empty and with filled caches.
peak GB: the most memory of the process beyond what it had before the model was made.
of read: bytes of weights read per second while decoding at batch 1, as a part of the machine's bandwidth.
tokens: greedy tokens equal to those of the first peer, up to chance at ties."""


def setting(text: str) -> tuple[str, object]:
    """A `--set` argument: name=value, the value in JSON where it can be read so."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="dimensions of a Llama; llama-3.2-1b by default")
    parser.add_argument("--config", default="LlamaConfig", help="a config class of transformers")
    parser.add_argument("--set", type=setting, nargs="*", default=[], help="attributes of the config")
    parser.add_argument("--vocab", type=int, help="size of the vocabulary")
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 or float16")
    parser.add_argument("--device", default="", help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peers", default=DEFAULT_PEERS, help=f"with commas, of {', '.join(PEERS)}")
    parser.add_argument("--batch", default="1,8", help="batch sizes of decoding, with commas")
    parser.add_argument("--context", default="64", help="tokens of the prompts before decoding, with commas")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--new", type=int, default=33, help="tokens that a decoding run generates")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--overhead", action="store_true", help="measure only what a call costs beside its kernels")
    parser.add_argument("--growing", type=int, help="measure only so many calls of a loop without a cache")
    parser.add_argument("--stride", type=int, default=1, help="with --growing: other peers run every so manyth call")
    parser.add_argument("--no-cold", action="store_true", help="leave out the runs with empty caches")
    parser.add_argument("--json", type=Path, help="where to write every number")
    return parser.parse_args(arguments)


def setup_of(args: argparse.Namespace) -> Setup:
    """The model that the command line asks for: a Llama's dimensions, or a config class with its defaults."""
    model = args.model or ("narrow" if args.overhead else "llama-3.2-1b")
    dimensions = MODELS[model] if args.config == "LlamaConfig" else {}
    settings = {**dimensions, **dict(args.set)}
    if args.vocab is not None:
        settings["vocab_size"] = args.vocab
    return Setup(args.config, settings, args.dtype, args.device or default_device(), args.threads)


def default_device() -> str:
    """cuda where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    args = parse(arguments)
    names = args.peers.split(",")
    if unknown := set(names) - set(PEERS):
        raise SystemExit(f"expected peers of {', '.join(PEERS)}, found {', '.join(sorted(unknown))}")
    setup = setup_of(args)
    if args.overhead:
        print(f"{describe('cpu', setup.threads)}\n{measure_overhead(setup)}\n{measure_loops(setup)}")
        return
    if args.growing is not None:
        grow(names, setup, int(args.context.split(",")[0]), args.growing, args.stride)
        return
    batches, contexts = ([int(n) for n in text.split(",")] for text in (args.batch, args.context))
    work = loads(batches, contexts, args.prefill, args.new)
    machine = describe(setup.device, setup.threads)
    results, speeds = measure(names, setup, work, args.rounds, not args.no_cold)
    bandwidth = statistics.median(speeds)
    print(f"{machine}\n{setup.config} {setup.settings} {setup.dtype}")
    lowest, highest = min(speeds) / 1e9, max(speeds) / 1e9
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s (rounds: {lowest:.1f} to {highest:.1f})")
    print(f"\n{table(results, work, bandwidth)}\n")
    for name, found in living(results):
        if found.compiling["backend"]:
            print(f"{name}, compiling with warm caches: {split(found)}")
    print(f"\n{NOTES}")
    if args.json:
        record = {"machine": machine, "setup": asdict(setup), "loads": [asdict(w) for w in work]}
        peers = {name: asdict(found) for name, found in results.items()}
        args.json.write_text(json.dumps({**record, "bandwidth": speeds, "peers": peers}, indent=1))


if __name__ == "__main__":
    main()
