"""Everything there is to know of this compiler on a GPU, in parts of a few minutes each; examples/gpu_check.py runs it.

    python examples/gpu_check.py                          all parts
    python examples/gpu_check.py --part tests,steps       some
    python examples/gpu_check.py --device cpu --tiny      the logic of all of them, without a GPU

Every part is a process of its own with a limit of time: one that hangs or dies has a row that says so. After each, all
that is known so far is in the folder: gpu.json and gpu.md.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llmcomp.bench_kernels import (
    BACKENDS,
    DENSE,
    LLAMA_8B,
    PACKED,
    Heads,
    Row,
    failed,
    measure_attention,
    measure_product,
    products,
)
from llmcomp.bench_machine import describe, installed
from llmcomp.bench_model import MODELS, NARROW, Setup
from llmcomp.bench_process import Died, Process, running, say
from llmcomp.bench_timing import Limits, limits

ROOT = Path(__file__).resolve().parent.parent
PART_SECONDS = 560.0
TEST_SECONDS = 500.0
GPT2 = {"n_positions": 1024, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Asked:
    """What a part is told."""

    device: str
    tiny: bool
    folder: Path
    rounds: int

    def setup(self, model: str) -> Setup:
        """A model in bfloat16, or a tiny one of the same kind."""
        gpt2 = model == "gpt2"
        settings: dict[str, Any] = dict(GPT2) if gpt2 else dict(MODELS[model])
        if self.tiny:
            narrow = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
            settings = narrow if gpt2 else {**NARROW, "num_hidden_layers": 2}
        return Setup(
            "GPT2Config" if gpt2 else "LlamaConfig", settings, "bfloat16", self.device, torch.get_num_threads()
        )


Part = Callable[[Asked], Iterator[Row]]


# ---- parts without a model ---------------------------------------------------------------------------------


def tests_in(*names: str) -> Part:
    """The tests of files that need a GPU; without one they are skipped."""

    def part(asked: Asked) -> Iterator[Row]:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rfE", "--tb=short"]
        if find_spec("xdist") is not None and not asked.tiny:
            command += ["-n", "6"]
        files = [str(ROOT / "tests" / f"{name}.py") for name in names]
        path, note = asked.folder / f"{'-'.join(names)}.log", ""
        with open(path, "w") as log:
            try:
                subprocess.run([*command, *files], cwd=ROOT, stdout=log, stderr=log, timeout=TEST_SECONDS)
            except subprocess.TimeoutExpired:
                note = f"stopped after {TEST_SECONDS:.0f} s; "
        lines = path.read_text().strip().splitlines() or [""]
        yield Row(" ".join(names), "pytest", note=note + lines[-1])
        for line in lines:
            if line.startswith(("FAILED", "ERROR")):
                yield Row(" ".join(names), "pytest", note=line[:200])

    return part


def kernels(asked: Asked) -> Iterator[Row]:
    """Matrix products by rows, beside the library."""
    shapes, rows = (((96, 64),), (1, 5)) if asked.tiny else (LLAMA_8B, (1, 2, 4, 8, 16, 32, 64, 512, 4096))
    for product in products(rows, shapes):
        for peer, make in DENSE.items():
            yield measure_product(product, peer, make, 2.0, 0.01, asked.device)


def quantized(asked: Asked) -> Iterator[Row]:
    """Products with weights in fewer bits, beside those of others."""
    shapes, rows = (((128, 128),), (1,)) if asked.tiny else (LLAMA_8B[2:], (1, 16, 64))
    for product in products(rows, shapes):
        for peer, (make, width, bound) in PACKED.items():
            yield measure_product(product, peer, make, width, bound, asked.device)


def attention(asked: Asked) -> Iterator[Row]:
    """A prompt, and one query behind long contexts, beside SDPA's backends."""
    shapes = [Heads(n, n) for n in (1024, 4096, 16384)] + [
        Heads(1, n, b) for b in (1, 16) for n in (4096, 16384, 65536)
    ]
    for shape in [Heads(16, 16, 1, 4, 2, 16), Heads(1, 32, 1, 4, 2, 16)] if asked.tiny else shapes:
        for peer in ("llmcomp", *BACKENDS):
            yield measure_attention(shape, peer, asked.device)


