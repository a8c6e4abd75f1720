"""fit(config): one run, from its config to a trained classifier, and the one visible loop."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sgan_dist import alarms, checkpoint, launcher, preemption, rundir
from sgan_dist.backend import open_backend
from sgan_dist.config import Config, check, meaning, parse, supervised
from sgan_dist.data.index import DatasetIndex
from sgan_dist.data.loader import SemiSupervisedBatch, SemiSupervisedLoader
from sgan_dist.data.reader import Skip
from sgan_dist.data.stream import open_storage
from sgan_dist.distributed import (
    agree,
    attempt,
    gather_objects,
    is_rank_zero,
    on_rank_zero,
    together,
)
from sgan_dist.errors import NonFiniteLoss, Outage, UserError
from sgan_dist.evaluate import evaluate, examine, save_grid
from sgan_dist.export import save_classifier
from sgan_dist.networks import Networks, build, initialize
from sgan_dist.noise import Draw, Rows
from sgan_dist.plan import check_world, coverage, dataset, describe, must_prepare
from sgan_dist.players import Backend
from sgan_dist.report import make_report
from sgan_dist.step import discriminator_step, generator_step, rate
from sgan_dist.tracking import Meters, Progress, Tracker, say
from sgan_dist.watchdog import Watchdog

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
GRID = 64  # images in a sample grid


def main(argv: Sequence[str]) -> int:
    """launch/train.py: 0 when done or stopped by hand, 2 for an error that the user can mend,
    128 + signal if stopped, 75 where the same command is to be tried again.
    """
    try:
        launcher.adopt_slurm(os.environ)
        argv = launcher.without_local_rank(argv, os.environ)
        config, dry_run = parse(argv, DEFAULT_CONFIG)
        code = fit(check(config), dry_run)
        if dry_run and is_rank_zero():
            preemption.tell("done")
        return code
    except Outage as error:
        if is_rank_zero():
            say(f"error: {error}")
            preemption.tell("try again")
        return preemption.TRY_AGAIN
    except UserError as error:
        if is_rank_zero():
            say(f"error: {error}")
            run = rundir.run_directory(argv, DEFAULT_CONFIG)
            if run is not None and "--dry_run" not in argv:
                rundir.mark_failed(run, str(error))
            preemption.tell(f"failed: {error}")
        return 2


def fit(config: Config, dry_run: bool = False) -> int:
    """Trains the run in `config.directory`, or goes on with it: the same call resumes it.

    Returns the exit code: 0 when the run is done, else that of the request to stop.

    Raises:
        UserError: on every rank alike, and before long work where it can be known then.
    """
    precision = launcher.precision(config.train.precision, os.environ)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, precision=precision)
    )
    backend = open_backend(config)
    if dry_run and must_prepare(config):
        if backend.rank == 0:
            say(f"{config.data.root} is not there yet: a run first prepares {config.data.source}")
        return 0
    index = on_rank_zero(lambda: dataset(config))
    check_world(config, index, backend.world_size)
    described = describe(config, index, backend)
    if backend.rank == 0:
        say(described)
    if dry_run:
        if backend.rank == 0:
            say(coverage(config, index, backend.world_size))
        _refuse_other_run(config, index)
        build(config, index.image_shape, len(index.class_names), backend)
        return 0
    preemption.watch(config.directory)
    summary = _run(config, index, backend)
    (by_hand,) = agree(None, preemption.stopped_by_hand())
    if backend.rank == 0:
        if summary is not None:
            say(rundir.results(config.directory, summary))
        preemption.tell("done" if summary is not None else "stopped" if by_hand else "preempted")
    on_rank_zero(preemption.forget_stop)
    backend.close()
    return 0 if summary is not None else preemption.exit_code(by_hand)


def _run(config: Config, index: DatasetIndex, backend: Backend) -> dict[str, Any] | None:
    """The summary of the run, its supervised baseline included; None when told to stop."""
    run = config.directory
    on_rank_zero(lambda: _refuse_other_run(config, index))
    done = on_rank_zero(lambda: rundir.finished(config))
    if done is not None:
        if backend.rank == 0:
            say(
                f"{run} is done: {done['step']} steps. To start anew remove it (rm -r {run}) or give"
                " another --run_dir; to go on, give a larger --train.steps"
            )
        return done
    on_rank_zero(lambda: rundir.claim(config))
    summary = _train(config, index, backend)
    if summary is None:
        return None
    if config.train.baseline_steps:
        if backend.rank == 0:
            say("\nthe same discriminator on the labeled images alone, for comparison:")
        baseline = _run(supervised(config), index, backend)
        if baseline is None:
            return None
        summary["supervised_test_error"] = baseline["test_error"]
    on_rank_zero(lambda: rundir.mark_done(run, summary))
    on_rank_zero(lambda: make_report(run))
    return summary


def _train(config: Config, index: DatasetIndex, backend: Backend) -> dict[str, Any] | None:
    """The loop. `step` counts the updates made, and everything is a function of it."""
    run, train, zero = config.directory, config.train, backend.rank == 0
    loader = together(
        lambda: SemiSupervisedLoader(
            index, config.data, config.seed, backend.rank, backend.world_size
        )
    )
    networks = together(lambda: build(config, index.image_shape, len(index.class_names), backend))
    restored = _restore(networks, config, index, backend)
    step, meters = restored["step"], Meters(restored["meters"])
    batches = loader.batches(step)
    if step == 0:
        first = together(lambda: next(batches))
        initialize(networks, first, config.seed, backend)
        batches = itertools.chain([first], batches)
    tracker = together(lambda: Tracker(run, config, step, active=zero))
    here = rundir.environment(backend)
    restarts = on_rank_zero(lambda: rundir.note_start(run, step, here))
    preemption.reckon_with(restored["save_seconds"])
    progress = Progress(step, train.steps, active=zero)
    batch_images = config.data.labeled_batch + config.data.unlabeled_batch
    began, busy, waited, saved = time.monotonic(), 0.0, 0.0, step

    def report(line: dict[str, Any]) -> None:
        found = alarms.check(line, train.log_every, restored["alarms"])
        if found:
            line["alarm"] = "; ".join(found)
        together(lambda: tracker.log(step, line))
        progress.show(step, line)
        if zero and found:
            say(f"ALARM at step {step}: {line['alarm']}")

    def save() -> None:
        clock = time.monotonic()
        extra = {"meters": meters.state, "seconds": seconds()}
        extra |= {name: restored[name] for name in ("alarms", "skipped", "save_seconds")}
        state = networks.state() | extra
        about = _about(config, index) | {"environment": here}
        on_rank_zero(lambda: checkpoint.save(run, step, state, about, config.checkpoint.keep))
        restored["save_seconds"] = max(restored["save_seconds"], time.monotonic() - clock)
        preemption.reckon_with(restored["save_seconds"])

    def sample() -> dict[str, float]:
        return on_rank_zero(lambda: _sample(networks, step, config, backend, tracker))

    def seconds() -> float:
        return restored["seconds"] + time.monotonic() - began  # type: ignore[no-any-return]

    with Watchdog(train.timeout) as watchdog:
        while step < train.steps:
            clock = time.monotonic()
            batch, problem = attempt(lambda: next(batches))
            waited += time.monotonic() - clock
            met = batch.skips if batch is not None else ()
            reason = preemption.stop_requested()
            stop, damage = agree(problem, reason is not None, bool(met))
            if damage:
                _count_skips(met, restored["skipped"], config, zero)
            if stop:
                break
            assert batch is not None  # agree raised otherwise
            try:
                metrics = discriminator_step(networks, batch, config, backend)
                if networks.generator is not None:
                    metrics |= generator_step(networks, batch, config, backend)
            except NonFiniteLoss:
                _keep_sample_ids(run, batch)
                raise
            step += 1
            networks.update_average(step * batch_images, batch_images, config.ema)
            meters.add(metrics)
            progress.step()
            busy += time.monotonic() - clock

            if train.replica_check_every and step % train.replica_check_every == 0:
                networks.check_replicas(step)
            line: dict[str, Any] = {}
            if step % train.log_every == 0:
                line |= meters.take() | {"lr": config.optim.lr * rate(step - 1, config)}
                if restored["skipped"]:
                    line["data/skipped"] = sum(restored["skipped"].values())
                line["time/restarts"] = restarts
                line["time/images_per_s"] = train.log_every * batch_images / busy
                line["time/data_wait"] = waited / busy
                busy = waited = 0.0
            if train.evaluate_every and step % train.evaluate_every == 0:
                line |= _errors(networks, config, index, "validation", backend)
            if train.sample_every and step % train.sample_every == 0:
                line |= sample()
            if line:
                report(line)
            if step % config.checkpoint.every == 0:
                save()
                saved = step
            watchdog.step_done(step)

    progress.close()
    loader.close()
    if step != saved:
        save()
    if step < train.steps:
        together(tracker.close)  # a launcher ends all ranks when the first one is gone
        told = next(found for found in gather_objects(reason) if found is not None)
        if zero:
            say(f"stopped after {step} of {train.steps} steps by {told}; the same command goes on")
        return None
    sample()
    on_rank_zero(lambda: _keep_classifier(networks, config, index, tracker))
    summary = {
        "trained_on": _kind(config),
        **_errors(networks, config, index, "test", backend),
        **_errors(networks, config, index, "validation", backend),
        "step": step,
        "images_seen": step * batch_images,
        "skipped_images": sum(restored["skipped"].values()),
        "wall_seconds": seconds(),
        "restarts": restarts,
        "labels": index.split("labeled").samples,
        "world_size": backend.world_size,
        "seed": config.seed,
        "label_seed": index.label_seed,
        "weights_sha256": checkpoint.weights_sha256(networks.plain()),
        "data_fingerprint": index.fingerprint,
        "versions": rundir.versions(),
    }
    tracker.close(summary)
    return summary


def _about(config: Config, index: DatasetIndex) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that resumes it."""
    return {"meaning": meaning(config) | {"data_fingerprint": index.fingerprint}}


