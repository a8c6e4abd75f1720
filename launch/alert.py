"""Says in the log, and by a W&B alert, why a run has ended: launch/alert.py RUN_DIR REASON"""

import sys
from pathlib import Path

from sgan_dist.rundir import in_use
from sgan_dist.tracking import alert, say

if __name__ == "__main__":
    run, reason = Path(sys.argv[1]), sys.argv[2]
    say(f"ALERT: {run}: {reason}")
    if (run / "DONE").exists() or in_use(run):
        say("(not sent to W&B: the run itself is done, or another job trains it)")
    elif not alert(run, f"{run.name} has stopped", reason):
        say("(not sent to W&B, where this run is offline or off)")