# ---- parts with a model ------------------------------------------------------------------------------------

STEP_PEERS = ("hf-static", "hf-reduce-overhead", "hf-max-autotune", "hf-max-autotune-pdl", "llmcomp", "hf-llmcomp")
LOOP_PEERS = ("eager", *STEP_PEERS, "llmcomp-generate")


def steps_of(model: str, batches: Sequence[int], contexts: Sequence[int], peers: Sequence[str] = STEP_PEERS) -> Part:
    """The time of a decoding step, its tokens fed back."""

    def part(asked: Asked) -> Iterator[Row]:
        count = 16 if asked.tiny else 64
        loads = [(1, 8)] if asked.tiny else [(b, c) for c in contexts for b in batches]
        asks = {f"{model} b{b} at {c}": ("steps", {"batch": b, "context": c, "count": count}) for b, c in loads}
        yield from in_turns(asked, asked.setup(model), peers[::5] if asked.tiny else peers, asks, step_row)

    return part


def step_row(what: str, peer: str, answers: Sequence[Mapping[str, Any]], weights: int) -> Row:
    """The median step of all rounds."""
    seconds = statistics.median(s for a in answers for s in a["seconds"])
    host = statistics.median(a["host"] for a in answers)
    return Row(what, peer, seconds, float(weights), note=f"host {host * 1e6:.0f} us")


def loops_of(model: str) -> Part:
    """Tokens of whole generations, by the loop of each peer."""

    def part(asked: Asked) -> Iterator[Row]:
        new, loads = (4, [(1, 8)]) if asked.tiny else (128, [(1, 128), (16, 128)])
        asks = {f"{model} b{b} generate": ("generate", {"batch": b, "prompt": p, "new": new}) for b, p in loads}
        peers = ("eager", "llmcomp-generate") if asked.tiny else LOOP_PEERS

        def row(what: str, peer: str, answers: Sequence[Mapping[str, Any]], weights: int) -> Row:
            return Row(what, peer, statistics.median(a["rest"] for a in answers) / (new - 1), float(weights))

        yield from in_turns(asked, asked.setup(model), peers, asks, row)

    return part


def prefill_of(model: str) -> Part:
    """The time to the first token of a prompt."""

    def part(asked: Asked) -> Iterator[Row]:
        lengths = (16,) if asked.tiny else (512, 2048, 8192)
        asks = {f"{model} prefill {n}": ("generate", {"batch": 1, "prompt": n, "new": 2}) for n in lengths}
        peers = ("eager", "llmcomp") if asked.tiny else ("eager", "inductor", "llmcomp")

        def row(what: str, peer: str, answers: Sequence[Mapping[str, Any]], weights: int) -> Row:
            flops = 2.0 * (weights / 2) * int(what.split()[-1])
            return Row(what, peer, statistics.median(a["first"] for a in answers), flops=flops)

        yield from in_turns(asked, asked.setup(model), peers, asks, row)

    return part


def build_of(model: str) -> Part:
    """The time of the first generation: with empty caches, and with those that it left."""

    def part(asked: Asked) -> Iterator[Row]:
        peers = ("eager", "llmcomp") if asked.tiny else ("hf-reduce-overhead", "llmcomp", "llmcomp-generate")
        for peer in peers:
            with tempfile.TemporaryDirectory(prefix="llmcomp-bench-") as caches:
                for state in ("cold", "warm"):
                    row = Row(f"{model} first tokens, {state}", peer)
                    try:
                        with running(peer, asked.setup(model), Path(caches)) as process:
                            start = time.perf_counter()
                            process.ask("generate", batch=1, prompt=8 if asked.tiny else 64, new=4)
                            yield Row(row.what, peer, time.perf_counter() - start)
                    except Died as death:
                        yield failed(row, death)

    return part


RowOf = Callable[[str, str, Sequence[Mapping[str, Any]], int], Row]


