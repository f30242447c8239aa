"""The first thing that a user runs works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_quickstart_streams_the_tokens_of_eager(tmp_path: Path) -> None:
    command = [sys.executable, "examples/quickstart.py", "--new-tokens", "12", "--no-inductor"]
    environment = {**os.environ, "LLMCOMP_CACHE": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "12 of 12 tokens equal eager's" in run.stdout and str(tmp_path) in run.stdout
    assert "llmcomp compiles" in run.stderr and list(tmp_path.glob("*.so"))
