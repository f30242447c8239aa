"""Run PyTorch's operator and module database through the backend, in processes that may crash; print a table.

    python -m tests.opinfo_sweep --shard 0/4 --json ops.json         goes on where the file ends
    python -m tests.opinfo_sweep --only softmax,nn.Linear            without a file: always afresh
    python -m tests.opinfo_sweep --json ops.json --again             runs once more what had failures

The verdicts are those of tests/opinfo.py; a process that dies adds `crash` or `timeout`.
"""

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.children import report, run_all
from tests.opinfo import BAD, Result, module_cases, op_cases, run

FAILED = (*BAD, "crash", "timeout")
# Cases that share a process: starting one takes seconds, and a case that hangs costs all of them.
BATCH = 16


def run_here(names: Sequence[str], backend: str, limit: int | None) -> None:
    """The child: report one result per case."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cases = op_cases() | module_cases()
    for name in names:
        report(run(cases[name], backend, limit).fields())


def spawn(names: Sequence[str], backend: str, limit: int, timeout: float) -> Iterator[Result]:
    """The parent: results of a batch of cases."""

    def command(left: Sequence[str]) -> list[str]:
        options = ["--child", ",".join(left), "--backend", backend, "--limit", str(limit)]
        return [sys.executable, "-m", "tests.opinfo_sweep", *options]

    for outcome in run_all(names, command, timeout):
        if outcome.fields is None:
            yield Result(outcome.item, Counter([outcome.verdict]), [f"{outcome.verdict}: {outcome.detail}"])
        else:
            yield Result(outcome.item, Counter(outcome.fields["verdicts"]), outcome.fields["failures"])


class Store:
    """The results so far, kept in a file that is written anew after each batch."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        stored = json.loads(path.read_text()) if path is not None and path.exists() else []
        self.results = {f["name"]: Result(f["name"], Counter(f["verdicts"]), f["failures"]) for f in stored}

    def add(self, results: Iterable[Result]) -> None:
        """Add results and write the file."""
        self.results |= {r.name: r for r in results}
        if self.path is not None:
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps([r.fields() for r in self.results.values()], indent=0))
            new.replace(self.path)

    def missing(self, names: Sequence[str], again: bool) -> list[str]:
        """The names without a result, and where `again` those that had failures."""
        return [n for n in names if n not in self.results or (again and self.results[n].failures)]


def print_summary(results: Iterable[Result]) -> int:
    """Print failures in full, then the count of each verdict; return how many samples failed."""
    total: Counter[str] = Counter()
    results = list(results)
    for r in results:
        total += r.verdicts
        for failure in r.failures:
            print(f"{r.name}: {failure}")
    failed = sum(total[v] for v in FAILED)
    print(f"{len(results)} operators and modules, {total.total()} samples: {dict(total.most_common())}")
    print(f"{failed} failures in {sum(bool(r.failures) for r in results)} of them")
    return failed


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th case, from the i-th")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--json", type=Path, help="file of results; cases that it holds are not run again")
    parser.add_argument("--only", default="", help="names of cases, with commas")
    parser.add_argument("--again", action="store_true", help="run once more what had failures")
    parser.add_argument("--limit", type=int, default=0, help="samples of a case at most; 0 for all")
    parser.add_argument("--backend", default="llmcomp")
    parser.add_argument("--timeout", type=float, default=1800.0, help=f"seconds for {BATCH} cases")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; the exit status is 1 if any sample failed."""
    args = parse(arguments)
    if args.child:
        run_here(args.child.split(","), args.backend, args.limit or None)
        return 0
    shard, shards = map(int, args.shard.split("/"))
    every = sorted(op_cases() | module_cases())[shard::shards]
    names = args.only.split(",") if args.only else every
    store = Store(args.json)
    todo = store.missing(names, args.again)
    batches = [todo[i : i + BATCH] for i in range(0, len(todo), BATCH)]
    with ThreadPoolExecutor(args.jobs) as pool:
        for results in pool.map(lambda batch: list(spawn(batch, args.backend, args.limit, args.timeout)), batches):
            store.add(results)
            for r in results:
                print(f"{r.name:44} {dict(r.verdicts)}", flush=True)
    return int(print_summary(r for n, r in store.results.items() if n in names) > 0)


if __name__ == "__main__":
    sys.exit(main())
