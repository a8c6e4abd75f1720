"""The training loop: no message between hosts and no file system, and all ranks stop together."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sgan_dist import train
from sgan_dist.config import Config
from sgan_dist.data.stream import FullStream
from sgan_dist.errors import StopRequested, UserError
from sgan_dist.parallel import agreement
from sgan_dist.run import stopping, trainer
from sgan_dist.run.session import Session
from tests.conftest import small_config
from tests.ranks import run_ranks

pytestmark = pytest.mark.process
BUSY = (  # all that a loop does beside its steps
    "--train.log_every=2",
    "--train.evaluate_every=3",
    "--train.sample_every=4",
    "--checkpoint.every=5",
    "--train.steps=12",
)


def count_messages(rank: int, config: Config) -> tuple[int, int, dict[str, int]]:
    """Messages between hosts in the loop and outside, and who looked for files how often."""
    messages, looks = Counter[bool](), Counter[str]()
    inside = False
    store, exists, loop = agreement._store, stopping._exists, trainer._loop

    def counted_store() -> Any:
        messages[inside] += 1
        return store()

    def counted_exists(path: Any) -> bool:
        looks["in the loop" if inside and _is_main_thread() else "elsewhere"] += 1
        return exists(path)

    def marked_loop(session: Session) -> bool:
        nonlocal inside
        inside = True
        try:
            return loop(session)
        finally:
            inside = False

    agreement._store, stopping._exists, trainer._loop = counted_store, counted_exists, marked_loop
    assert train(config)["step"] == 12
    return messages[True], messages[False], dict(looks)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def test_the_loop_sends_no_message_and_looks_for_no_file(digits: Path, tmp_path: Path) -> None:
    config = small_config(digits, tmp_path, *BUSY)
    results = run_ranks(2, count_messages, config)
    for inside, outside, _ in results:
        assert inside == 0 and outside > 0
    (_, _, first), (_, _, second) = results
    assert first["elsewhere"] >= 1 and "in the loop" not in first
    assert second == {}  # one process of a node looks


def train_and_count(
    config: Config, before: Callable[[int], None] = lambda _: None
) -> tuple[int, str]:
    """The steps that a run has done, and how it ended; calls `before` with the number of each."""
    done, original = 0, Session.train_step

    def train_step(self: Session, batch: Any) -> None:
        nonlocal done
        before(batch.step)
        original(self, batch)
        done = self.state.step

    Session.train_step = train_step  # type: ignore[method-assign]
    try:
        train(config)
    except (StopRequested, UserError) as error:
        return done, str(error)
    return done, "no error"


def stop_at(rank: int, config: Config, step: int) -> tuple[int, str]:
    """Rank 1 alone is asked to stop, while it makes a step."""

    def ask(number: int) -> None:
        if rank == 1 and number == step:
            stopping._file_reason = "a test"

    return train_and_count(config, ask)


@pytest.mark.parametrize("log_every", [1, 50])
def test_ranks_stop_after_the_same_step(log_every: int, digits: Path, tmp_path: Path) -> None:
    config = small_config(digits, tmp_path, f"--train.log_every={log_every}", "--train.steps=20")
    results = run_ranks(3, stop_at, config, 4)
    assert len(set(results)) == 1
    steps, message = results[0]
    # after step 4 where its flags are read at once, as before a line of metrics; else a step later
    assert steps == (5 if log_every == 1 else 6)
    assert message.startswith(f"stopped after {steps} of 20 steps by a test")


def fail_at(rank: int, config: Config, step: int) -> tuple[int, str]:
    """Rank 1 alone cannot read its part of the batch of a step."""
    take = FullStream.take

    def broken_take(self: FullStream, at: int, start: int, stop: int) -> Any:
        if rank == 1 and at == step:
            raise UserError(f"cannot read the batch of step {at}")
        return take(self, at, start, stop)

    FullStream.take = broken_take  # type: ignore[method-assign, assignment]
    return train_and_count(config)


@pytest.mark.parametrize(
    "step",
    [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 7],
)
def test_a_batch_that_one_rank_cannot_read_stops_all_before_it(
    step: int, digits: Path, tmp_path: Path
) -> None:
    config = small_config(digits, tmp_path, "--train.log_every=50", "--train.steps=9")
    results = run_ranks(2, fail_at, config, step)
    # the first two batches are awaited before the first step
    assert results == [(step if step > 1 else 0, f"cannot read the batch of step {step}")] * 2


def test_a_batch_beyond_the_end_is_not_read(digits: Path, tmp_path: Path) -> None:
    config = small_config(digits, tmp_path, "--train.steps=6")
    assert run_ranks(2, fail_at, config, 6) == [(6, "no error")] * 2
