"""Sanity alarms: training that goes on while a part of it is dead.

Each looks at the lines that go to metrics.jsonl, and says in a sentence what is wrong.
"""

from __future__ import annotations

DETECTED = 0.99  # fraction of fakes
DETECTED_STEPS = 500  # for so long
ALIKE = 0.002  # mean standard deviation of a pixel over generated images, of a range of 2

GRADIENT = "d/squared_logit_gradient/"
CONSISTENCY = GRADIENT + "consistency"
CONFIDENT = 0.5  # fraction of targets above loss.threshold, from which a batch without one is odd


def check(line: dict[str, float], steps: int, state: dict[str, float]) -> list[str]:
    """The alarms that a metrics line over `steps` steps raises; `state` is kept between lines."""
    dead = {name for name, value in line.items() if name.startswith(GRADIENT) and value == 0}
    if line.get("d/confident", 1) < CONFIDENT:
        dead -= {CONSISTENCY}  # the batch it was looked at in may have had no target, early on
    found = [
        f"the {name.removeprefix(GRADIENT)} loss has no gradient: it trains nothing"
        for name in sorted(dead)
    ]
    if line.get("g/gradient_norm") == 0:
        found.append("the generator has no gradient: it is not trained")
    if "d/fakes_detected" in line:
        detected = state.get("detected_steps", 0) + steps
        state["detected_steps"] = detected if line["d/fakes_detected"] >= DETECTED else 0
        if state["detected_steps"] >= DETECTED_STEPS:
            found.append(
                f"D has told {DETECTED:.0%} of the fakes from real images for"
                f" {state['detected_steps']:.0f} steps: the generator lags far behind"
            )
    if line.get("samples/spread", 1) < ALIKE:
        found.append("the generator's images are all alike")
    return found
