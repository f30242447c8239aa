"""What each weight format costs a model and what it brings: perplexity, size and speed, beside the float model.

    python -m llmcomp.evaluate examples/tiny_llama
    python -m llmcomp.evaluate MODEL --formats int8,int4_g32 --text book.txt --dtype bfloat16
    python -m llmcomp.evaluate MODEL --formats int4,int4+awq,mixed4.5+gptq --calibrate other.txt --resume folder

A format followed by the name of a method (+gptq, +awq, +smoothquant, +awq+gptq, +smoothquant+gptq) is calibrated on the
text of `--calibrate`. mixed4.5 is a format for each weight, 4.5 bits on average, chosen on that text. MODEL is a folder
that transformers loads. The text to measure on is that of `--text`, or heldout.txt in the folder. Speed is the median
over rounds that take turns between the formats: tokens per second of greedy decoding at batch 1, compiled. With
`--resume` finished layers of calibrations are kept in a folder for each format, and not calibrated again.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcomp.calibration import calibrate
from llmcomp.calibration_method import METHODS, Method
from llmcomp.errors import OptionError
from llmcomp.formats import names, parse_format
from llmcomp.mixed_precision import Budget, assign
from llmcomp.perplexity import Perplexity, perplexity
from llmcomp.quantization import Spec, quantize_

MIXED = "mixed"
DEFAULT_FORMATS = "int8,int8_dynamic,fp8,fp8_dynamic,int4_g32,int4,nf4,mxfp4"


@dataclass
class Evaluated:
    """One row of the table; `rates` are tokens per second of each round."""

    name: str
    quality: Perplexity
    bytes: int
    rates: list[float]


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, shared ones once."""
    return sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())


def decode(model: Any, new: int) -> float:
    """Tokens per second of greedy decoding behind a prompt of 16 tokens."""
    ids = torch.arange(3, 19, device=model.device)[None]
    start = time.perf_counter()
    with torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, min_new_tokens=1, do_sample=False)
    first = time.perf_counter()
    with torch.no_grad():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
    return (new - 1) / (time.perf_counter() - first - (first - start))


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str,
    formats: Sequence[str],
    *,
    data: Sequence[Tensor] = (),
    window: int = 512,
    new: int = 65,
    rounds: int = 5,
    resume: Path | None = None,
) -> list[Evaluated]:
    """The float model, then a copy of it in each format: perplexity on `text`, bytes, and speed in interleaved rounds.

    `data` are batches of token ids for formats that are calibrated or mixed; `resume` is a folder for finished layers.

    Raises:
        OptionError: a format or a method that does not exist.
        FormatError: a format is to be calibrated or mixed and there is no data.
    """
    for given in formats:
        parse(given)
    choices: list[str | None] = [None, *formats]
    rows, models = [], []
    for name in choices:
        made = copy.deepcopy(model)
        if name is not None:
            quantize(made, name, data, None if resume is None else resume / name)
        made.compile(backend="llmcomp")
        quality = perplexity(made, tokenizer, text, window=window, stride=window // 2)
        title = str(model.dtype).split(".")[-1] if name is None else name
        print(f"{title}: {quality}", flush=True)
        rows.append(Evaluated(title, quality, parameter_bytes(made), []))
        models.append(made)
    for made in models:
        decode(made, new)  # compiles what is left
    for _ in range(rounds):
        for row, made in zip(rows, models, strict=True):
            row.rates.append(decode(made, new))
    return rows


def parse(name: str) -> tuple[Spec | Budget, str | None]:
    """The formats and the method of a name such as "int4", "int8_dynamic+smoothquant" or "mixed4.5+gptq".

    Raises:
        OptionError: there are none of this name.
    """
    form, _, method = name.partition("+")
    if method:
        Method(method)
    if not form.startswith(MIXED):
        return parse_format(form), method or None
    try:
        bits = float(form.removeprefix(MIXED))
    except ValueError as problem:
        raise OptionError(f"expected bits behind {MIXED}, mixed4.5 for example, found {form!r}") from problem
    return Budget(bits=bits), method or None


def quantize(model: nn.Module, name: str, data: Sequence[Tensor], kept: Path | None = None) -> None:
    """Quantize a model as a name says, calibrated on `data`, with finished layers in the folder `kept`.

    Raises:
        OptionError, FormatError: as `evaluate`.
    """
    spec, method = parse(name)
    if method is not None:
        calibrate(model, data, spec, method, checkpoint=kept)
    else:
        quantize_(model, assign(model, data, spec) if isinstance(spec, Budget) else spec)


def pieces(tokenizer: Any, text: str, length: int, most: int) -> list[Tensor]:
    """Up to `most` pieces of a text, (1, length) token ids each, evenly spread over it."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    cut = [ids[i : i + length][None] for i in range(0, len(ids) - length + 1, length)]
    return [cut[i * len(cut) // most] for i in range(most)] if len(cut) > most else cut


def table(rows: Sequence[Evaluated]) -> str:
    """The rows as a Markdown table; the first is what the others are compared with."""
    lines = ["| weights | MB | perplexity | rise | decode tok/s |", "| --- | --- | --- | --- | --- |"]
    base = rows[0].quality.per_token
    for r in rows:
        rise = "" if r is rows[0] else f"{100 * (r.quality.per_token / base - 1):+.2f}%"
        speed = f"{statistics.median(r.rates):.1f}" if r.rates else "-"
        lines.append(f"| {r.name} | {r.bytes / 1e6:.2f} | {r.quality.per_token:.3f} | {rise} | {speed} |")
    return "\n".join(lines)


def command_line(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder that transformers loads")
    parser.add_argument(
        "--formats",
        default=DEFAULT_FORMATS,
        help=f"with commas, of {', '.join(names())}, mixedBITS; each may be followed by +{', +'.join(METHODS)}",
    )
    parser.add_argument("--text", type=Path, help="UTF-8 text (default: heldout.txt in the folder)")
    parser.add_argument(
        "--calibrate", type=Path, help="UTF-8 text, other than that of --text, for formats with a method"
    )
    parser.add_argument("--resume", type=Path, help="a folder where finished layers of calibrations are kept")
    parser.add_argument("--bytes", type=int, help="measure on so many leading bytes only")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--new", type=int, default=65, help="tokens of a decoding run")
    parser.add_argument("--rounds", type=int, default=5, help="0: no speeds")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table for one model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = command_line(arguments)
    file = args.text or args.model / "heldout.txt"
    if not args.model.is_dir() or not file.is_file():
        missing = args.model if not args.model.is_dir() else file
        raise SystemExit(f"expected a folder with a model and a text to measure on, found no {missing}: see --help")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    text = file.read_bytes()[: args.bytes].decode(errors="ignore")
    formats = [name for name in args.formats.split(",") if name]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = (
        pieces(tokenizer, args.calibrate.read_text("utf-8", errors="ignore"), args.window, 64) if args.calibrate else []
    )
    shape = {"window": args.window, "new": args.new, "rounds": args.rounds, "resume": args.resume}
    print(f"\n{table(evaluate(model, tokenizer, text, formats, data=data, **shape))}")


if __name__ == "__main__":
    main()
