"""Run every check on every architecture, one process for each, and print a table.

    python -m tests.sweep --jobs 2 --json sweep.json             goes on where the file ends
    python -m tests.sweep --only llama,gpt2 --checks logits      without a file: always afresh
    python -m tests.sweep --json sweep.json --again wrong,error  runs those verdicts once more

Verdicts: ok, wrong (an assertion failed: results, or a graph that ran eager), error (any other exception),
timeout, crash (the process died), breaks (more graph breaks than eager Dynamo has), uncheckable (the check
fails with Dynamo alone, so it says nothing about llmcomp).
"""

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.checks import CHECKS, Count, Work, checks_of
from tests.children import report, run_all
from tests.models import Case, all_cases, case_named

EAGER = "eager"


@dataclass(frozen=True)
class Record:
    """The outcome of one check of one case."""

    case: str
    check: str
    verdict: str
    detail: str = ""
    graphs: int = 0
    breaks: int = 0
    ties: int = 0
    seconds: float = 0.0
    work: Work = Work()


def run_check(case: Case, check: str, backend: str) -> Record:
    """Run one check in this process."""
    start = time.perf_counter()
    try:
        count = CHECKS[check](case, backend)
    except Exception as error:
        verdict = "wrong" if isinstance(error, AssertionError) else "error"
        if backend != EAGER and (control := run_check(case, check, EAGER)).verdict in ("wrong", "error"):
            return Record(case.name, check, "uncheckable", control.detail)
        return Record(case.name, check, verdict, one_line(error), seconds=time.perf_counter() - start)
    return judged(case, check, count, backend, time.perf_counter() - start)


def judged(case: Case, check: str, count: Count, backend: str, seconds: float) -> Record:
    """The record of a check that passed: graph breaks are looked up with Dynamo alone."""
    verdict, detail = "ok", ""
    if count.breaks and backend != EAGER:
        allowed = run_check(case, check, EAGER).breaks
        if count.breaks > allowed:
            verdict, detail = "breaks", f"{count.breaks} graph breaks, eager Dynamo has {allowed}"
    return Record(case.name, check, verdict, detail, count.graphs, count.breaks, count.ties, seconds, count.work)


def one_line(error: Exception) -> str:
    """The type and the message of an error; of a failure inside the backend, the one that Dynamo wrapped."""
    inner = getattr(error, "inner_exception", None) or error
    return f"{type(inner).__name__}: {' '.join(str(inner).split())}"[:400]


def run_case(name: str, checks: Sequence[str], backend: str) -> None:
    """The child: report one record per check."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    case = case_named(name)
    for check in checks:
        report(asdict(run_check(case, check, backend)))


def spawn(name: str, checks: Sequence[str], backend: str, timeout: float) -> Iterator[Record]:
    """The parent: records of one case, from as many processes as crashes and timeouts make necessary."""

    def command(left: Sequence[str]) -> list[str]:
        options = ["--child", name, "--checks", ",".join(left), "--backend", backend]
        return [sys.executable, "-m", "tests.sweep", *options]

    for outcome in run_all(checks, command, timeout):
        if outcome.fields is None:
            yield Record(name, outcome.item, outcome.verdict, outcome.detail)
        else:
            yield parsed(outcome.fields)


def parsed(fields: dict[str, Any]) -> Record:
    """A record from its JSON form."""
    return Record(**{**fields, "work": Work(**fields["work"])})


class Store:
    """The records so far, kept in a file that is written anew after each case."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        stored = json.loads(path.read_text()) if path is not None and path.exists() else []
        self.records = {(r.case, r.check): r for r in map(parsed, stored)}

    def add(self, records: Iterable[Record]) -> None:
        """Add records and write the file."""
        self.records |= {(r.case, r.check): r for r in records}
        if self.path is not None:
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps([asdict(r) for r in self.records.values()], indent=0))
            new.replace(self.path)

    def missing(self, case: Case, checks: Sequence[str], again: Sequence[str]) -> list[str]:
        """The checks of a case that have no record yet, or one whose verdict is in `again`."""
        wanted = [c for c in checks_of(case) if c in checks]
        known = {c: self.records.get((case.name, c)) for c in wanted}
        return [c for c, record in known.items() if record is None or record.verdict in again]


def line_of(records: Sequence[Record]) -> str:
    """One row of the table: a case."""
    cells = [r.check if r.verdict == "ok" else f"{r.check}={r.verdict.upper()}" for r in records]
    work = sum((r.work for r in records), Work())
    flops, weights = (f"{100 * share:.0f}%" if work.flops else "-" for share in work.shares)
    seconds, ties = sum(r.seconds for r in records), sum(r.ties for r in records)
    return f"{records[0].case:24} {flops:>5} {weights:>5} {ties:3} {seconds:6.1f}  {' '.join(cells)}"


def print_summary(records: Iterable[Record]) -> None:
    """Failures in full, then the count of each verdict."""
    records = list(records)
    for r in records:
        if r.verdict != "ok":
            print(f"{r.verdict:12} {r.case} {r.check}: {r.detail}")
    counts = Counter(r.verdict for r in records)
    bad = {r.case for r in records if r.verdict not in ("ok", "uncheckable")}
    print(f"{len({r.case for r in records})} architectures, {len(bad)} with failures; checks: {dict(counts)}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--json", type=Path, help="file of records; checks that it holds are not run again")
    parser.add_argument("--only", default="", help="names of cases, with commas")
    parser.add_argument("--checks", default=",".join(CHECKS), help="names of checks, with commas")
    parser.add_argument("--again", default="", help="verdicts to run once more, with commas")
    parser.add_argument("--backend", default="llmcomp")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for the checks of one case")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; the exit status is 1 if any check failed."""
    args = parse(arguments)
    checks, again = args.checks.split(","), args.again.split(",")
    if args.child:
        run_case(args.child, checks, args.backend)
        return 0
    cases = [case_named(n) for n in args.only.split(",")] if args.only else all_cases()
    store = Store(args.json)
    print(f"{'':24} {'flops':>5} {'bytes':>5} {'tie':>3} {'sec':>6}")
    with ThreadPoolExecutor(args.jobs) as pool:
        work = {c.name: store.missing(c, checks, again) for c in cases}
        jobs = [
            pool.submit(lambda n, todo: list(spawn(n, todo, args.backend, args.timeout)), name, todo)
            for name, todo in work.items()
            if todo
        ]
        for job in as_completed(jobs):
            records = job.result()
            store.add(records)
            print(line_of(records), flush=True)
    names = {c.name for c in cases}
    found = [r for r in store.records.values() if r.case in names]
    print_summary(found)
    return int(any(r.verdict not in ("ok", "uncheckable") for r in found))


if __name__ == "__main__":
    sys.exit(main())
