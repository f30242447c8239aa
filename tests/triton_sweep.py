"""Every Triton kernel of every architecture: interpreted against eager, and assembled for two generations of GPUs.

    python -m tests.triton_sweep --json triton.json              goes on where the file ends
    python -m tests.triton_sweep --only llama,gpt2               without a file: always afresh
    python -m tests.triton_sweep --json triton.json --again llama
    python -m tests.triton_sweep --json int4.json --weights int4_g32        with quantized weights

Kernels that are equal are looked at once, in whatever model they come first. Each is run under the interpreter on
what the model computes, then compiled for the launches that were seen, in a second process: Triton interprets or
compiles. Verdicts: ok; wrong (another result than the eager nodes of its region), error (it does not run or compile),
spills (registers are spilled to memory), narrow (weights of a decode Contract are loaded in pieces of less than 16
bytes, though they lie so that they could), crash, timeout. Of a case: ok, or error where the model did not run.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import llmcomp
from llmcomp.codegen.build import Source
from tests.checks import NEW_TOKENS, with_type_of
from tests.children import report, run_all
from tests.models import Case, Kind, all_cases, case_named
from tests.sweep import one_line
from tests.triton_regions import Regions, assembled_verdict, load_bytes_wanted

FLOWS = ("logits", "generate", "static")
SHAPES_SEEN = ((1, 11), (2, 17), (3, 7))  # batch, length: the last two share a dynamic graph
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CAPABILITIES = (80, 90)
CALLS = 3  # shapes at which a kernel is looked at


@dataclass(frozen=True)
class KernelRecord:
    """A kernel as it was first met, and what became of it: the verdict and detail of each stage."""

    key: str
    case: str
    dtype: str
    family: str
    name: str
    text: str
    buffers: list[str]
    sizes: list[list[int]]
    wanted: int  # bytes of the narrowest load of a weight
    verdicts: dict[str, str] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CaseRecord:
    """One model in one dtype: which kernels it has."""

    case: str
    dtype: str
    verdict: str = "ok"
    detail: str = ""
    kernels: list[str] = field(default_factory=list)


# ---- running a model --------------------------------------------------------------------------------------


def run_case(case: Case, dtype: torch.dtype, regions: Regions, flows: Sequence[str] = FLOWS, weights: str = "") -> None:
    """Run a model in the ways of `flows`, so that its kernels are seen; with `weights` in a storage format."""
    model = case.build(dtype)
    if weights:
        llmcomp.quantize_(model, weights)
    torch._dynamo.reset()
    model.compile(backend=regions.backend)
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for flow in flows:
            _run_flow(case, model, flow)
    torch._dynamo.reset()


def _run_flow(case: Case, model: PreTrainedModel, flow: str) -> None:
    if flow == "logits":
        for shape in SHAPES_SEEN:
            model(**with_type_of(case.inputs(*shape), model))
        return
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    if flow == "static":
        settings["cache_implementation"] = "static"
    model.generate(**with_type_of(case.prompt(2, 9, padding=3), model), **settings)


def flows_of(case: Case) -> tuple[str, ...]:
    """The ways to run a case."""
    return FLOWS if case.kind is Kind.CAUSAL else FLOWS[:2] if case.generates else FLOWS[:1]


# ---- in a child that interprets ---------------------------------------------------------------------------


def interpret_case(name: str, dtypes: Sequence[str], known: Collection[str], weights: str) -> None:
    """Report, for each dtype, the case and its kernels that are not yet known."""
    seen = set(known)
    for dtype in dtypes:
        regions = Regions(CALLS, known=seen)
        errors = [
            error
            for flow in flows_of(case_named(name))
            if (error := _run(case_named(name), dtype, flow, regions, weights))
        ]
        found = [_record(key, name, dtype, regions) for key in regions.kernels]
        seen |= regions.kernels.keys()
        case = CaseRecord(name, dtype, "error" if errors else "ok", "; ".join(errors), sorted(regions.met))
        report({"case": asdict(case), "kernels": [asdict(k) for k in found]})


def _run(case: Case, dtype: str, flow: str, regions: Regions, weights: str) -> str:
    try:
        run_case(case, DTYPES[dtype], regions, [flow], weights)
    except Exception as error:
        return f"{flow}: {one_line(error)}"
    return ""


def _record(key: str, case: str, dtype: str, regions: Regions) -> KernelRecord:
    found = regions.kernels[key]
    kernel = found.kernel
    return KernelRecord(
        key,
        case,
        dtype,
        type(kernel).__name__,
        kernel.name,
        found.source.text,
        [str(b.dtype).removeprefix("torch.") for b in kernel.buffers],
        [list(s) for s in found.sizes],
        load_bytes_wanted(kernel),
        {"interpreted": found.verdict},
        {"interpreted": found.detail} if found.detail else {},
    )


# ---- in a child that assembles ----------------------------------------------------------------------------


def assemble_kernels(keys: Sequence[str], path: Path) -> None:
    """Report the verdicts of each kernel for all GPUs."""
    records = {r["key"]: KernelRecord(**r) for r in json.loads(path.read_text())}
    for key in keys:
        record = records[key]
        source = Source(record.name, "triton", record.text)
        dtypes = [getattr(torch, name) for name in record.buffers]
        verdicts, details = {}, {}
        for capability in CAPABILITIES:
            found = assembled_verdict(source, dtypes, record.sizes, capability, record.wanted)
            verdicts[f"sm_{capability}"], detail = found
            if detail:
                details[f"sm_{capability}"] = detail
        report({"verdicts": verdicts, "details": details})


# ---- the parent -------------------------------------------------------------------------------------------


class Store:
    """Cases and kernels so far, kept in a file that is written anew after each case."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        stored: dict[str, Any] = {"cases": [], "kernels": []}
        if path is not None and path.exists():
            stored = json.loads(path.read_text())
        self.cases = {(r["case"], r["dtype"]): CaseRecord(**r) for r in stored["cases"]}
        self.kernels = {r["key"]: KernelRecord(**r) for r in stored["kernels"]}

    def forget(self, name: str) -> None:
        """Look at a case again, and at the kernels that were met there first."""
        self.cases = {k: c for k, c in self.cases.items() if c.case != name}
        self.kernels = {k: r for k, r in self.kernels.items() if r.case != name}

    def add(self, cases: Iterable[CaseRecord], kernels: Iterable[KernelRecord]) -> None:
        """Add records and write the file."""
        self.cases |= {(c.case, c.dtype): c for c in cases}
        self.kernels |= {k.key: k for k in kernels}
        if self.path is not None:
            content = {"cases": self.cases, "kernels": self.kernels}
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps({n: [asdict(r) for r in rs.values()] for n, rs in content.items()}, indent=0))
            new.replace(self.path)