def in_turns(
    asked: Asked, setup: Setup, peers: Sequence[str], asks: Mapping[str, tuple[str, dict[str, Any]]], row: RowOf
) -> Iterator[Row]:
    """Ask every peer in turns, `rounds` times after a first one that compiles; a row for each peer and question."""
    with tempfile.TemporaryDirectory(prefix="llmcomp-bench-") as caches, ExitStack() as stack:
        processes: dict[str, Process] = {}
        dead: dict[str, str] = {}
        for peer in peers:
            if "torchao" in peer and find_spec("torchao") is None:
                dead[peer] = "torchao is not importable"
                continue
            with surviving(peer, dead):
                processes[peer] = stack.enter_context(running(peer, setup, Path(caches)))
        for what, (do, fields) in asks.items():
            answers: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
            for _ in range(asked.rounds + 1):
                for peer in peers:
                    if peer not in dead:
                        with surviving(peer, dead):
                            answers[peer].append(processes[peer].ask(do, **fields))
            first: list[int] = next((a[0]["tokens"] for a in answers.values() if a), [])
            for peer in peers:
                if peer in dead:
                    yield Row(what, peer, note=f"died: {dead[peer]}")
                else:
                    found = row(what, peer, answers[peer][1:], processes[peer].weights)
                    yield replace(found, note=compared(answers[peer][0]["tokens"], first, found.note))


@contextmanager
def surviving(peer: str, dead: dict[str, str]) -> Iterator[None]:
    """Go on without a peer whose process dies."""
    try:
        yield
    except Died as death:
        dead[peer] = str(death)
        say(f"{peer} died: {death}")


def compared(tokens: Sequence[int], first: Sequence[int], note: str) -> str:
    """A note, and how many tokens equal those of the first peer."""
    equal = sum(a == b for a, b in zip(tokens, first, strict=False))
    return f"{equal}/{len(first)} tokens equal" + (f"; {note}" if note else "")


# 16 GB of bfloat16 weights a peer: few fit beside each other.
PEERS_8B = ("hf-reduce-overhead", "hf-max-autotune-pdl", "hf-llmcomp")
QUANTIZED_8B = tuple(f"hf-{who}-{format}" for format in ("int8", "fp8", "int4") for who in ("torchao", "llmcomp"))
PARTS: dict[str, Part] = {
    "tests": tests_in("test_gpu", "test_gpu_graphs"),
    "models": tests_in("test_gpu_models"),
    "kernels": kernels,
    "quantized": quantized,
    "attention": attention,
    "steps": steps_of("llama-3.2-1b", (1,), (64, 4096)),
    "gpt2": steps_of("gpt2", (1,), (64,)),
    "batches": steps_of("llama-3.2-1b", (2, 8, 32, 64), (64,), ("hf-static", "hf-reduce-overhead", "hf-llmcomp")),
    "steps8b": steps_of("llama-3-8b", (1,), (64,), PEERS_8B),
    "quantized8b": steps_of("llama-3-8b", (1,), (64,), ("hf-llmcomp", *QUANTIZED_8B)),
    "decode": loops_of("llama-3.2-1b"),
    "prefill": prefill_of("llama-3.2-1b"),
    "build": build_of("llama-3.2-1b"),
}


# ---- the record --------------------------------------------------------------------------------------------


def machine(asked: Asked, commit: str) -> dict[str, object]:
    """What the numbers were taken on."""
    names = ("torch", "triton", "transformers", "torch-llmcomp", "numpy", "torchao", "gemlite")
    found: dict[str, object] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": describe(asked.device, torch.get_num_threads()),
        "versions": {name: installed(name) for name in names},
        "cuda": str(torch.version.cuda),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "none",
        "commit": commit or output("git", "-C", str(ROOT), "rev-parse", "HEAD") or "unknown",
        "command": " ".join(sys.argv),
    }
    if asked.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{card.name}, sm_{card.major}{card.minor}, {card.multi_processor_count} multiprocessors"
    return found


