"""What is checked of one model under a backend; the tests and the sweep run the same functions.

A check builds the case, computes what eager gives, compiles the model in place and compares. It fails by
AssertionError and returns a `Count`. Every check resets Dynamo first, and a backend that was never called is
a failure: the graph ran eager.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from llmcomp.backend import compile_model
from llmcomp.options import read_options
from llmcomp.passes.groups import LEFT_TO_LIBRARY
from llmcomp.report import ExternReport, GraphReport, ProgramReport
from tests.models import Case, Kind
from tests.numerics import Divergence, assert_equal_float32, assert_no_worse, divergences, is_tie

NEW_TOKENS = 6
# Beams whose scores (log-probability of a token) differ by less are equal: several sums of float32 apart.
SCORE = 1e-5
NO_FLOAT64 = ("xglm",)
SHAPES = ((1, 11), (2, 17))


@dataclass
class CountingBackend:
    """The backend called `name`, counting how often its programs run.

    `graphs` holds what llmcomp reports of each graph, and None for each graph of another backend.
    """

    name: str
    graphs: list[GraphReport | None] = field(default_factory=list)
    calls: int = 0

    def __call__(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if self.name == "llmcomp":
            program = compile_model(graph, inputs, read_options(), self.graphs.append)
        else:
            self.graphs.append(None)
            program = lookup_backend(self.name)(graph, inputs)

        def run(*args: Any) -> Any:
            self.calls += 1
            return program(*args)

        return run


@dataclass(frozen=True)
class Work:
    """One call of each graph: its floating-point operations and weight bytes, and the generated part of them.

    What a CPU's matrix library is given on purpose, the float prefill, is counted apart.
    """

    flops: int = 0
    generated_flops: int = 0
    weight_bytes: int = 0
    generated_weight_bytes: int = 0
    library_flops: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    @property
    def shares(self) -> tuple[float, float]:
        """The generated part of the operations and of the weight bytes; 1 where there are none."""
        return (
            self.generated_flops / self.flops if self.flops else 1.0,
            self.generated_weight_bytes / self.weight_bytes if self.weight_bytes else 1.0,
        )


def work_of(graphs: Sequence[GraphReport | None]) -> Work:
    """The sum over the graphs."""
    return sum((work_of_program(g.program) for g in graphs if g is not None), Work())


def work_of_program(program: ProgramReport) -> Work:
    """The sum over the launches and eager calls of one graph."""
    library = [e for e in program.externs if program.target == "cpp" and is_library(e)]
    kernels, externs = program.kernels, [e for e in program.externs if e not in library]
    flops, weights = sum(k.flops for k in kernels), sum(k.weight_bytes for k in kernels)
    return Work(
        flops + sum(e.flops for e in externs),
        flops,
        weights + sum(e.weight_bytes for e in externs),
        weights,
        sum(e.flops for e in library),
    )


def is_library(extern: ExternReport) -> bool:
    """Whether an eager call is a matrix product of many rows, which the CPU target leaves to the library."""
    return extern.reason == LEFT_TO_LIBRARY


@dataclass(frozen=True)
class Count:
    """What a check saw: graphs compiled, Dynamo's graph breaks, tokens that differ at a tie, work."""

    graphs: int
    breaks: int
    ties: int
    work: Work


@contextmanager
def counted(backend: str) -> Iterator[CountingBackend]:
    """A fresh Dynamo in which falling back to eager is an error, and `backend` counted."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        yield CountingBackend(backend)
    torch._dynamo.reset()


def count_of(backend: CountingBackend, ties: int = 0) -> Count:
    """The counts of a check; fails if the backend was never called."""
    assert backend.calls, "no compiled graph ran: everything was eager"
    breaks = sum(counters["graph_break"].values())
    return Count(len(backend.graphs), breaks, ties, work_of(backend.graphs))


def visible(inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
    """The logits of the tokens that are not padding: (tokens, vocabulary) where each token has a row."""
    mask = inputs.get("attention_mask")
    return logits if mask is None or mask.shape != logits.shape[:2] else logits[mask.bool()]


def check_logits(case: Case, backend: str, padding: int = 0) -> Count:
    """float32 logits for two shapes equal eager's."""
    model = case.build()
    feeds = [case.inputs(batch, length, padding) for batch, length in SHAPES]
    with counted(backend) as counting:
        expected = [visible(feed, model(**feed).logits) for feed in feeds]
        model.compile(backend=counting)
        for feed, eager in zip(feeds, expected, strict=True):
            assert_equal_float32(visible(feed, model(**feed).logits), eager)
        return count_of(counting)


def check_padded(case: Case, backend: str) -> Count:
    """float32 logits of padded batches equal eager's."""
    return check_logits(case, backend, padding=4)


def check_bfloat16(case: Case, backend: str) -> Count:
    """bfloat16 logits are about as near to a float64 run as eager's are."""
    model, feed = case.build(torch.bfloat16), case.inputs(2, 17)
    exact = exact_copy(model)
    with counted(backend) as counting:
        eager = model(**with_type_of(feed, model)).logits
        reference = exact(**with_type_of(feed, exact)).logits
        model.compile(backend=counting)
        assert_no_worse(model(**with_type_of(feed, model)).logits, eager, reference)
        return count_of(counting)