def _refuse_other_run(config: Config, index: DatasetIndex) -> None:
    path, _ = checkpoint.latest(config.directory)
    if path is not None:
        saved = checkpoint.read_meta(path)["meaning"]
        checkpoint.refuse_other_meaning(path, saved, _about(config, index)["meaning"])


def _restore(
    networks: Networks, config: Config, index: DatasetIndex, backend: Backend
) -> dict[str, Any]:
    """Loads the newest whole checkpoint, chosen by rank 0; returns what is kept beside networks."""
    path, passed_over = on_rank_zero(lambda: checkpoint.latest(config.directory))
    if backend.rank == 0:
        for line in passed_over:
            say(line)
    new = {"meters": {}, "alarms": {}, "skipped": {}, "seconds": 0.0, "save_seconds": 0.0}
    if path is None:
        return {"step": 0, **new}
    state = together(lambda: checkpoint.read_state(path))
    try:
        networks.load(state)
        kept = {name: state[name] for name in new}
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"{path} does not fit the networks, or this program, whose code was changed since"
            f" ({error}): go back to that code, or start anew with another --run_dir"
        ) from error
    skipped, limit = sum(kept["skipped"].values()), config.data.max_skips
    if skipped > limit:
        raise UserError(
            f"{skipped} training images were damaged so far and data.max_skips is {limit}: mend the"
            " data, or give a larger data.max_skips"
        )
    meta = on_rank_zero(lambda: checkpoint.read_meta(path))
    if backend.rank == 0:
        say(f"resuming after step {meta['step']}")
        for name, now in rundir.environment(backend).items():
            if meta["environment"][name] != now:
                before = meta["environment"][name]
                say(f"{name} was {before} and is now {now}: last bits may differ")
    return {"step": meta["step"], **kept}


