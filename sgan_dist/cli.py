"""The `sgan-dist` command: its sub-commands, and the one place where errors become exit codes.

0: done, or stopped by a STOP file. 2: an error that the user can fix. 75: a transient error, or
stopped without a signal: the same command resumes. 128 + n: stopped by signal n, after a checkpoint.
130: interrupted. 1, with a traceback: a bug.

Imports nothing heavy: signal handlers are installed before torch is loaded, and --help is fast.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgan_dist import __version__
from sgan_dist.errors import OutOfMemory, StopRequested, TransientError, UserError
from sgan_dist.parallel import launcher
from sgan_dist.run import console, stopping

if TYPE_CHECKING:
    from sgan_dist.config import Config
    from sgan_dist.data.index import DatasetIndex

DEFAULT_CONFIG = "digits"
SOURCES = (
    "digits, mnist, fashion-mnist, or KIND:PLACE, such as folder:photos; kinds are folder, csv, jsonl,"
    " parquet, arrow, hub, npz, idx, cifar, svhn, stl10, tars"
)
INTERRUPTED = {
    "prepare": "interrupted; the same command continues, and no partial dataset was left",
    "index": "interrupted; the same command continues where this one stopped",
}

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, by default that of this process, and returns its exit code."""
    argv = launcher.without_local_rank(sys.argv[1:] if argv is None else argv, os.environ)
    if argv[:1] == ["train"]:
        stopping.catch_signals()  # before all else: a signal during the imports must not be lost
    console.outlive_readers()
    console.set_up_logging()
    try:
        launcher.check_variables(os.environ)
    except UserError as error:  # not by _log_error: there may be no rank 0
        log.error(f"error: {error}")
        return 2
    try:
        launcher.adopt_slurm(os.environ)
        launcher.choose_interface(os.environ)
        launcher.use_all_cores(os.environ)
        if argv[:1] == ["train"]:
            _train(argv[1:])
        elif argv[:1] == ["plan"]:
            _plan(argv[1:])
        else:
            arguments = vars(_parser().parse_args(argv))
            arguments.pop("command")(**arguments)
        return 0
    except StopRequested as stop:
        return stopping.exit_code(stop.by_hand)
    except OutOfMemory as error:
        log.error(f"error: {error}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)  # the other ranks may wait for this one: the launcher ends them
    except UserError as error:
        _log_error(f"error: {error}")
        return stopping.TRY_AGAIN if isinstance(error, TransientError) else 2
    except KeyboardInterrupt:
        _log_error(INTERRUPTED.get(argv[0], "interrupted"))
        return 130


def _train(argv: Sequence[str]) -> None:
    """Trains, and writes how it ended for a batch script and into the run directory."""
    try:
        config = _config(argv, "train")
        from sgan_dist.run import rundir
        from sgan_dist.run.trainer import train

        summary = train(config)
    except (StopRequested, UserError) as error:
        if launcher.is_main_process(os.environ) or isinstance(error, OutOfMemory):
            _write_outcome(argv, error)
        raise
    if launcher.is_main_process(os.environ):
        print(rundir.results(config.directory, summary), flush=True)
        stopping.write_outcome("done")


def _write_outcome(argv: Sequence[str], error: StopRequested | UserError) -> None:
    if isinstance(error, StopRequested):
        stopping.write_outcome("stopped" if error.by_hand else "preempted")
    elif isinstance(error, TransientError):
        stopping.write_outcome("try again")
    else:
        stopping.write_outcome(f"failed: {error}")
        from sgan_dist.run import rundir

        run = rundir.run_directory(argv, DEFAULT_CONFIG)
        if run is not None:
            rundir.mark_failed(run, str(error), by_a_rank=isinstance(error, OutOfMemory))


def _plan(argv: Sequence[str]) -> None:
    config = _config(argv, "plan")
    from sgan_dist.run.preflight import plan

    text = plan(config)
    if launcher.is_main_process(os.environ):
        print(text)


def _config(argv: Sequence[str], command: str) -> Config:
    from sgan_dist.config import parse

    epilog = ""
    if {"-h", "--help"} & set(argv):
        from sgan_dist.gan import models

        epilog = models.describe()
    return parse(argv, DEFAULT_CONFIG, prog=f"sgan-dist {command}", epilog=epilog)


def _prepare(
    source: str | None,
    out: Path | None,
    inspect: Path | None,
    labels_per_class: int | None,
    label_fraction: float | None,
    label_list: Path | None,
    label_seed: int,
    image_column: str | None,
    label_column: str | None,
    fold: int | None,
    **request: Any,
) -> None:
    if inspect is not None:
        from sgan_dist.evaluation.inspect import inspect as describe

        print(describe(inspect))
        return
    if source is None or out is None:
        raise UserError("give --source and --out, or --inspect")
    from sgan_dist.data.prepare.shards import prepare
    from sgan_dist.data.prepare.sources.source import Columns
    from sgan_dist.data.prepare.splits import Labels

    labels = Labels(labels_per_class, label_fraction, label_list, label_seed)
    columns = Columns(image_column, label_column, fold)
    _print_index(prepare(source, out, labels, columns=columns, **request), out)


def _index(out: Path, tries: int, read_timeout: float, **request: Any) -> None:
    from sgan_dist.config import RemoteConfig
    from sgan_dist.data.prepare.foreign import index_shards

    remote = RemoteConfig(tries=tries, read_timeout=read_timeout)
    _print_index(index_shards(out=out, remote=remote, **request), out)


def _print_index(index: DatasetIndex, out: Path) -> None:
    from sgan_dist.data.index import SPLITS

    for name in SPLITS:
        split = index.split(name)
        print(f"{name:>10}: {split.samples} samples in {len(split.shards)} shard(s), {split.order}")
    print(f"{out}: {index.source}, fingerprint {index.fingerprint[:12]}")


def _evaluate(run_dir: Path, split: str, data: str | None, as_json: bool) -> None:
    from sgan_dist.evaluation.metrics import evaluate_run

    metrics = evaluate_run(run_dir, split, data)
    if not launcher.is_main_process(os.environ):
        return
    if as_json:
        print(json.dumps(metrics.to_json()))
    else:
        print(f"{run_dir}, {split} split\n{metrics.table()}")


def _report(run_dir: Path, data: str | None) -> None:
    from sgan_dist.evaluation.report import make_report

    print(make_report(run_dir, data))


def _compare(runs: list[Path], by: list[str], out: Path | None) -> None:
    from sgan_dist.evaluation.compare import compare

    print(compare(runs, by, out))


def _alert(run_dir: Path, reason: str) -> None:
    from sgan_dist.run.rundir import in_use
    from sgan_dist.run.tracking import alert

    log.warning(f"ALERT: {run_dir}: {reason}")
    if (run_dir / "DONE").exists() or in_use(run_dir):
        log.info("not sent to W&B: the run is done, or another job trains it")
    elif not alert(run_dir, f"{run_dir.name} has stopped", reason):
        log.info("not sent to W&B: it is offline or disabled for this run")


def _path(text: str) -> Path:
    """A path of the command line; no shell expands the ~ of --out=~/x."""
    return Path(text).expanduser()


def _size(text: str) -> tuple[int, int]:
    """Height and width, of `64` or `48x64`."""
    height, _, width = text.partition("x")
    size = int(height), int(width or height)
    if min(size) < 1:
        raise ValueError
    return size


def _slurm(out: Path) -> None:
    """Copies the batch scripts, whose texts name each other by their path from the project's folder."""
    templates = Path(__file__).parent / "launch"
    if len(str(out).split()) != 1:
        raise UserError(f"--out is {str(out)!r}: give a folder without spaces, for batch scripts")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("train.sbatch", "sweep.sbatch", "sweep.yaml"):
            (out / name).write_text((templates / name).read_text().replace("launch/", f"{out}/"))
            print(out / name)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): give another --out") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sgan-dist", description="Distributed semi-supervised GAN training."
    )
    parser.add_argument("--version", action="version", version=f"sgan_dist {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=run)
        return sub

    command("train", _train, "train a run, or resume it; alone or under a launcher")
    command("plan", _plan, "print what a train command would do; nothing is trained or written")
    _add_prepare(command("prepare", _prepare, "prepare a dataset"))
    _add_index(command("index", _index, "index existing WebDataset tars, for training on them"))
    evaluate = command("evaluate", _evaluate, "evaluate the classifier of a finished run")
    report = command("report", _report, "write RUN_DIR/report.html, also of an unfinished run")
    for one_run in (evaluate, report):
        one_run.add_argument("run_dir", type=_path)
        one_run.add_argument(
            "--data",
            type=os.path.expanduser,
            help="the prepared dataset (default: that of the run)",
        )
    evaluate.add_argument("--split", default="test", choices=["labeled", "validation", "test"])
    evaluate.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    compare = command("compare", _compare, "compare finished runs: a table, a CSV file, a plot")
    add = compare.add_argument
    add("runs", nargs="+", type=_path, help="run directories, or folders of them")
    add("--by", nargs="+", default=[], metavar="KEY", help="settings that make a row each")
    add("--out", type=_path, help="folder for the files (default: that of the runs)")
    alert = command("alert", _alert, "log why a run has stopped, and send it as a W&B alert")
    alert.add_argument("run_dir", type=_path)
    alert.add_argument("reason")
    slurm = command("slurm", _slurm, "write the SLURM batch scripts to a folder")
    slurm.add_argument("--out", type=_path, required=True)
    return parser


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.epilog = (
        "Labels: without an option, all there are if some images have none, else 10 of each class."
    )
    add("--source", help=SOURCES)
    add("--out", type=_path, help="the folder to create")
    add("--inspect", type=_path, metavar="DIR", help="show what a dataset holds, and end")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labels_per_class", type=int, help="labeled images per class (see below)")
    labels.add_argument("--label_fraction", type=float, help="or: this part of the labels, up to 1")
    labels.add_argument(
        "--label_list", type=_path, metavar="FILE", help="or: NAME or NAME,LABEL lines"
    )
    add("--label_seed", type=int, default=0, help="selects the labeled images (default: 0)")
    add("--validation", type=int, help="images held out (default: a part of the labeled ones)")
    add("--test", metavar="SOURCE", help="test images, if the source has none (default: a fifth)")
    add("--unlabeled", metavar="SOURCE", help="further images to train on, without their labels")
    _add_pixels(parser)
    add("--image_column", help="of tables: where the images are; of tars: their extension")
    add("--label_column", help="of tables: where the labels are; of tars: cls, json:KEY, folder")
    add("--fold", type=int, help="of STL-10: the 1,000 images that may be labeled, 0 to 9")
    add("--jobs", type=int, help="processes (default: one per core)")
    add("--layout", choices=("packed", "per-sample"), help="default: packed up to 64 pixels")
    add("--order", choices=("auto", "full", "windowed"), default="auto", help="of unlabeled")
    add("--samples_per_shard", type=int, help="default: 8192, fewer for large images")


def _add_index(parser: argparse.ArgumentParser) -> None:
    add, shards = parser.add_argument, "PATTERN"
    add("unlabeled", nargs="+", metavar=shards, help="shards by brace ranges, * or :: between")
    add("--labeled", nargs="+", required=True, metavar=shards, help="shards of labeled records")
    for split in ("validation", "test"):
        held = parser.add_mutually_exclusive_group(required=True)
        held.add_argument(f"--{split}", nargs="+", default=(), metavar=shards, help="held out")
        part = "or: this part of the labeled records, by a hash of their keys"
        held.add_argument(f"--{split}_fraction", type=float, default=0.0, metavar="PART", help=part)
    add("--out", type=_path, required=True, help="the folder to create")
    _add_pixels(parser)
    add("--image", help="the extension of images, where records have several")
    add("--label", default="cls", help="where labels are: cls (default), json:KEY, folder, ...")
    add("--class_names", type=_path, metavar="FILE", help="one name a line, class 0 first")
    add("--order", choices=("auto", "full", "windowed"), default="auto", help="of unlabeled")
    add("--jobs", type=int, help="processes (default: one per core)")
    add("--renew", action="store_true", help="take new URLs of the same shards")
    add("--tries", type=int, default=6, help="attempts per remote shard (default: 6)")
    add("--read_timeout", type=float, default=30.0, help="seconds without a byte (default: 30)")


def _add_pixels(parser: argparse.ArgumentParser) -> None:
    add, size = parser.add_argument, "the size of all images (default: as it is)"
    add("--image_size", type=_size, metavar="N|HxW", help=size)
    add("--resize", choices=("shorter", "exact"), default="shorter", help="how they get it")
    add("--gray", action="store_true", help="with --image_size: one channel instead of three")


def _log_error(line: str) -> None:
    """Logs a line on rank 0 alone: every rank has the same error."""
    if launcher.is_main_process(os.environ):
        log.error(line)
