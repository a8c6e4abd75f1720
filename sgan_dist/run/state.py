"""What a checkpoint keeps in addition to the networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """The counters of a run. Data, noise and learning rate are functions of `step`."""

    step: int = 0
    """number of updates"""
    seconds: float = 0.0
    """wall-clock seconds of training up to the last save, over all starts"""
    save_seconds: float = 0.0
    """the slowest save so far"""
    meters: dict[str, list[float]] = field(default_factory=dict)
    """metric -> its sum over the steps since the last line of metrics, and their number"""
    alarms: dict[str, float] = field(default_factory=dict)
    """see `sgan_dist.run.alarms.check`"""
    skipped: dict[str, int] = field(default_factory=dict)
    """damaged record -> samples lost with it"""

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values, without `step`, which is in a checkpoint's name and meta.json."""
        return {name: value for name, value in vars(self).items() if name != "step"}

    @staticmethod
    def from_state_dict(step: int, state: dict[str, Any]) -> TrainState:
        """Returns the state of a `state_dict`. Raises KeyError if a value is missing."""
        return TrainState(step, **{name: state[name] for name in TrainState().state_dict()})

    def add_metrics(self, metrics: dict[str, float]) -> None:
        """Adds the metrics of one step."""
        for name, value in metrics.items():
            total, count = self.meters.get(name, (0.0, 0.0))
            self.meters[name] = [total + value, count + 1]

    def take_means(self) -> dict[str, float]:
        """Returns the means since the last call."""
        means = {name: total / count for name, (total, count) in self.meters.items()}
        self.meters.clear()
        return means
