"""Train the Llama in examples/tiny_llama on the sources of CPython's standard library.

python examples/train_tiny_llama.py --minutes 55 --out /tmp/tiny_llama

Reads the standard library of the Python that runs it; needs no network. An interrupted run continues from the
checkpoint in its output folder.
"""

import argparse
import hashlib
import math
import platform
import shutil
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from perplexity import Perplexity, perplexity
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
# Tests repeat themselves, `encodings` is tables of numbers, `pydoc_data` one escaped string.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
HELD_OUT_PER_MILLE = 30
HELDOUT_TXT_BYTES = 96_000
PREFIX_BYTES = 16_000


@dataclass(frozen=True)
class Corpus:
    """Source files by path relative to the library, in the order of their paths."""

    train: dict[str, str]
    heldout: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """How long to train, and on what shape of batch. `minutes`, if given, rules over `steps`."""

    steps: int
    minutes: float | None
    tokens_per_step: int = 2048
    learning_rate: float = 3e-3
    warmup: int = 200
    seed: int = 0

    def progress(self, step: int, seconds: float) -> float:
        return seconds / (60 * self.minutes) if self.minutes else step / self.steps

    def rate(self, step: int, progress: float) -> float:
        """Linear warm-up, then a cosine to zero."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * cosine

    def sequence(self, progress: float) -> int:
        """Short rows learn fastest at first, but a model knows no position that it was not trained on: after
        256 alone, perplexity over windows of 512 was 70; 350 steps of 1024 brought it to 26."""
        return 256 if progress < 0.5 else 1024


def hashed(path: str) -> int:
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")


def read_corpus(root: Path) -> Corpus:
    """Whole files are held out, chosen by their path alone, so that no run ever trains on them."""
    files = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not LEFT_OUT & set(name.parts) and not name.name.startswith("_sysconfigdata"):
            files[name.as_posix()] = path.read_text("utf-8", errors="ignore")
    heldout = {name for name in files if hashed(name) % 1000 < HELD_OUT_PER_MILLE}
    return Corpus(
        train={name: text for name, text in files.items() if name not in heldout},
        heldout={name: text for name, text in files.items() if name in heldout},
    )


def heldout_text(corpus: Corpus) -> str:
    """The held-out files that fit into HELDOUT_TXT_BYTES, in the order of their hashes."""
    text = ""
    for name in sorted(corpus.heldout, key=hashed):
        longer = text + corpus.heldout[name]
        if len(longer.encode()) <= HELDOUT_TXT_BYTES:
            text = longer
    return text


def prefix_of(text: str) -> str:
    """Enough of the held-out text to watch the training by, and for a test of a few seconds."""
    return text.encode()[:PREFIX_BYTES].decode(errors="ignore")


def train_tokenizer(corpus: Corpus, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text round-trips. Puts BOS in front, as Llama's own tokenizers do."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus.train.values(), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def token_stream(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All training files as one tensor [T], each ending in EOS."""
    rows = tokenizer(list(corpus.train.values()), add_special_tokens=False)["input_ids"]
    return torch.cat([torch.tensor([*row, tokenizer.eos_token_id]) for row in rows])


def batch_of(stream: Tensor, bos: int, step: int, plan: Plan, sequence: int) -> Tensor:
    """Tokens [batch, sequence + 1], a function of the step alone. Rows begin with BOS wherever they start
    in a file, so that BOS means "here the context begins" and any prompt is in the distribution."""
    rows = plan.tokens_per_step // sequence
    source = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - sequence, (rows, 1), generator=source)
    return F.pad(stream[starts + torch.arange(sequence)], (1, 0), value=bos)


def optimizer_of(model: LlamaForCausalLM, plan: Plan) -> torch.optim.AdamW:
    """Weight decay on the matrices only; the norms' gains keep their scale."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, tokens: Tensor, rate: float) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    plan: Plan,
    checkpoint: Path,
    every: int,
) -> tuple[int, float]:
    """Train in place; return the steps taken and the seconds that they took."""
    stream = token_stream(corpus, tokenizer)
    optimizer = optimizer_of(model, plan)
    step, spent = load_checkpoint(checkpoint, model, optimizer)
    prefix = prefix_of(heldout_text(corpus))
    print(f"{len(stream)} training tokens, {model.num_parameters()} parameters, from step {step}", flush=True)
    begin, mean = time.perf_counter() - spent, 0.0
    while (progress := plan.progress(step, time.perf_counter() - begin)) < 1:
        tokens = batch_of(stream, tokenizer.bos_token_id, step, plan, plan.sequence(progress))
        loss = train_step(model, optimizer, tokens, plan.rate(step, progress))
        mean = 0.98 * mean + 0.02 * loss if mean else loss
        step += 1
        if step % 20 == 0:
            rate = step * plan.tokens_per_step / (time.perf_counter() - begin)
            print(f"{progress:6.1%}  step {step}  loss {mean:.3f}  {rate:.0f} tokens/s", flush=True)
        if step % every == 0:
            save_checkpoint(checkpoint, model, optimizer, step, time.perf_counter() - begin)
            print(f"        held out: {measure(model, tokenizer, prefix, tokens.shape[1] - 1)}", flush=True)
    return step, time.perf_counter() - begin


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, sequence: int) -> Perplexity:
    """Over windows no longer than the sequences trained on so far: beyond them the model is lost."""
    model.eval()
    result = perplexity(model, tokenizer, text, window=sequence, stride=sequence // 2)
    model.train()
    return result


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, step: int, spent: float) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> tuple[int, float]:
    """The step and the seconds to continue from; zeros if there is nothing to continue."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["spent"]