def _errors(
    networks: Networks, config: Config, index: DatasetIndex, split: str, backend: Backend
) -> dict[str, float]:
    """Error of the averaged D, and of D itself, on a labeled split."""
    found = {}
    with open_storage(config.data) as storage:  # one: what it has checked it need not check again
        for name, network in (("", networks.average), ("_raw", networks.discriminator.network)):
            found[f"{split}_error{name}"] = evaluate(
                network, index, storage, split, config.loss.form, backend.device
            ).error
    return found


@torch.no_grad()
def _sample(
    networks: Networks, step: int, config: Config, backend: Backend, tracker: Tracker
) -> dict[str, float]:
    """A grid of images from the same noise each time, and how much they differ."""
    if networks.generator is None:
        return {}
    generator = networks.generator.network
    draw = Draw(config.seed, "grid", 0, {"grid": Rows.of(GRID, 0, 1)}, backend.device)
    generator.eval()
    images = generator(generator.latent(draw).to(backend.dtype))  # type: ignore[operator]
    generator.train()
    path = config.directory / "samples" / f"step-{step:08d}.png"
    save_grid(images, path)
    tracker.image(step, "samples", path)
    return {"samples/spread": float(images.float().std(0).mean())}


def _count_skips(met: Sequence[Skip], skipped: dict[str, int], config: Config, zero: bool) -> None:
    """Adds the damaged records that any rank has met to `skipped`, each named once and for all.

    Raises UserError on every rank where their samples are more than `data.max_skips`.
    """
    last = ""
    for skip in itertools.chain.from_iterable(gather_objects(tuple(met))):
        name = f"{skip.shard}, record {skip.record}"
        if name not in skipped:
            skipped[name] = skip.samples
            last = f"{name}: {skip.why}"
            if zero:
                say(f"skipped {last} (damaged when it was indexed)")
    total, limit = sum(skipped.values()), config.data.max_skips
    if last and total > limit:
        raise UserError(
            f"{total} training images are damaged and data.max_skips is {limit}; the last is {last}:"
            " mend the data, or give a larger data.max_skips"
        )


def _keep_sample_ids(run: Path, batch: SemiSupervisedBatch) -> None:
    """Leaves the sample ids of a batch that broke, rank by rank, in the run directory."""
    ids = gather_objects((batch.labeled_ids.tolist(), batch.unlabeled_ids.tolist()))
    on_rank_zero(lambda: rundir.write_sample_ids(run, batch.step, ids))


def _keep_classifier(
    networks: Networks, config: Config, index: DatasetIndex, tracker: Tracker
) -> None:
    """The averaged D as a file, and for the dashboard where it is wrong on the test split."""
    save_classifier(config.directory / "classifier.safetensors", networks.average, config, index)
    with open_storage(config.data) as storage:
        found = examine(networks.average, index, storage, "test", config.loss.form)
    tracker.findings(found, index.class_names)


def _kind(config: Config) -> str:
    """What D learned from, for tables."""
    if config.train.supervised_only:
        return "labeled images alone"
    return "without a generator" if config.model.generator is None else "semi-supervised GAN"
