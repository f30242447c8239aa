"""examples/finetune_pruned.py runs: pruned, trained in a format, distilled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "finetune_pruned.py"
SHORT = ["--steps", "2", "--length", "64", "--bytes", "3000"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["--prune", "2:4", "--format", "int4_g32"], {"pruned, int4_g32", "fine-tuned"}),
        (["--prune", "movement", "--distill", "--hidden", "1.0"], {"distilled"}),
    ],
)
def test_it_runs(arguments: list[str], keys: set[str]) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), *SHORT, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert keys <= found.keys() and 1 < found["dense"] < 200
    # Two steps tell movement nothing: what it prunes then is chance.
    assert all(1 < found[key] < (1e9 if "movement" in arguments else 2000) for key in keys)
