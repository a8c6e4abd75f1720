"""Names of settings: those of older versions, and the closest one to a misspelled name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

RENAMED = {  # since 0.1.0
    "data.labeled_batch": "batch.labeled",
    "data.unlabeled_batch": "batch.unlabeled",
    "data.balanced": "batch.balanced",
    "data.lanes": "stream.lanes",
    "data.window_mib": "stream.lane_window_mib",  # it was that of all lanes together
    "data.workers": "stream.workers",
    "data.cache": "remote.cache",
    "data.cache_gib": "remote.cache_gib",
    "data.tries": "remote.tries",
    "data.timeout": "remote.read_timeout",
    "train.fake_batch": "batch.fake",
    "train.accumulation": "batch.accumulation",
    "train.precision": "machine.precision",
    "train.world_size": "machine.world_size",
    "train.deepspeed": "machine.deepspeed",
    "train.replica_check_every": "machine.replica_check_every",
    "train.timeout": "machine.step_timeout",
}
CHANGED = {  # renamed with another meaning: what to do with the old value
    "data.window_mib": (
        "the size of one lane's window: divide the old value, of all lanes, by stream.lanes"
    ),
}
RENAMED_NETWORKS = {"book": "tutorial"}

_NO_GAIN = "it improved no result"
REMOVED = {  # -> why, and the value at which it did nothing; None: no value changed the run's result
    "train.baseline_steps": (
        "the supervised baseline is a run of its own, with --train.supervised_only=true",
        None,
    ),
    "loss.balanced": (_NO_GAIN, 0.0),
    "loss.consistency_rampup": (_NO_GAIN, 0),
    "loss.entropy": (_NO_GAIN, 0.0),
    "loss.label_smoothing": (_NO_GAIN, 0.0),
    "loss.pull_away": (_NO_GAIN, 0.0),
    "loss.r1": (_NO_GAIN, 0.0),
    "loss.vat": (_NO_GAIN, 0.0),
    "loss.vat_radius": ("it belonged to loss.vat, which improved no result", None),
    "optim.eps": ("Adam's epsilon is 1e-8", 1e-8),
}


def unknown(key: str, known: Iterable[str]) -> str:
    """Returns the sentence for a setting that does not exist, or no longer."""
    if key in RENAMED:
        meaning = f", {CHANGED[key]}" if key in CHANGED else ""
        return f"{key} is now called {RENAMED[key]}{meaning}"
    if key in REMOVED:
        return f"{key} was removed because {REMOVED[key][0]}: leave it out"
    if any(name.startswith(f"{key}.") for name in known):
        return f"{key} is a section, and holds no settings: give it some, or leave it out"
    close = difflib.get_close_matches(key, [*known, *RENAMED], 1)
    hint = f"did you mean {RENAMED.get(close[0], close[0])}?" if close else "see --help for all"
    return f"there is no setting {key}: {hint}"


def upgrade(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Translates settings by dotted key, as an older version wrote them, to the current names.

    Returns them, and those removed since that had an effect on the run.
    """
    current, removed = {}, {}
    for key, value in values.items():
        if key in ("model.discriminator", "model.generator"):
            value = RENAMED_NETWORKS.get(value, value)
        if key not in REMOVED:
            current[RENAMED.get(key, key)] = value
        elif REMOVED[key][1] not in (None, value):
            removed[key] = value
    if "data.window_mib" in values:
        current["stream.lane_window_mib"] /= values.get("data.lanes", 8)
    return current, removed
