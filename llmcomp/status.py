"""What kernels report besides their results: an index out of range, a division by zero.

A kernel on the CPU has finished when it returns. One on a GPU has not: it writes into host memory that both see,
and the word is read without waiting, when a program is called next: the next token of a generation, mostly. So an
index out of range raises there, where eager CUDA stops with a device-side assertion that no later call survives.
"""

from functools import cache

import torch


def check_status(status: int) -> None:
    """Raise what eager raises for what a kernel found.

    Raises:
        IndexError: an index of an embedding or a gather was out of range.
        RuntimeError: an integer was divided by zero.
    """
    if status & 1:
        raise IndexError("index out of range in self")
    if status:
        raise RuntimeError("ZeroDivisionError")


class Status:
    """A word in host memory that GPU kernels write on failure: a call without one costs the GPU nothing."""

    def __init__(self, device: str) -> None:
        with torch.inference_mode(False):  # it outlives whatever mode the first compilation ran in
            self.word = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=device == "cuda")

    def check(self) -> None:
        """Raise for what kernels have reported so far, once.

        Raises:
            IndexError: an index was out of range, in this call or an earlier one; the element read was another.
        """
        if self.word.item():
            self.word.zero_()
            raise IndexError("index out of range in self (found by a GPU kernel of this call or of an earlier one)")


@cache
def shared_status(device: str) -> Status:
    """The word of all programs: what a prefill found is raised by the decode step that follows it."""
    return Status(device)
