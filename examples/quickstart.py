"""Compile a Llama, stream text from it, and compare it with eager and with Inductor.

    python examples/quickstart.py
    python examples/quickstart.py --prompt "class Parser:" --new-tokens 200 --no-inductor

The model is in examples/tiny_llama: 4 million parameters, trained on Python's standard library. Nothing is
downloaded.
"""

import argparse
import copy
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextStreamer

from llmcomp.options import read_options

MODEL = Path(__file__).parent / "tiny_llama"
PROMPT = 'def read_lines(path):\n    """'


@contextmanager
def progress(what: str, kernels: Path | None = None) -> Iterator[None]:
    """Say every second how long `what` has taken, and how many kernels are in their folder."""
    start, done = time.perf_counter(), threading.Event()

    def line() -> str:
        count = "" if kernels is None else f", {len(list(kernels.glob('*.so')))} kernels in {kernels}"
        return f"{what}: {time.perf_counter() - start:.0f} s{count}"

    def watch() -> None:
        while not done.wait(1.0):
            if sys.stderr.isatty():
                print(f"\r{line()}", end="", file=sys.stderr, flush=True)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        print(f"\r{line()}", file=sys.stderr, flush=True)


def generate(model: PreTrainedModel, ids: Tensor, new: int, streamer: TextStreamer | None = None) -> Tensor:
    """Greedy tokens after `ids`, always `new` of them."""
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "repetition_penalty": 1.1}
    with torch.inference_mode():
        return model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **settings)


def speed(model: PreTrainedModel, ids: Tensor, new: int) -> float:
    """Tokens per second, the best of three runs."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        generate(model, ids, new)
        seconds.append(time.perf_counter() - start)
    return new / min(seconds)


def main() -> None:
    """Run the example; the exit status says whether the tokens equal eager's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--no-inductor", action="store_true", help="leave Inductor out: it compiles for long")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device).eval()
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids.to(device)

    expected = generate(model, ids, args.new_tokens)
    speeds = {"eager": speed(model, ids, args.new_tokens)}

    fast = torch.compile(copy.deepcopy(model), backend="llmcomp")
    kernels = read_options().cache
    with progress("llmcomp compiles", kernels):
        generate(fast, ids, 4)
    print(f"\n{args.prompt}", end="")
    ours = generate(fast, ids, args.new_tokens, TextStreamer(tokenizer, skip_prompt=True))
    equal = int((ours == expected).sum()) - ids.shape[1]
    print(f"\n{equal} of {args.new_tokens} tokens equal eager's; the kernels can be read in {kernels}\n")
    speeds["llmcomp"] = speed(fast, ids, args.new_tokens)

    if not args.no_inductor:
        inductor = copy.deepcopy(model)
        inductor.compile(backend="inductor")
        try:
            with progress("Inductor compiles"):
                generate(inductor, ids, 4)
            speeds["Inductor"] = speed(inductor, ids, args.new_tokens)
        except Exception as problem:  # with torch 2.11 on some CPUs the C++ that it writes does not compile
            print(f"Inductor failed: {type(problem).__name__}")

    for name, found in speeds.items():
        print(f"{name:10} {found:7.1f} tokens/s")
    sys.exit(0 if equal == args.new_tokens else 1)


if __name__ == "__main__":
    main()
