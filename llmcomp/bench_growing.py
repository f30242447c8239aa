"""A loop without a cache, model(ids) with ids one longer at each call, side by side for several peers.

    python -m llmcomp.bench --growing 512 --peers llmcomp,inductor

The first peer runs every call and chooses the tokens, greedily. The others are given its tokens and run every
call too, or with --stride 16 every sixteenth, of which each then counts for sixteen: what a call costs a peer
that computes everything anew depends on the length alone. Peers take turns, a segment of lengths each.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmcomp.bench_process import Process, say

SEGMENT = 64


@dataclass
class Growing:
    """Seconds of the calls of one peer, by length of the sequence, and the tokens that it would choose."""

    stride: int
    seconds: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds of the whole loop."""
        return self.stride * sum(self.seconds.values())

    def near(self, length: int) -> float:
        """Seconds of a call around some length: the median of the eight nearest."""
        nearest = sorted(self.seconds, key=lambda n: abs(n - length))[:8]
        return statistics.median(self.seconds[n] for n in nearest)


def measure_growing(processes: Mapping[str, Process], prompt: int, new: int, stride: int) -> dict[str, Growing]:
    """Run the loop from `prompt` tokens on for `new` calls; `stride` is for all peers but the first."""
    first, *others = processes
    results = {name: Growing(1 if name == first else stride) for name in processes}
    tokens: list[int] = []
    for start in range(prompt, prompt + new, SEGMENT):
        stop = min(start + SEGMENT, prompt + new)
        for name in (first, *others):
            answer = processes[name].ask(
                "grow", start=start, stop=stop, stride=results[name].stride, tokens=tokens, chooses=name == first
            )
            results[name].seconds |= {int(n): s for n, s in answer["seconds"].items()}
            results[name].tokens |= {int(n): t for n, t in answer["chosen"].items()}
            tokens = answer["tokens"] if name == first else tokens
        say(f"lengths {start} to {stop - 1}")
    return results


def growing_table(results: Mapping[str, Growing], prompt: int, new: int) -> str:
    """The totals as a Markdown table."""
    lines = [
        f"| peer | s for {new} calls | ms at {prompt} | ms at {prompt + new} | times of the first | tokens equal |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    best, *_ = results.values()
    for name, found in results.items():
        equal = sum(found.tokens[n] == best.tokens[n] for n in found.tokens)
        ends = (1e3 * found.near(n) for n in (prompt, prompt + new))
        lines.append(
            f"| {name} | {found.total:.1f} | {' | '.join(f'{ms:.1f}' for ms in ends)} "
            f"| {found.total / best.total:.1f} | {equal}/{len(found.tokens)} |"
        )
    return "\n".join(lines)


def compile_first(process: Process, prompt: int) -> float:
    """A few calls with short sequences, in which everything is compiled; seconds."""
    start = max(prompt // 2, 4)
    answer = process.ask("grow", start=start, stop=start + 8, stride=1, tokens=[], chooses=True)
    return float(sum(answer["seconds"].values()))
