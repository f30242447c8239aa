"""The peers of a benchmark as running processes, which do what they are asked and may die."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmcomp.bench_model import Setup
from llmcomp.bench_peer import MARK, PEERS

CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "LLMCOMP_CACHE": "llmcomp"}


class Died(Exception):
    """The process of a peer has ended; the text says how."""


class Process:
    """A running peer. Everything that waits for an answer raises Died where none can come."""

    def __init__(self, peer: str, setup: Setup, caches: Path) -> None:
        self.peer = peer
        folders = {name: str(caches / peer / folder) for name, folder in CACHES.items()}
        environment = {**os.environ, **folders, **PEERS[peer].environment}
        self.pipe = subprocess.Popen(
            peer_command(peer, setup), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.weights = int(self._answer()["weights"])

    def ask(self, do: str, **fields: object) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self.pipe.stdin is not None
        with suppress(BrokenPipeError):
            self.pipe.stdin.write(json.dumps({"do": do, **fields}) + "\n")
            self.pipe.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.pipe.stdin is not None
        with suppress(BrokenPipeError):
            self.pipe.stdin.close()
        self.pipe.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.pipe.stdout is not None
        for line in self.pipe.stdout:
            if line.startswith(MARK):
                found: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return found
        raise Died(ending(self.pipe.wait()))


def peer_command(peer: str, setup: Setup) -> list[str]:
    """The command line that starts a peer."""
    return [sys.executable, "-m", "llmcomp.bench_peer", peer, json.dumps(asdict(setup))]


def ending(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"exit status {status}"
    return f"killed by signal {-status}" + (", probably out of memory" if status == -signal.SIGKILL else "")


@contextmanager
def running(peer: str, setup: Setup, caches: Path) -> Iterator[Process]:
    """A peer, ended afterwards."""
    process = Process(peer, setup, caches)
    try:
        yield process
    finally:
        process.close()


def say(text: str) -> None:
    """Progress, for the person who waits."""
    print(text, file=sys.stderr, flush=True)