def output(*command: str) -> str:
    """What a command prints; nothing where there is no such command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def table(part: str, rows: Sequence[Mapping[str, Any]], reached: Limits) -> str:
    """The rows of a part as Markdown."""
    lines = [f"## {part}", "", "| what | peer | us | of read | of matrix | error | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        seconds = row["seconds"]
        cells = ["-", "-", "-"]
        if seconds:
            cells = [f"{seconds * 1e6:.1f}", share(row["bytes"], seconds, reached.read)]
            cells.append(share(row["flops"], seconds, reached.flops))
        wrong = "-" if row["error"] is None else f"{row['error']:.1e}"
        lines.append(f"| {row['what']} | {row['peer']} | {' | '.join(cells)} | {wrong} | {row['note']} |")
    return "\n".join(lines)


def share(amount: float, seconds: float, limit: float) -> str:
    """A part of what the machine reaches."""
    return f"{100 * amount / seconds / limit:.0f}%" if amount else "-"


def write(folder: Path, about: Mapping[str, object], reached: Limits, parts: Mapping[str, Any]) -> None:
    """All that is known so far, for programs and for people."""
    record = {**about, "limits": asdict(reached), "parts": parts}
    (folder / "gpu.json").write_text(json.dumps(record, indent=1))
    head = [f"# {about['machine']}", "", *(f"- {k}: {v}" for k, v in about.items() if k != "machine")]
    head.append(f"- read {reached.read / 1e9:.0f} GB/s; bfloat16 products {reached.flops / 1e12:.1f} TFLOP/s")
    tables = [f"{table(name, part['rows'], reached)}\n\n{part['seconds']:.0f} s" for name, part in parts.items()]
    (folder / "gpu.md").write_text("\n\n".join(["\n".join(head), *tables]) + "\n")


def run_part(name: str, args: argparse.Namespace, folder: Path, limit: float) -> dict[str, Any]:
    """A part in a process of its own: its rows, and how it ended if that was not well."""
    path, start = folder / f"{name}.rows", time.perf_counter()
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "llmcomp.bench_gpu", "--run", name, "--out", str(folder)]
    command += ["--device", args.device, "--rounds", str(args.rounds), *(["--tiny"] if args.tiny else [])]
    problem = ""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with open(folder / f"{name}.log", "w") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, env={**os.environ, "PYTHONPATH": paths}
            )
            problem = "" if done.returncode == 0 else f"exit status {done.returncode}, see {name}.log"
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:.0f} s"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    if problem:
        rows.append(asdict(Row(name, "-", note=problem)))
    return {"seconds": time.perf_counter() - start, "rows": rows}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), help=f"with commas, of {', '.join(PARTS)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes that take no time: to test this program")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=PART_SECONDS, help="seconds of a part")
    parser.add_argument("--out", type=Path, help="folder of the results; examples/results/DATE-GPU by default")
    parser.add_argument("--commit", default="", help="what is measured, where this is no git checkout")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def results_folder(device: str) -> Path:
    """examples/results/2026-01-31-nvidia-h100."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return ROOT / "examples" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-{slug}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts one after the other; the status is 0 if all went well."""
    args = parse(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device, found none: --device cpu --tiny tries this program out")
    folder = args.out or results_folder(args.device)
    folder.mkdir(parents=True, exist_ok=True)
    asked = Asked(args.device, args.tiny, folder, args.rounds)
    if args.run:
        with open(folder / f"{args.run}.rows", "w") as rows:
            for row in PARTS[args.run](asked):
                print(json.dumps(asdict(row)), file=rows, flush=True)
        return 0
    names = args.part.split(",")
    if unknown := set(names) - set(PARTS):
        raise SystemExit(f"expected parts of {', '.join(PARTS)}, found {', '.join(sorted(unknown))}")
    about, reached = machine(asked, args.commit), limits(args.device, args.tiny)
    parts: dict[str, Any] = {}
    if args.device == "cuda":
        torch.cuda.empty_cache()  # the parts need it all
    for name in names:
        say(f"part {name}")
        parts[name] = run_part(name, args, folder, args.limit)
        write(folder, about, reached, parts)
    print((folder / "gpu.md").read_text())
    return 1 if any(bad(row) for part in parts.values() for row in part["rows"]) else 0


def bad(row: Mapping[str, Any]) -> bool:
    """Whether a row says that something of ours went wrong."""
    note, peer = str(row["note"]), str(row["peer"])
    ours = "llmcomp" in peer and (note.startswith("WRONG") or (row["seconds"] is None and "not there" not in note))
    return ours or peer == "-" or note.startswith(("FAILED", "ERROR", "stopped"))


if __name__ == "__main__":
    sys.exit(main())
