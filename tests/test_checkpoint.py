"""Checkpoints: whole or not at all, verified, pruned, and refused if they are of another run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sgan_dist import checkpoint
from sgan_dist.errors import UserError


def save(run: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(run, step, {"x": torch.arange(step)}, {"meaning": {}}, keep)


def test_the_newest_is_found_and_old_ones_are_pruned(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step)
    path, damaged = checkpoint.latest(tmp_path)
    assert path is not None and path.name == "step-00000010" and damaged == []
    assert checkpoint.read_meta(path)["step"] == 10
    assert checkpoint.read_state(path)["x"].tolist() == list(range(10))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000010",
    ]
    assert (tmp_path / "latest").read_text() == "checkpoints/step-00000010\n"


def damage_bytes(path: Path) -> None:
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(data)


def truncate(path: Path) -> None:
    data = (path / "state.pt").read_bytes()
    (path / "state.pt").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (damage_bytes, "checksum"),
        (truncate, "checksum"),
        (lambda path: (path / "state.pt").unlink(), "state.pt is missing"),
        (lambda path: (path / "meta.json").write_text('{"step": 4, "sha'), "cannot be read"),
        (lambda path: (path / "meta.json").unlink(), "meta.json is missing"),
    ],
)
def test_damaged_ones_are_skipped_with_a_line(
    harm: Callable[[Path], object], problem: str, tmp_path: Path
) -> None:
    save(tmp_path, 2)
    harm(save(tmp_path, 4))
    path, damaged = checkpoint.latest(tmp_path)
    assert path is not None and path.name == "step-00000002"
    assert len(damaged) == 1 and "step-00000004" in damaged[0] and problem in damaged[0]
    # when the step is saved again, it replaces the damaged one
    save(tmp_path, 4)
    assert checkpoint.latest(tmp_path)[0] == tmp_path / "checkpoints" / "step-00000004"


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_ones_of_later_steps_never_replace_a_good_one(keep: int, tmp_path: Path) -> None:
    for step in (8, 9):
        damage_bytes(save(tmp_path, step))
    for step in (2, 4):
        good = save(tmp_path, step, keep)
        assert checkpoint.latest(tmp_path) == (good, [])


@pytest.mark.parametrize("content", ["[]", "{}", "\xff"])
def test_any_garbage_is_skipped(content: str, tmp_path: Path) -> None:
    good, bad = save(tmp_path, 2), save(tmp_path, 4)
    (bad / "meta.json").write_text(content, encoding="latin-1")
    (tmp_path / "checkpoints" / "step-stray").write_text("")
    path, damaged = checkpoint.latest(tmp_path)
    assert path == good and len(damaged) == 1


def test_a_half_written_one_is_not_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 2)
    partial = tmp_path / "checkpoints" / ".partial-step-00000004"
    partial.mkdir()
    (partial / "state.pt").write_bytes(b"half")
    path, damaged = checkpoint.latest(tmp_path)
    assert path is not None and path.name == "step-00000002" and damaged == []
    save(tmp_path, 6)
    assert not partial.exists()


def test_an_unwritable_place_is_explained(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(UserError, match="cannot write checkpoint"):
        save(tmp_path, 2)


def test_another_run_is_refused_with_both_values(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    with pytest.raises(UserError, match=r"seed was 0 and is now 1.*another --run_dir"):
        checkpoint.refuse_other_run(path, {"seed": 0, "lr": 1}, {"seed": 1, "lr": 1})


def test_equal_weights_have_equal_digests() -> None:
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    b.load_state_dict(a.state_dict())
    assert checkpoint.weights_sha256({"d": a}) == checkpoint.weights_sha256({"d": b})
    with torch.no_grad():
        b.bias[0] += 1e-7
    assert checkpoint.weights_sha256({"d": a}) != checkpoint.weights_sha256({"d": b})
