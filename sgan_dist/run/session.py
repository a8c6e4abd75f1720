"""A run in this process: what the training loop calls between one step and the next."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from sgan_dist import checkpoint
from sgan_dist.config import Config
from sgan_dist.data.index import DatasetIndex
from sgan_dist.data.loader import Prefetcher, SemiSupervisedBatch, SemiSupervisedLoader
from sgan_dist.data.reader import Skip
from sgan_dist.data.stream import open_storage
from sgan_dist.errors import NonFiniteLoss, StopRequested, UserError
from sgan_dist.evaluation.classifier import Classifier, save_classifier
from sgan_dist.evaluation.metrics import Counts, count_split
from sgan_dist.gan.networks import build, initialize
from sgan_dist.gan.pixels import save_grid
from sgan_dist.gan.steps import check_finite, rate, train_step
from sgan_dist.parallel.agreement import (
    catch,
    reduce_objects,
    run_on_all,
    run_on_main,
    synchronize,
)
from sgan_dist.parallel.engine import Backend
from sgan_dist.parallel.random import GlobalRandom
from sgan_dist.parallel.readback import Readback
from sgan_dist.run import alarms, preflight, rundir, stopping
from sgan_dist.run.state import TrainState
from sgan_dist.run.tracking import Tracker, log_progress

log = logging.getLogger(__name__)
GRID = 64  # images in a sample grid
STOP, FAILED, DAMAGE = (
    "flags/stop",
    "flags/failed",
    "flags/damage",
)  # summed over ranks with the losses

T = TypeVar("T")
Unread = tuple[SemiSupervisedBatch, list[str], Readback]  # a step's metrics, not read yet


class Session:
    """Networks, data, state and tracking of one run, from its newest checkpoint or from step 0.

    All ranks call its methods in the same order: all but `close` are, or may be, collectives.
    """

    def __init__(self, config: Config, index: DatasetIndex, backend: Backend) -> None:
        self.config, self._index, self._backend = config, index, backend
        self._run, self._is_main = config.directory, backend.rank == 0
        self._loader = run_on_all(
            lambda: SemiSupervisedLoader(
                index, config, backend.rank, backend.world_size, pin=backend.device.type == "cuda"
            )
        )
        shape, histogram = index.image_hwc, index.labeled.label_histogram
        self.sgan = run_on_all(lambda: build(config, shape, histogram, backend))
        self.state = self._restore()
        self._batches = Prefetcher(self._loader, self.state.step, config.train.steps)
        if self.state.step == 0:
            first, error = self._batches.first()
            synchronize(error)
            assert first is not None  # there are steps
            initialize(self.sgan, first, config, backend)
        self.sgan.check_replicas(self.state.step)
        self._tracker = run_on_all(
            lambda: Tracker(self._run, config, self.state.step, active=self._is_main)
        )
        self._environment = rundir.environment(backend)
        self._restarts = run_on_main(
            lambda: rundir.record_start(self._run, self.state.step, self._environment)
        )
        stopping.set_save_time(self.state.save_seconds)
        self._bar = tqdm(
            total=config.train.steps,
            initial=self.state.step,
            dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} {bar} eta {remaining}",
            disable=not (self._is_main and sys.stderr.isatty()),
        )
        self._batch_images = sum(config.batches.values())
        self._start_time = time.monotonic() - self.state.seconds  # as if all starts were one
        self._busy = self._data_wait = 0.0  # seconds since the last means(); a wait is busy too
        self._saved_step = self.state.step
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[float] | None = None  # on rank 0
        self._unread: Unread | None = None
        self._error: UserError | None = None  # of rank 0, which alone writes files
        self._stop_reason = stopping.stop_requested()
        (self._stop,) = synchronize(self._batches.error(), self._stop_reason is not None)
        self._failed = False

    def due(self, interval: int) -> bool:
        """Returns whether something that is done every `interval` steps is due; 0: never."""
        return interval > 0 and self.state.step % interval == 0

    def next_batch(self) -> SemiSupervisedBatch | None:
        """Returns this rank's slice of the next global batch; None if the run is to stop.

        What one rank knows goes with the losses of its next step, and is read by all ranks a step
        later, before a batch that one of them does not have.

        Raises:
            UserError: on every rank, if one cannot read or write.
        """
        if self._failed:
            synchronize(self._batches.error() or self._error)
        if self._stop:
            return None
        start = time.monotonic()
        batch = self._batches.take()
        self._batches.error()  # waits for the batches after it
        self._data_wait += time.monotonic() - start
        self._busy += time.monotonic() - start
        return batch

    def train_step(self, batch: SemiSupervisedBatch) -> None:
        """Updates D, then G, then the averaged D.

        Raises:
            NonFiniteLoss: on every rank, for this step or the one before it, whose update was left
                out; the sample ids of its batch are written.
        """
        start = time.monotonic()
        self._stop_reason = self._stop_reason or stopping.stop_requested()
        failed = self._batches.error() is not None or self._error is not None
        flags = {STOP: self._stop_reason is not None, FAILED: failed, DAMAGE: bool(batch.skips)}
        with self._sample_ids_written(batch):
            metrics = train_step(self.sgan, batch, self.config, self._backend, flags)
        last, self._unread = self._unread, (batch, metrics.names, Readback(metrics.values))
        self._read(last)  # now that the device has the next step to work on
        self.state.step += 1
        self._bar.update()
        self._busy += time.monotonic() - start

    def settle(self) -> None:
        """Reads the metrics of the last step, before its results are logged, saved or evaluated.

        Raises as `train_step` does.
        """
        last, self._unread = self._unread, None
        self._read(last)

    def _read(self, unread: Unread | None) -> None:
        if unread is None:
            return
        batch, names, values = unread
        metrics = dict(zip(names, values.read(), strict=True))
        with self._sample_ids_written(batch):
            check_finite(metrics, batch.step)
        self._stop |= metrics.pop(STOP) > 0
        self._failed |= metrics.pop(FAILED) > 0
        if metrics.pop(DAMAGE):
            self._count_skips(batch.skips)
        self.state.add_metrics(metrics)

    @contextlib.contextmanager
    def _sample_ids_written(self, batch: SemiSupervisedBatch) -> Iterator[None]:
        """Writes which images a step had if its loss or gradient is not finite."""
        try:
            yield
        except NonFiniteLoss:
            own = batch.labeled_ids.tolist(), batch.unlabeled_ids.tolist()
            ids = reduce_objects(own, list)
            run_on_main(lambda: rundir.write_sample_ids(self._run, batch.step, ids))
            raise

    def means(self) -> dict[str, Any]:
        """Returns the mean metrics of the steps since the last call, learning rate and times."""
        self.settle()
        images = self.config.train.log_every * self._batch_images
        line: dict[str, Any] = dict(self.state.take_means())
        line["lr"] = self.config.optim.lr * rate(self.state.step - 1, self.config)
        if self.state.skipped:
            line["data/skipped"] = sum(self.state.skipped.values())
        line["time/restarts"] = self._restarts
        line["time/images_per_s"] = images / self._busy
        line["time/data_wait"] = self._data_wait / self._busy
        self._busy = self._data_wait = 0.0
        return line

    def errors(self, split: str) -> dict[str, float]:
        """Returns the error of the averaged D, and of D itself (`_raw`), on a labeled split."""
        self.settle()
        return self._errors(split, self._counts(split))

    def _counts(self, split: str, mistakes: bool = False) -> list[Counts]:
        """Those of the averaged D, and of D itself."""
        networks = self.sgan.average, self.sgan.discriminator.network
        classifiers = [Classifier.of(network, self.config, self._index) for network in networks]
        with open_storage(self.config) as storage:
            return count_split(classifiers, self._index, storage, split, mistakes)

    def _errors(self, split: str, counts: list[Counts]) -> dict[str, float]:
        errors = [c.metrics(self._index.class_names).error for c in counts]
        return dict(zip((f"{split}_error", f"{split}_error_raw"), errors, strict=True))

    @torch.no_grad()
    def sample(self) -> dict[str, float]:
        """Rank 0 writes a grid of generated images, always from the same noise.

        Returns their spread there, and nothing on the other ranks.
        """
        if self.sgan.generator is None or not self._is_main:
            return {}
        generator, backend = self.sgan.generator.network, self._backend
        rows = {"grid": range(GRID)}
        rng = GlobalRandom(self.config.seed, "grid", 0, rows, backend.device)
        path = self._run / "samples" / f"step-{self.state.step:08d}.png"

        def write() -> dict[str, float]:
            generator.eval()
            images = generator(generator.latent(rng).to(backend.dtype))  # type: ignore[operator]
            generator.train()
            save_grid(images, path)
            self._tracker.image(self.state.step, "samples", path)
            return {"samples/spread": float(images.float().std(0).mean())}

        return self._try(write) or {}

    def log(self, line: dict[str, Any]) -> None:
        """Rank 0 sends a line of metrics, with alarms, to metrics.jsonl, W&B and the terminal."""
        if not self._is_main:
            return
        messages = alarms.check(line, self.config.train.log_every, self.state.alarms)
        if messages:
            line["alarm"] = "; ".join(messages)
        step, seconds = self.state.step, time.monotonic() - self._start_time
        self._try(lambda: self._tracker.log(step, line))
        log_progress(step, self.config.train.steps, seconds, line)
        if messages:
            log.warning(f"ALARM at step {step}: {line['alarm']}")

    def _try(self, work: Callable[[], T]) -> T | None:
        """Returns what rank 0 does, or notes its error, which `next_batch` raises on every rank."""
        result, error = catch(work)
        self._error = self._error or error
        return result

    def save(self) -> None:
        """Copies the state of this step; rank 0 starts to write it, if that is not done yet."""
        if self._saved_step == self.state.step:
            return
        self.settle()
        self._finish_writing()
        start = time.monotonic()
        self.state.seconds = time.monotonic() - self._start_time
        state, step = self.sgan.state() | self.state.state_dict(), self.state.step
        identity = preflight.identity(self.config, self._index)
        meta = {"meaning": identity, "environment": self._environment}
        keep = self.config.checkpoint.keep
        if self._is_main:
            state = copy.deepcopy(state)  # on the device: the thread copies it to the host

            def write() -> float:
                checkpoint.save(self._run, step, state, meta, keep)
                return time.monotonic() - start

            self._writing = self._writer.submit(write)
        self._saved_step = self.state.step

    def _finish_writing(self) -> None:
        """Waits on rank 0 until the last checkpoint is written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self.state.save_seconds = max(self.state.save_seconds, self._try(writing.result) or 0.0)
            stopping.set_save_time(self.state.save_seconds)

    def stopped(self) -> StopRequested:
        """Saves a run that was asked to stop; returns what to raise."""
        self.save()
        self._finish_writing()
        synchronize(self._error)
        run_on_all(self._tracker.close)
        self.close()
        reason = reduce_objects(self._stop_reason, lambda reasons: next(filter(None, reasons)))
        (by_hand,) = synchronize(None, stopping.stopped_by_hand(self._run))
        message = (
            f"stopped after {self.state.step} of {self.config.train.steps} steps by {reason}; the"
            " same command resumes the run"
        )
        log.info(message)
        # A collective after all that rank 0 has to do: a launcher may end it when another rank exits.
        run_on_main(lambda: stopping.remove_stop_file(self._run))
        return StopRequested(message, by_hand)

    def finish(self) -> dict[str, Any]:
        """Writes samples, classifier, summary.json, DONE and report.html; returns the summary."""
        from sgan_dist.evaluation.report import make_report  # loads matplotlib: not while training

        self.save()
        self.sample()
        self._finish_writing()
        synchronize(self._error)
        classifier = Classifier.of(self.sgan.average, self.config, self._index)
        run_on_main(lambda: save_classifier(self._run / "classifier.safetensors", classifier))
        test = self._counts("test", mistakes=True)
        run_on_main(lambda: self._tracker.predictions(test[0], self._index.class_names))
        trained_on = "semi-supervised GAN" if self.config.uses_generator else "without a generator"
        if self.config.train.supervised_only:
            trained_on = "labeled images alone"
        summary = {
            "trained_on": trained_on,
            **self._errors("test", test),
            **self.errors("validation"),
            "step": self.state.step,
            "images_seen": self.state.step * self._batch_images,
            "skipped_images": sum(self.state.skipped.values()),
            "wall_seconds": time.monotonic() - self._start_time,
            "restarts": self._restarts,
            "labels": self._index.split("labeled").samples,
            "world_size": self._backend.world_size,
            "seed": self.config.seed,
            "label_seed": self._index.label_seed,
            "weights_sha256": checkpoint.weights_sha256(self.sgan.networks()),
            "data_fingerprint": self._index.fingerprint,
            "versions": rundir.versions(),
        }
        self._tracker.close(summary)
        self.close()
        run_on_main(lambda: rundir.mark_done(self._run, summary))
        run_on_main(lambda: make_report(self._run))
        run_on_main(lambda: stopping.remove_stop_file(self._run))  # it came too late
        return run_on_main(lambda: summary)

    def close(self) -> None:
        """Closes what is still open. Not a collective: another rank may have failed."""
        self._bar.close()
        self._batches.close()
        self._writer.shutdown()  # waits for a checkpoint that is being written
        self._tracker.close(failed=True)  # `stopped` and `finish` have closed it already

    def _restore(self) -> TrainState:
        """Loads the newest undamaged checkpoint, chosen by rank 0."""
        path, damaged = run_on_main(lambda: checkpoint.latest(self._run))
        for message in damaged:
            log.info(message)
        if path is None:
            return TrainState()
        tensors = run_on_main(lambda: checkpoint.read_state(path))  # the others get it from rank 0
        meta = run_on_main(lambda: checkpoint.read_meta(path))
        try:
            self.sgan.load(tensors)
            state = TrainState.from_state_dict(meta["step"], tensors)
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"{path} does not fit the networks, or the program, whose code has changed since"
                f" ({error}): go back to that code, or start again with another --run_dir"
            ) from error
        log.info(f"resuming after step {state.step}")
        before, now = meta["environment"], rundir.environment(self._backend)
        for name in sorted(before.keys() & now.keys()):
            if before[name] != now[name]:
                log.info(f"{name} was {before[name]} and is now {now[name]}: last bits may differ")
        return state

    def _count_skips(self, skips: tuple[Skip, ...]) -> None:
        """Counts the damaged records that any rank has read, each once.

        Raises:
            UserError: on every rank, if their samples are more than `data.max_skips`.
        """
        skipped, last = self.state.skipped, ""
        for skip in reduce_objects(skips, lambda ranks: list(itertools.chain.from_iterable(ranks))):
            name = f"{skip.shard}, record {skip.record}"
            if name not in skipped:
                skipped[name] = skip.samples
                last = f"{name}: {skip.why}"
                log.info(f"skipped {last} (damaged when it was indexed)")
        samples, limit = sum(skipped.values()), self.config.data.max_skips
        if last and samples > limit:
            raise UserError(
                f"{samples} training images are damaged and data.max_skips is {limit}; the last is"
                f" {last}: repair the data, or give a larger data.max_skips"
            )
