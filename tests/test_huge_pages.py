"""llmcomp/huge_pages.py: memory that is in use gets huge pages, in place."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llmcomp import backend
from llmcomp.huge_pages import SETTINGS, back_by_huge_pages

MIB = 2**20


def settings(folder: Path, enabled: str) -> Path:
    (folder / "enabled").write_text(enabled)
    (folder / "hpage_pmd_size").write_text(str(2 * MIB))
    return folder


def test_values_and_addresses_stay() -> None:
    weight = torch.randn(16 * MIB // 4)
    before, address = weight.clone(), weight.data_ptr()
    with FakeTensorMode():
        fake = torch.empty(4 * MIB)
    others = [torch.zeros(4), torch.empty(0), torch.empty(4 * MIB, device="meta"), fake, torch.eye(2).to_sparse()]
    found = back_by_huge_pages([weight, *others])
    assert found <= weight.nbytes and found % (2 * MIB) == 0
    assert torch.equal(weight, before) and weight.data_ptr() == address


def test_pages_are_huge(tmp_path: Path) -> None:
    if back_by_huge_pages([weight := torch.randn(64 * MIB // 4)]) == 0:
        pytest.skip(f"this system gives no huge pages to memory in use: {SETTINGS}/enabled, Linux 6.1")
    rollup = Path("/proc/self/smaps_rollup").read_text()
    (line,) = [line for line in rollup.splitlines() if line.startswith("AnonHugePages")]
    assert int(line.split()[1]) * 1024 >= weight.nbytes - 4 * MIB


@pytest.mark.parametrize("enabled", ["always madvise [never]", None])
def test_where_the_system_has_none(tmp_path: Path, enabled: str | None) -> None:
    folder = tmp_path / "absent" if enabled is None else settings(tmp_path, enabled)
    assert back_by_huge_pages([torch.randn(16 * MIB // 4)], folder) == 0


def test_parts_of_files_are_left_alone(tmp_path: Path) -> None:
    torch.randn(16 * MIB // 4).numpy().tofile(tmp_path / "weight")
    mapped = torch.from_file(str(tmp_path / "weight"), shared=True, size=16 * MIB // 4)
    before = mapped.clone()
    back_by_huge_pages([mapped])
    assert torch.equal(mapped, before)


def test_compiled_models_ask_for_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(backend, "back_by_huge_pages", lambda tensors: asked.extend(t.numel() for t in tensors))
    model = nn.Linear(64, 8).eval()
    with torch.no_grad():
        torch.compile(model, backend="llmcomp")(torch.randn(2, 64))
    assert sorted(asked) == [8, 512]
