"""train(config): one run, from its config to a trained classifier, by one visible loop."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch

from sgan_dist.config import Config
from sgan_dist.data.loader import check_shares
from sgan_dist.errors import OutOfMemory
from sgan_dist.gan.gate import check_networks
from sgan_dist.parallel.agreement import run_on_main
from sgan_dist.parallel.backends import open_backend
from sgan_dist.run import preflight, rundir, stopping
from sgan_dist.run.session import Session
from sgan_dist.run.watchdog import Watchdog

log = logging.getLogger(__name__)


def train(config: Config) -> dict[str, Any]:
    """Trains the run in `config.directory`, or resumes it: the same call continues a stopped run.

    Under a launcher every rank calls it with the same config.

    Returns:
        The content of summary.json, on every rank. A run that is done is not trained again.

    Raises:
        UserError: on every rank, and before any long work where that is possible.
        StopRequested: on every rank, after a checkpoint was saved.
        OutOfMemory: on this rank alone.
    """
    backend = open_backend(config, rundir.resumed_precision(config))
    config = preflight.with_precision(config, backend.precision)
    index = run_on_main(lambda: preflight.dataset(config))
    check_shares(index, config, backend.world_size)
    log.info(preflight.describe(config, index, backend))
    config = preflight.refuse_other_run(config, index)
    summary = run_on_main(lambda: rundir.finished(config))
    if summary is not None:
        run_on_main(lambda: stopping.remove_stop_file(config.directory))
        log.info(
            f"{config.directory} is done: {summary['step']} steps. To train again, remove it"
            f" (rm -r {config.directory}) or give another --run_dir; to extend it, give a larger"
            " --train.steps"
        )
        return summary
    check_networks(config, index.image_hwc, len(index.class_names), backend)
    with contextlib.ExitStack() as stack:
        run_on_main(lambda: stack.enter_context(rundir.claim(config)))
        stack.enter_context(stopping.watching_files(config.directory))
        try:
            session = stack.enter_context(contextlib.closing(Session(config, index, backend)))
            if _loop(session):
                raise session.stopped()
            return session.finish()
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"rank {backend.rank} has used up the memory of its GPU"
                f" ({str(error).splitlines()[0]}): raise batch.accumulation, lower the batches, or"
                " start more processes; the same command then continues from the last checkpoint"
            ) from error


def _loop(session: Session) -> bool:
    """Trains up to the last step. Returns True if a rank should stop before it."""
    config, state, due = session.config, session.state, session.due
    with Watchdog(config.machine.step_timeout) as watchdog:
        while state.step < config.train.steps:
            batch = session.next_batch()
            if batch is None:
                return True
            session.train_step(batch)  # D, then G, then the averaged D; counts state.step
            if due(config.machine.replica_check_every):
                session.sgan.check_replicas(state.step)
            line: dict[str, Any] = {}
            if due(config.train.log_every):
                line |= session.means()
            if due(config.train.evaluate_every):
                line |= session.errors("validation")
            if due(config.train.sample_every):
                line |= session.sample()
            if line:
                session.log(line)
            if due(config.checkpoint.every):
                session.save()
            watchdog.step_done(state.step)
    return False
