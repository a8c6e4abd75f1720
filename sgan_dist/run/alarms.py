"""Alarms: training that continues although a part of it is dead.

Each looks at the lines of metrics.jsonl, and says in one sentence what is wrong.
"""

from __future__ import annotations

DETECTED = 0.99  # fraction of the generated images that D detects
DETECTED_STEPS = 500  # steps in a row with at least that fraction
COLLAPSED_SPREAD = 0.002  # a pixel's mean standard deviation over samples; its range is [-1, 1]

GRADIENT = "d/squared_logit_gradient/"
CONSISTENCY = GRADIENT + "consistency"
CONFIDENT = 0.5  # fraction of targets above loss.threshold; below it a batch may well have none


def check(line: dict[str, float], steps: int, state: dict[str, float]) -> list[str]:
    """Returns the alarms of a line of metrics over `steps` steps.

    `state` is what the alarms remember from line to line; it is updated.
    """
    dead = {name for name, value in line.items() if name.startswith(GRADIENT) and value == 0}
    if line.get("d/confident", 1) < CONFIDENT:
        dead -= {CONSISTENCY}  # early on the one batch that was looked at may have had no target
    alarms = [
        f"the {name.removeprefix(GRADIENT)} loss has no gradient: it trains nothing"
        for name in sorted(dead)
    ]
    if line.get("g/gradient_norm") == 0:
        alarms.append("the generator has no gradient: it is not trained")
    if "d/fakes_detected" in line:
        detected = state.get("detected_steps", 0) + steps
        state["detected_steps"] = detected if line["d/fakes_detected"] >= DETECTED else 0
        if state["detected_steps"] >= DETECTED_STEPS:
            alarms.append(
                f"D has detected {DETECTED:.0%} of the generated images for"
                f" {state['detected_steps']:.0f} steps: the generator lags far behind"
            )
    if line.get("samples/spread", 1) < COLLAPSED_SPREAD:
        alarms.append(
            "the generator has collapsed (mode collapse): its samples are nearly identical"
        )
    return alarms