def check_generate(case: Case, backend: str) -> Count:
    """Greedy tokens of a padded float32 batch equal eager's."""
    return check_tokens(case, backend, torch.float32)


def check_generate_static(case: Case, backend: str) -> Count:
    """Greedy tokens with a static cache equal eager's."""
    return check_tokens(case, backend, torch.float32, cache_implementation="static")


def check_generate_bfloat16(case: Case, backend: str) -> Count:
    """Greedy tokens of a padded bfloat16 batch equal eager's but for ties."""
    return check_tokens(case, backend, torch.bfloat16)


def check_left_padded(case: Case, backend: str) -> Count:
    """Greedy tokens of three prompts of different lengths equal eager's."""
    return check_tokens(case, backend, torch.float32, batch=3)


def check_beams(case: Case, backend: str) -> Count:
    """The tokens of a beam search with two beams, on a padded batch, equal eager's or score the same."""
    model = case.build()
    prompt = case.prompt(2, 9, padding=3)
    settings = {"num_beams": 2, "return_dict_in_generate": True, "output_scores": True}
    eager, ours, count = generated(model, prompt, backend, **settings)
    rows = (ours.sequences != eager.sequences).any(1)
    gap = (ours.sequences_scores - eager.sequences_scores)[rows].abs()
    assert bool((gap <= SCORE).all()), f"rows {rows.tolist()} differ, their scores by {gap.tolist()}"
    return replace(count, ties=int(rows.sum()))


def generated(
    model: PreTrainedModel, prompt: dict[str, Tensor], backend: str, **settings: Any
) -> tuple[Any, Any, Count]:
    """What `generate` returns in eager and compiled, with the counts of the latter; compiles `model` in place."""
    settings |= {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with counted(backend) as counting:
        eager = model.generate(**prompt, **settings)
        model.compile(backend=counting)
        ours = model.generate(**prompt, **settings)
        count = count_of(counting)
    shapes = [tuple((x if isinstance(x, Tensor) else x.sequences).shape) for x in (ours, eager)]
    assert shapes[0] == shapes[1], f"{shapes[0]} tokens, eager gave {shapes[1]}"
    return eager, ours, count


def check_tokens(case: Case, backend: str, dtype: torch.dtype, batch: int = 2, **settings: Any) -> Count:
    """Greedy tokens equal eager's but for ties."""
    model = case.build(dtype)
    prompt = with_type_of(case.prompt(batch, 9, padding=3), model)
    eager_model = copy.deepcopy(model)
    eager, ours, count = generated(model, prompt, backend, **settings)
    split = divergences(ours, eager)
    for d in split:
        logits = next_logits(case, eager_model, prompt, eager, d)
        exact = next_logits(case, exact_copy(eager_model), prompt, eager, d)
        assert is_tie(d, logits, exact), f"{d}: logits {logits[d.ours]:.6g} and {logits[d.eager]:.6g}"
    return replace(count, ties=len(split))


def next_logits(
    case: Case, model: PreTrainedModel, prompt: dict[str, Tensor], tokens: Tensor, at: Divergence
) -> Tensor:
    """The logits (vocabulary,) from which the token at the divergence was chosen."""
    before = tokens[at.row : at.row + 1, : at.position]
    feed = {k: v[at.row : at.row + 1] for k, v in with_type_of(prompt, model).items()}
    if case.kind is not Kind.CAUSAL:
        feed["decoder_input_ids"] = before
    else:
        feed["input_ids"] = before
        if "attention_mask" in feed:
            new = before.shape[1] - feed["attention_mask"].shape[1]
            feed["attention_mask"] = torch.nn.functional.pad(feed["attention_mask"], (0, new), value=1)
    with torch.no_grad():
        return model(**feed).logits[0, -1]


def exact_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64, with its experts as a loop of matmuls (the grouped one has no float64).

    In float32 where the model's own code refuses float64: its error is 65536 times smaller than bfloat16's.
    """
    exact = copy.deepcopy(model)
    exact = exact.float() if model.config.model_type in NO_FLOAT64 else exact.double()
    exact.set_experts_implementation("eager")
    return exact


def with_type_of(inputs: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs whose floating-point tensors have the model's type."""
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}


CHECKS: dict[str, Callable[[Case, str], Count]] = {
    "logits": check_logits,
    "padded": check_padded,
    "bfloat16": check_bfloat16,
    "generate": check_generate,
    "static": check_generate_static,
    "generate-bfloat16": check_generate_bfloat16,
    "left-padded": check_left_padded,
    "beams": check_beams,
}


def checks_of(case: Case) -> tuple[str, ...]:
    """The names of the checks that apply to a case."""
    if case.kind is Kind.CAUSAL:
        return tuple(CHECKS)
    if case.kind is Kind.ENCODER:
        return ("logits", "padded", "bfloat16")
    if case.kind is Kind.SPEECH:
        return ("logits", "bfloat16", "generate", "generate-bfloat16", "beams")
    return ("logits", "padded", "bfloat16", "generate", "generate-bfloat16", "beams")
