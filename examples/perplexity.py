"""Perplexity of a causal language model on a text, counted with sliding windows.

python examples/perplexity.py examples/tiny_llama --dtype bfloat16
python examples/perplexity.py --kv-dtype int8 fp8               what a quantized KV cache costs
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcomp.perplexity import Perplexity, perplexity


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=here / "tiny_llama", help="a saved model")
    parser.add_argument("--text", type=Path, help="UTF-8 text (default: heldout.txt in the folder)")
    parser.add_argument("--bytes", type=int, help="measure on so many leading bytes only")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", help='a torch.compile backend, e.g. "llmcomp" (default: eager)')
    parser.add_argument(
        "--kv-dtype", nargs="+", default=[], help="int8, fp8: what caches cost that llmcomp quantizes so"
    )
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=getattr(torch, args.dtype))
    model = model.to(args.device).eval()
    if args.backend:
        model.compile(backend=args.backend)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    text = (args.text or args.folder / "heldout.txt").read_bytes()[: args.bytes].decode(errors="ignore")

    def measured(name: str, **settings: int) -> Perplexity:
        start, shape = time.perf_counter(), {"window": args.window, "stride": args.stride, "batch": args.batch}
        result = perplexity(model, tokenizer, text, **shape, **settings)
        print(f"{result}, {name}, {time.perf_counter() - start:.1f} s")
        return result

    exact = measured(args.dtype)
    for kv_dtype in args.kv_dtype:
        model.compile(backend="llmcomp", options={"kv_dtype": kv_dtype})
        cost = measured(f"a cache in {kv_dtype}", use_cache=True).per_token / exact.per_token - 1
        print(f"{kv_dtype} costs {100 * cost:+.3f} % of perplexity")


if __name__ == "__main__":
    main()
