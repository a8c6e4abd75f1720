"""A run in this process: what the training loop calls between one step and the next."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from tqdm import tqdm

from sgan_dist import checkpoint
from sgan_dist.config import Config
from sgan_dist.data.batch import SemiSupervisedBatch, Skip
from sgan_dist.data.index import DatasetIndex
from sgan_dist.data.loader import SemiSupervisedLoader
from sgan_dist.data.stream import open_storage
from sgan_dist.errors import NonFiniteLoss, StopRequested, UserError
from sgan_dist.evaluation.classifier import Classifier, save_classifier
from sgan_dist.evaluation.metrics import Counts, count_split
from sgan_dist.gan.networks import build, initialize
from sgan_dist.gan.pixels import save_grid
from sgan_dist.gan.steps import check_finite, rate, train_step
from sgan_dist.parallel.agreement import catch, run_on_all, run_on_main, synchronize
from sgan_dist.parallel.collectives import gather_objects
from sgan_dist.parallel.engine import Backend
from sgan_dist.parallel.random import GlobalRandom
from sgan_dist.parallel.readback import Readback
from sgan_dist.run import alarms, preflight, rundir, stopping
from sgan_dist.run.state import TrainState
from sgan_dist.run.tracking import Tracker, log_progress

log = logging.getLogger(__name__)
GRID = 64  # images in a sample grid

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
        shape, classes = index.image_hwc, len(index.class_names)
        self.sgan = run_on_all(lambda: build(config, shape, classes, backend))
        self.state = self._restore()
        self._batches = self._loader.batches(self.state.step)
        if self.state.step == 0:
            first = run_on_all(lambda: next(self._batches))
            initialize(self.sgan, first, config, backend)
            self._batches = itertools.chain([first], self._batches)
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
        self._stop_reason: str | None = None

    def due(self, interval: int) -> bool:
        """Returns whether something that is done every `interval` steps is due; 0: never."""
        return interval > 0 and self.state.step % interval == 0

    def next_batch(self) -> tuple[SemiSupervisedBatch, bool]:
        """Returns this rank's slice of the next global batch, and whether any rank should stop.

        Raises:
            UserError: on every rank, if one cannot read, or if too many images are damaged.
        """
        start = time.monotonic()
        batch, error = catch(lambda: next(self._batches))
        self._data_wait += time.monotonic() - start
        self._stop_reason = stopping.stop_requested()
        skips = batch.skips if batch is not None else ()
        stop, damage = synchronize(error, self._stop_reason is not None, bool(skips))
        if damage:
            self._count_skips(skips)
        assert batch is not None  # synchronize raised otherwise
        self._busy += time.monotonic() - start
        return batch, stop

    def train_step(self, batch: SemiSupervisedBatch) -> None:
        """Updates D, then G, then the averaged D.

        Raises:
            NonFiniteLoss: on every rank, for this step or the one before it, whose update was left
                out; the sample ids of its batch are written.
        """
        start = time.monotonic()
        with self._sample_ids_written(batch):
            metrics = train_step(self.sgan, batch, self.config, self._backend)
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
        self.state.add_metrics(metrics)

    @contextlib.contextmanager
    def _sample_ids_written(self, batch: SemiSupervisedBatch) -> Iterator[None]:
        """Writes which images a step had if its loss or gradient is not finite."""
        try:
            yield
        except NonFiniteLoss:
            ids = gather_objects((batch.labeled_ids.tolist(), batch.unlabeled_ids.tolist()))
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
        """Writes a grid of generated images, always from the same noise; returns their spread."""
        if self.sgan.generator is None:
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

        return run_on_main(write)

    def log(self, line: dict[str, Any]) -> None:
        """Adds alarms to a line of metrics, and sends it to metrics.jsonl, W&B and the terminal."""
        messages = alarms.check(line, self.config.train.log_every, self.state.alarms)
        if messages:
            line["alarm"] = "; ".join(messages)
        step, seconds = self.state.step, time.monotonic() - self._start_time
        run_on_all(lambda: self._tracker.log(step, line))
        if self._is_main:
            log_progress(step, self.config.train.steps, seconds, line)
            if messages:
                log.warning(f"ALARM at step {step}: {line['alarm']}")

    def save(self) -> None:
        """Copies the state of this step, and starts to write it as a checkpoint, if there is none.

        Raises:
            UserError: on every rank, if the checkpoint before could not be written.
        """
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
        """Waits until the last checkpoint is written; raises its error on every rank."""
        writing, self._writing = self._writing, None
        seconds = run_on_main(lambda: 0.0 if writing is None else writing.result())
        self.state.save_seconds = max(self.state.save_seconds, seconds)
        stopping.set_save_time(self.state.save_seconds)

    def stopped(self) -> StopRequested:
        """Saves a run that was asked to stop; returns what to raise."""
        self.save()
        self._finish_writing()
        run_on_all(self._tracker.close)
        self.close()
        reason = next(r for r in gather_objects(self._stop_reason) if r is not None)
        (by_hand,) = synchronize(None, stopping.stopped_by_hand())
        message = (
            f"stopped after {self.state.step} of {self.config.train.steps} steps by {reason}; the"
            " same command resumes the run"
        )
        log.info(message)
        # A collective after all that rank 0 has to do: a launcher may end it when another rank exits.
        run_on_main(stopping.remove_stop_file)
        return StopRequested(message, by_hand)

    def finish(self) -> dict[str, Any]:
        """Writes samples, classifier, summary.json, DONE and report.html; returns the summary."""
        from sgan_dist.evaluation.report import make_report  # loads matplotlib: not while training

        self.save()
        self._finish_writing()
        self.sample()
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
        run_on_main(stopping.remove_stop_file)  # it came too late
        return run_on_main(lambda: summary)

    def close(self) -> None:
        """Closes what is still open. Not a collective: another rank may have failed."""
        self._bar.close()
        self._loader.close()
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
        for skip in itertools.chain.from_iterable(gather_objects(skips)):
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
