"""A child that dies costs one item."""

import sys
from collections.abc import Sequence

from tests.children import Outcome, run_all

CHILD = """
import os, sys, time
for item in sys.argv[1:]:
    if item == "dies":
        os._exit(3)
    if item == "hangs":
        time.sleep(60)
    print("noise")
    print('record:{"n": "' + item + '"}', flush=True)
"""


def command(items: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", CHILD, *items]


def test_the_items_after_a_dead_one_are_run() -> None:
    outcomes = list(run_all(["a", "dies", "b", "dies"], command, 60.0))
    assert outcomes == [
        Outcome("a", {"n": "a"}),
        Outcome("dies", None, "crash", "exit 3: "),
        Outcome("b", {"n": "b"}),
        Outcome("dies", None, "crash", "exit 3: "),
    ]


def test_an_item_that_hangs_is_left_behind() -> None:
    outcomes = list(run_all(["a", "hangs"], command, 2.0))
    assert outcomes == [Outcome("a", {"n": "a"}), Outcome("hangs", None, "timeout", "over 2 s")]
