"""Every check on every architecture, each in its own process (hours; `python -m tests.sweep` has a table)."""

import json
from pathlib import Path

import pytest

from tests.checks import Work, checks_of
from tests.models import Case, all_cases, case_named
from tests.sweep import Record, Store, main, share, spawn

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


def test_share_is_that_of_the_sum() -> None:
    records = [Record("a", "x", "ok", work=Work(100, 50)), Record("a", "y", "ok", work=Work(300, 250))]
    assert share(records, "flops") == "75%" and share(records, "weight_bytes") == "-"


def test_main_says_no_when_a_check_fails(tmp_path: Path) -> None:
    path, names = tmp_path / "out.json", ["bert-token", "--checks", "logits"]
    Store(path).add([Record("bert-token", "logits", "ok")])
    assert main(["--json", str(path), "--only", *names]) == 0
    Store(path).add([Record("bert-token", "logits", "breaks")])
    assert main(["--json", str(path), "--only", *names]) == 1
