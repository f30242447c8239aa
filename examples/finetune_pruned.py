"""Prune the model of the examples, and win back what that lost: by fine-tuning, and by distilling the dense model.

python examples/finetune_pruned.py --prune 2:4 --steps 300
python examples/finetune_pruned.py --prune channels --steps 300 --distill
python examples/finetune_pruned.py --prune 2:4 --quantize int4_g32 --steps 300 --distill --hidden 1.0
python examples/finetune_pruned.py --prune 2:4 --format int4_g32 --steps 300          (quantization-aware training)

Trains with transformers' Trainer on the sources of CPython's standard library, without the held-out files; masks hold
through its optimizer. Prints the perplexity on the text of examples/tiny_llama/heldout.txt: dense, pruned, trained.
"""

import argparse
import copy
import json
import math
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from train_tiny_llama import Plan, batch_of, heldout_text, prefix_of, read_corpus, token_stream
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import llmcomp
from llmcomp.perplexity import perplexity

SPECS: dict[str, llmcomp.Magnitude | llmcomp.NM | llmcomp.Structured | llmcomp.Movement | None] = {
    "none": None,
    "50%": llmcomp.Magnitude(0.5),
    "2:4": llmcomp.NM(2, 4),
    "channels": llmcomp.Structured(channels=0.25),
    "layer": llmcomp.Structured(layers=1, criterion="activation"),
    "gradual": llmcomp.Magnitude(0.5),
    "movement": llmcomp.Movement(0.5),
}


class Pieces(Dataset[dict[str, Tensor]]):
    """Pieces of the training text, each a function of its number."""

    def __init__(self, stream: Tensor, bos: int, count: int, length: int) -> None:
        self.stream, self.bos, self.count = stream, bos, count
        self.length, self.plan = length, Plan(0, None, tokens_per_step=length, seed=1)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = batch_of(self.stream, self.bos, index, self.plan, self.length)[0, :-1]
        return {"input_ids": ids, "labels": ids}


class Distillation(Trainer):
    """A Trainer whose loss has the teacher's opinion in it.

    loss = (1 - share) * cross entropy + share * T^2 * KL(teacher || student), of logits divided by the temperature T
    (Hinton et al. 2015, arXiv:1503.02531), + hidden * mean square of the difference of hidden states, layer by layer.
    """

    teacher: nn.Module
    share: float
    temperature: float
    hidden: float

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        asked = {"output_hidden_states": self.hidden > 0}
        made = model(**inputs, **asked)
        with torch.no_grad():
            wanted = self.teacher(input_ids=inputs["input_ids"], **asked)
        student, teacher = (F.log_softmax(x.logits.float() / self.temperature, -1) for x in (made, wanted))
        soft = F.kl_div(student.flatten(0, 1), teacher.flatten(0, 1), reduction="batchmean", log_target=True)
        loss = (1 - self.share) * made.loss + self.share * self.temperature**2 * soft
        if self.hidden:
            pairs = zip(made.hidden_states, wanted.hidden_states, strict=True)
            loss = loss + self.hidden * torch.stack([F.mse_loss(a.float(), b.float()) for a, b in pairs]).mean()
        return (loss, made) if return_outputs else loss


class Pruner(TrainerCallback):
    """Prunes a little more after each step."""

    def __init__(self, schedule: llmcomp.PruningSchedule) -> None:
        self.schedule = schedule

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.schedule.step()


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=here / "tiny_llama")
    parser.add_argument("--prune", choices=list(SPECS), default="2:4")
    parser.add_argument("--steps", type=int, default=300, help="of 2048 tokens")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--distill", action="store_true", help="learn from the dense model, too")
    parser.add_argument("--share", type=float, default=0.5, help="of the teacher in the loss")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--hidden", type=float, default=0.0, help="weight of the difference of hidden states")
    parser.add_argument("--quantize", help="a weight format to measure in, too, such as int4_g32")
    parser.add_argument("--format", help="a weight format to train in, too, such as int4_g32")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bytes", type=int, help="measure on so many leading bytes only")
    parser.add_argument("--backend", help='compile the model for training, e.g. "llmcomp" (default: eager)')
    parser.add_argument("--out", type=Path, help="where to save what comes of it")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    corpus = read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    text = heldout_text(corpus) if args.bytes is None else prefix_of(heldout_text(corpus))[: args.bytes]
    pieces = Pieces(
        token_stream(corpus, tokenizer), tokenizer.bos_token_id, args.steps * 2048 // args.length, args.length
    )

    def measured(name: str, model: nn.Module) -> float:
        found = perplexity(model.eval(), tokenizer, text).per_token
        print(f"{name:24} {found:8.3f}", flush=True)
        return found

    def quantized(name: str) -> None:
        if args.quantize:
            copied = copy.deepcopy(model)
            llmcomp.quantize_(copied, args.quantize)
            results[f"{name}, {args.quantize}"] = measured(f"{name}, {args.quantize}", copied)

    results = {"dense": measured("dense", model)}
    callbacks: list[TrainerCallback] = []
    spec = SPECS[args.prune]
    if args.prune in ("gradual", "movement") and spec is not None:
        # Chosen over the first half of the steps; the second half recovers.
        layers = {"model.layers.*": spec}
        callbacks.append(Pruner(llmcomp.PruningSchedule(model, layers, max(1, args.steps // 2))))
    elif spec is not None:
        data = [pieces[len(pieces) - 1 - i]["input_ids"][None] for i in range(min(16, len(pieces)))]
        llmcomp.prune_(model, spec, data)
        results["pruned"] = measured("pruned", model)
        quantized("pruned")
    if args.format:
        llmcomp.train_quantized_(model, args.format)
        results[f"pruned, {args.format}"] = measured(f"pruned, {args.format}", model)
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=args.steps,
        per_device_train_batch_size=2048 // args.length,
        learning_rate=args.rate,
        warmup_steps=min(20, args.steps // 10),
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        logging_steps=max(1, args.steps // 6),
        disable_tqdm=True,
    )
    trainer: Trainer
    if args.backend:
        model.compile(backend=args.backend)
    if args.distill:
        trainer = Distillation(model=model, args=settings, train_dataset=pieces, callbacks=callbacks)
        assert isinstance(trainer, Distillation)
        trainer.teacher = teacher.to(model.device)
        trainer.share, trainer.temperature, trainer.hidden = args.share, args.temperature, args.hidden
    else:
        trainer = Trainer(model=model, args=settings, train_dataset=pieces, callbacks=callbacks)
    trainer.train()
    way = "distilled" if args.distill else "fine-tuned"
    results[way] = measured(way, model)
    quantized(way)
    if args.format:
        copied = copy.deepcopy(model)
        llmcomp.quantize_(copied, args.format)  # what it was trained with
        assert measured(f"{way}, {args.format}", copied) == results[way]
    zeros, weights = (sum(int(f(p)) for p in model.model.layers.parameters()) for f in (_zeros, torch.numel))
    print(f"{zeros / weights:.2%} of the layers' weights are zero")
    assert all(math.isfinite(x) for x in results.values())
    print(json.dumps({"prune": args.prune, "steps": args.steps, "zeros": zeros / weights, **results}))
    if args.out is not None:
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)


def _zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


if __name__ == "__main__":
    main()
