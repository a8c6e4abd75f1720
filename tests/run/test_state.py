"""The counters of a run in a checkpoint."""

from __future__ import annotations

import json

import pytest

from sgan_dist.run.state import TrainState


def test_means_continue_from_a_checkpoint() -> None:
    straight, first = TrainState(), TrainState()
    for state in (straight, first):
        state.add_metrics({"loss": 1.0})
    second = TrainState.from_state_dict(1, json.loads(json.dumps(first.state_dict())))
    for state in (straight, second):
        state.add_metrics({"loss": 4.0, "now_and_then": 7.0})
    assert straight.take_means() == second.take_means() == {"loss": 2.5, "now_and_then": 7.0}
    assert straight.meters == {}


def test_an_incomplete_state_is_refused() -> None:
    values = TrainState(seconds=3.0).state_dict()
    assert "step" not in values and TrainState.from_state_dict(5, values).seconds == 3.0
    del values["alarms"]
    with pytest.raises(KeyError, match="alarms"):
        TrainState.from_state_dict(5, values)