def save(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> None:
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "heldout.txt").write_bytes(heldout_text(corpus).encode())
    licence = Path(sysconfig.get_paths()["stdlib"], "LICENSE.txt")
    if licence.exists():
        shutil.copyfile(licence, out / "LICENSE.cpython.txt")


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int) -> str:
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_p=0.9)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def write_card(out: Path, corpus: Corpus, plan: Plan, step: int, seconds: float) -> None:
    """Measure what was saved, as a user will load it, and say so in README.md."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    text = (out / "heldout.txt").read_bytes().decode()
    everything = "".join(corpus.heldout.values())
    rows = {
        f"heldout.txt, first {PREFIX_BYTES} bytes": perplexity(model, tokenizer, prefix_of(text)),
        "heldout.txt": perplexity(model, tokenizer, text),
        "all held-out files": perplexity(model, tokenizer, everything),
    }
    for name, row in rows.items():
        print(f"{name}: {row}")
    table = "\n".join(
        f"| {name} | {row.bytes} | {row.tokens} | {row.per_token:.3f} | {row.per_byte:.4f} |"
        for name, row in rows.items()
    )
    source = sample(model, tokenizer, 'def read_lines(path):\n    """', 120)
    print(source)
    (out / "README.md").write_text(
        CARD.format(
            parameters=f"{model.num_parameters():,}",
            vocabulary=len(tokenizer),
            python=platform.python_version(),
            files=len(corpus.train),
            megabytes=f"{sum(len(t.encode()) for t in corpus.train.values()) / 1e6:.1f}",
            heldout_files=len(corpus.heldout),
            steps=step,
            tokens=f"{step * plan.tokens_per_step / 1e6:.1f}",
            minutes=f"{seconds / 60:.0f}",
            threads=torch.get_num_threads(),
            table=table,
            sample=source,
        )
    )


CARD = """\
---
language: code
library_name: transformers
license: other
license_name: psf-2.0
license_link: LICENSE.cpython.txt
---
# tiny_llama

A Llama of {parameters} parameters that writes text which looks like Python. It is here so that examples and
tests run on a real trained model without a download; it is of no other use.

| | |
|---|---|
| architecture | `LlamaForCausalLM`: 4 layers, hidden 256, 8 heads of 32, 4 key/value heads, MLP 704 |
| embeddings | tied |
| positions | rope, 2048; trained on sequences of 256, then 1024 |
| tokenizer | byte-level BPE, {vocabulary} tokens; `<bos>` before every text, `<eos>`, `<pad>` on the left |
| weights | bfloat16, `model.safetensors` |

## Data

The `.py` files of the standard library of CPython {python}: {files} files, {megabytes} MB. Left out: tests,
site-packages, `encodings` and `pydoc_data` (tables), and the held-out files, {heldout_files} whole files
chosen by a hash of their path. `heldout.txt` is some of these, joined without a change.

The sources, and `heldout.txt` with them, are copyright of the Python Software Foundation, all rights
reserved, and used under the PSF License Agreement: notice, years and terms are in `LICENSE.cpython.txt`.

## Perplexity

Of the saved weights, computed in float32 (`python examples/perplexity.py`: windows of 512, stride 256):

| held-out text | bytes | tokens | perplexity per token | perplexity per byte |
|---|---|---|---|---|
{table}

## Training

{steps} steps of 2048 tokens ({tokens} million tokens) in {minutes} minutes of wall time, CPU threads:
{threads}. AdamW, cosine schedule, bfloat16 autocast. To train it again:

```
python examples/train_tiny_llama.py --steps {steps} --out examples/tiny_llama
```

The text depends on the version of Python that runs the script, and so do the numbers above, a little.

## A sample

Temperature 0.7, top-p 0.9, from the prompt `def read_lines(path):` and a docstring's quotes:

```python
{sample}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny_llama")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, help="train so long instead, whatever the steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    print(f"{len(corpus.train)} files to train on, {len(corpus.heldout)} held out", flush=True)
    tokenizer = train_tokenizer(corpus, args.vocabulary)
    model = new_model(tokenizer)
    plan = Plan(args.steps, args.minutes, seed=args.seed)
    checkpoint = args.out / "checkpoint.pt"
    step, seconds = train(model, tokenizer, corpus, plan, checkpoint, args.every)
    save(args.out, model, tokenizer, corpus)
    write_card(args.out, corpus, plan, step, seconds)
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
