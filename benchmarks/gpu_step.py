"""Measures training steps on a CUDA GPU: `python benchmarks/gpu_step.py CONFIG [OPTIONS]`.

Trains 90 steps of a recipe, in one process. Prints the median time of a step, and of one step the
number of kernels and copies, the time that they take on the GPU, and the host synchronizations with
the lines of this package that make them.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sgan_dist.config import load_config
from sgan_dist.data.loader import SemiSupervisedBatch
from sgan_dist.run import trainer
from sgan_dist.run.session import Session

STEPS, SYNC_STEP, PROFILED_STEP, FIRST_TIMED = 90, 20, 30, 50
seconds: list[float] = []
syncs: Counter[str] = Counter()
figures: dict[str, Any] = {}


class MeasuredSession(Session):
    """A session that measures some of its steps."""

    def train_step(self, batch: SemiSupervisedBatch) -> None:
        if self.state.step == SYNC_STEP:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = _count_sync
                torch.cuda.set_sync_debug_mode("warn")
                super().train_step(batch)
                torch.cuda.set_sync_debug_mode("default")
        elif self.state.step == PROFILED_STEP:
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                super().train_step(batch)
                torch.cuda.synchronize()
            cuda = torch.autograd.DeviceType.CUDA
            on_gpu = [event for event in profiler.events() or () if event.device_type == cuda]
            copies = sum(event.name.startswith("Mem") for event in on_gpu)
            figures["kernels"], figures["copies"] = len(on_gpu) - copies, copies
            figures["gpu_ms"] = sum(event.device_time for event in on_gpu) / 1e3
        else:
            torch.cuda.synchronize()
            start = time.perf_counter()
            super().train_step(batch)
            torch.cuda.synchronize()
            if self.state.step > FIRST_TIMED:
                seconds.append(time.perf_counter() - start)


def _count_sync(message: Warning | str, *_: Any) -> None:
    if "synchronizing CUDA operation" not in str(message):  # the mode also warns of itself
        return
    frames = [f for f in traceback.extract_stack() if "/sgan_dist/" in f.filename]
    syncs[" < ".join(f"{f.filename.rsplit('/', 1)[1]}:{f.lineno}" for f in frames[::-1][:3])] += 1


def main() -> None:
    config, *options = sys.argv[1:]
    trainer.Session = MeasuredSession  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as run:
        fixed = f"--run_dir={run}/run", f"--train.steps={STEPS}", "--train.evaluate_every=0"
        trainer.train(load_config(config, *options, *fixed, "--train.sample_every=0"))
    figures["step_ms"] = 1e3 * statistics.median(seconds)
    figures["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    where = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "syncs": syncs}
    print(json.dumps({"config": config, **figures, **where}, indent=1))


if __name__ == "__main__":
    main()
