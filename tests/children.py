"""Run items in child processes that may crash or hang, and lose no more than the item that did it."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = "record:"


@dataclass(frozen=True)
class Outcome:
    """What became of one item: the fields that its child printed, or (`verdict`, `detail`) where it died."""

    item: str
    fields: dict[str, Any] | None
    verdict: str = ""
    detail: str = ""


def report(fields: dict[str, Any]) -> None:
    """Called by a child when an item is done, in the order of its items."""
    print(MARK + json.dumps(fields), flush=True)


def run_all(
    items: Sequence[str],
    command: Callable[[Sequence[str]], Sequence[str]],
    timeout: float,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Outcome]:
    """Run `command(items)`; where it dies or takes over `timeout` seconds, go on after the item it was at.

    `environment` is added to that of this process.
    """
    left = list(items)
    while left:
        found, verdict, detail = run_child(command(left), timeout, environment or {})
        yield from (Outcome(item, fields) for item, fields in zip(left, found, strict=False))
        left = left[len(found) :]
        if left:
            yield Outcome(left.pop(0), None, verdict, detail)


def run_child(
    command: Sequence[str], timeout: float, environment: Mapping[str, str]
) -> tuple[list[dict[str, Any]], str, str]:
    """The fields that a child reported, and the verdict and detail on the item that it did not survive."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    try:
        child = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as expired:
        return records((expired.stdout or b"").decode()), "timeout", f"over {timeout:.0f} s"
    return records(child.stdout), "crash", f"exit {child.returncode}: {child.stderr[-300:]}"


def records(output: str) -> list[dict[str, Any]]:
    """The reports in what a child printed."""
    lines = (line.removeprefix(MARK) for line in output.splitlines() if line.startswith(MARK))
    return [json.loads(line) for line in lines]