def look_at(name: str, dtypes: Sequence[str], store: Store, timeout: float, weights: str) -> list[KernelRecord]:
    """Run both processes of a case; the kernels that are new."""
    with tempfile.TemporaryDirectory() as folder:
        known, texts = Path(folder) / "known.json", Path(folder) / "kernels.json"
        known.write_text(json.dumps(sorted(store.kernels)))

        def interpreting(left: Sequence[str]) -> list[str]:
            of_weights = ["--weights", weights] if weights else []
            return _child("--interpret", name, "--dtypes", ",".join(left), "--file", str(known), *of_weights)

        cases, kernels = [], {}
        for outcome in run_all(dtypes, interpreting, timeout, {"TRITON_INTERPRET": "1"}):
            if outcome.fields is None:
                cases.append(CaseRecord(name, outcome.item, outcome.verdict, outcome.detail))
                continue
            cases.append(CaseRecord(**outcome.fields["case"]))
            kernels |= {r["key"]: KernelRecord(**r) for r in outcome.fields["kernels"]}
        texts.write_text(json.dumps([asdict(k) for k in kernels.values()]))

        def assembling(left: Sequence[str]) -> list[str]:
            return _child("--assemble", ",".join(left), "--file", str(texts))

        for outcome in run_all(list(kernels), assembling, timeout, {"TRITON_INTERPRET": "0"}):
            record, fields = kernels[outcome.item], outcome.fields
            died = {f"sm_{c}": outcome.verdict for c in CAPABILITIES}
            record.verdicts.update(fields["verdicts"] if fields else died)
            record.details.update(fields["details"] if fields else {"sm_80": outcome.detail})
    store.add(cases, kernels.values())
    return list(kernels.values())


def _child(*options: str) -> list[str]:
    return [sys.executable, "-m", "tests.triton_sweep", *options]


def bad(record: KernelRecord) -> list[str]:
    """The lines about the stages in which a kernel is not ok."""
    return [
        f"{stage} {verdict}: {record.details.get(stage, '')}"
        for stage, verdict in record.verdicts.items()
        if verdict != "ok"
    ]


def print_summary(store: Store, names: Collection[str]) -> bool:
    """Failures in full, then counts; whether all is well."""
    cases = [c for c in store.cases.values() if c.case in names]
    met = {key for c in cases for key in c.kernels}
    kernels = [k for k in store.kernels.values() if k.key in met]
    for c in cases:
        if c.verdict != "ok":
            print(f"{c.case} {c.dtype} {c.verdict}: {c.detail}")
    for k in kernels:
        for line in bad(k):
            print(f"{k.case} {k.dtype} {k.key} {k.sizes} {line}")
    print(f"{len(names)} architectures, {len(met)} distinct kernels {dict(Counter(k.family for k in kernels))}")
    for stage in ("interpreted", *(f"sm_{c}" for c in CAPABILITIES)):
        print(f"{stage:12} {dict(Counter(k.verdicts.get(stage, 'missing') for k in kernels))}")
    return not any(bad(k) for k in kernels) and all(c.verdict == "ok" for c in cases)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="file of records; cases that it holds are not run again")
    parser.add_argument("--only", default="", help="names of cases, with commas")
    parser.add_argument("--again", default="", help="names of cases to look at once more, with commas")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="with commas")
    parser.add_argument("--weights", default="", help="a storage format for the weights")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for each process of one case")
    parser.add_argument("--interpret", help=argparse.SUPPRESS)
    parser.add_argument("--assemble", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; the exit status is 1 if a kernel or a case is not ok."""
    args = parse(arguments)
    dtypes = args.dtypes.split(",")
    if args.interpret or args.assemble:
        warnings.filterwarnings("ignore")
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(1)
        if args.interpret:
            interpret_case(args.interpret, dtypes, json.loads(args.file.read_text()), args.weights)
        else:
            assemble_kernels(args.assemble.split(","), args.file)
        return 0
    names = args.only.split(",") if args.only else [c.name for c in all_cases()]
    store = Store(args.json)
    for name in args.again.split(","):
        store.forget(name)
    for name in names:
        todo = [d for d in dtypes if (name, d) not in store.cases]
        if not todo:
            continue
        found = look_at(name, todo, store, args.timeout, args.weights)
        failed = sum(bool(bad(k)) for k in found)
        print(f"{name:24} {len(found):4} new kernels, {failed} not ok", flush=True)
    return int(not print_summary(store, names))


if __name__ == "__main__":
    sys.exit(main())
