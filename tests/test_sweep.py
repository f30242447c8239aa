"""Every check on every architecture, each in its own process (hours; `python -m tests.sweep` has a table)."""

import json
from pathlib import Path

import pytest

from llmcomp.passes.groups import LEFT_TO_LIBRARY
from llmcomp.report import ExternReport, KernelReport, ProgramReport
from tests.checks import Work, checks_of, work_of_program
from tests.models import Case, all_cases, case_named
from tests.sweep import Record, Store, line_of, main, spawn

TIMEOUT = 900.0


@pytest.mark.sweep
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_architecture(case: Case) -> None:
    records = list(spawn(case.name, checks_of(case), "llmcomp", TIMEOUT))
    bad = [r for r in records if r.verdict not in ("ok", "uncheckable")]
    assert not bad, "\n".join(f"{r.check} {r.verdict}: {r.detail}" for r in bad)
    assert any(r.verdict == "ok" for r in records), "nothing could be checked"


def test_the_store_resumes(tmp_path: Path) -> None:
    path, case = tmp_path / "out.json", case_named("bert-token")
    Store(path).add([Record(case.name, "logits", "ok"), Record(case.name, "padded", "wrong")])
    store = Store(path)
    assert store.missing(case, ["logits", "padded", "bfloat16"], ()) == ["bfloat16"]
    assert store.missing(case, ["logits", "padded"], ("wrong",)) == ["padded"]
    assert len(json.loads(path.read_text())) == 2


def test_shares_are_those_of_the_sum() -> None:
    assert (Work(100, 50) + Work(300, 250)).shares == (0.75, 1.0)
    records = [Record("a", "x", "ok", work=Work(100, 50, 8, 2)), Record("a", "y", "ok", work=Work(300, 250))]
    assert "  75%   25% " in line_of(records)


def test_the_library_of_the_cpu_is_counted_apart() -> None:
    def linear(rows: int) -> ExternReport:
        reason = LEFT_TO_LIBRARY if rows > 16 else "it does not fit"
        return ExternReport("llmcomp.linear.default", "x", reason, 0, 2 * rows * 100, 400)

    kernel = KernelReport("k", "map", ("n",), 0, 30, 20)
    programs = [ProgramReport(target, (kernel,), (linear(8), linear(64))) for target in ("cpp", "triton")]
    assert work_of_program(programs[0]) == Work(1630, 30, 420, 20, 12800)
    assert work_of_program(programs[1]) == Work(14430, 30, 820, 20, 0)


def test_main_says_no_when_a_check_fails(tmp_path: Path) -> None:
    path, names = tmp_path / "out.json", ["bert-token", "--checks", "logits"]
    Store(path).add([Record("bert-token", "logits", "ok")])
    assert main(["--json", str(path), "--only", *names]) == 0
    Store(path).add([Record("bert-token", "logits", "breaks")])
    assert main(["--json", str(path), "--only", *names]) == 1
