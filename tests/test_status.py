"""What kernels report: the words of both targets, as the errors that eager raises."""

import pytest
import torch

from llmcomp.status import Status, check_status, shared_status


def test_a_status_of_the_cpu_is_an_error_of_eager() -> None:
    check_status(0)
    with pytest.raises(IndexError, match="index out of range in self"):
        check_status(1)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        check_status(2)


def test_a_report_raises_once() -> None:
    status = Status("cpu")
    status.check()
    status.word.fill_(1)
    with pytest.raises(IndexError, match="found by a GPU kernel of this call or of an earlier one"):
        status.check()
    status.check()


def test_the_word_does_not_depend_on_where_it_was_made() -> None:
    with torch.inference_mode(), torch.device("meta"):
        status = Status("cpu")
    assert status.word.device.type == "cpu" and not status.word.is_inference()
    status.word.fill_(1)
    with torch.inference_mode(), pytest.raises(IndexError):
        status.check()


def test_programs_share_a_word() -> None:
    assert shared_status("cpu") is shared_status("cpu")
