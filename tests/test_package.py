"""The package as people get it: wheel, sdist, editable install and clone, each in an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY, environment

pytestmark = pytest.mark.process


BUILD = "import setuptools.build_meta as b; print(b.build_{kind}({out!r}))"
KINDS = ("wheel", "sdist", "editable", "clone")


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's files as they are now, without what git ignores."""
    folder = tmp_path_factory.mktemp("clone") / "sgan_dist"
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=REPOSITORY, capture_output=True, check=True).stdout
    for name in names.decode().rstrip("\0").split("\0"):
        source, target = REPOSITORY / name, folder / name
        if source.is_symlink() or source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return folder


def built(kind: str, clone: Path) -> Path:
    """The wheel or sdist of the clone, made once."""
    out = clone.parent / kind
    if not out.exists():
        code = BUILD.format(kind=kind, out=str(out))
        subprocess.run([sys.executable, "-c", code], cwd=clone, check=True, capture_output=True)
    (archive,) = out.iterdir()
    return archive


def python_path(kind: str, clone: Path) -> str:
    """PYTHONPATH that makes `import sgan_dist` take this kind of installation."""
    if kind == "editable":
        return ""  # that is what these tests run in
    if kind == "clone":
        return str(clone)
    target = clone.parent / f"installed-{kind}"
    if not target.exists():
        options = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(target)]
        command = [sys.executable, "-m", "pip", "install", *options, str(built(kind, clone))]
        subprocess.run(command, check=True, capture_output=True)
    return str(target)


def command(folder: Path, path: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output of `python -m sgan_dist ...` in a folder."""
    process = subprocess.run(
        [sys.executable, "-m", "sgan_dist", *arguments],
        cwd=folder,
        env=environment(PYTHONPATH=path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return process.returncode, process.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_recipes_are_found_by_name_and_by_path(kind: str, clone: Path, tmp_path: Path) -> None:
    path = python_path(kind, clone)
    where = "import sgan_dist; print(sgan_dist.__file__)"
    process = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environment(PYTHONPATH=path),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert process.stdout.startswith(path or str(REPOSITORY))
    for config in ("mnist", "configs/mnist.yaml"):
        code, output = command(tmp_path, path, "plan", f"--config={config}")
        assert code == 0 and "a run first prepares mnist" in output, output
    code, output = command(tmp_path, path, "plan", "--config=nothing")
    assert code == 2 and "nothing" in output


@pytest.mark.parametrize("kind", ("wheel", "sdist"))
def test_an_archive_holds_the_recipes_scripts_and_type_marker(kind: str, clone: Path) -> None:
    package = Path(python_path(kind, clone)) / "sgan_dist"
    installed = {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file()}
    for folder in ("configs", "launch"):
        names = {
            f"{folder}/{p.relative_to(REPOSITORY / folder).as_posix()}"
            for p in (REPOSITORY / folder).rglob("*")
            if p.is_file() and "__pycache__" not in p.parts
        }
        assert names and names <= installed
    assert "py.typed" in installed
    assert not any(name.startswith("tests") for name in installed)


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment_trains_and_evaluates(clone: Path, tmp_path: Path) -> None:
    home, folder = tmp_path / "venv", tmp_path / "empty"
    folder.mkdir()
    venv.create(home, with_pip=True)
    archive, constraints = built("wheel", clone), REPOSITORY / "constraints.txt"
    subprocess.run(
        [home / "bin/pip", "install", "--quiet", "-c", constraints, f"{archive}[digits]"],
        check=True,
    )
    variables = environment(PATH=f"{home / 'bin'}:{os.environ['PATH']}", VIRTUAL_ENV=str(home))
    variables.pop("PYTHONPATH", None)
    small = (
        "--config=digits", "--train.steps=4", "--train.log_every=2",
        '--model.discriminator_args={"width": 4}', '--model.generator_args={"width": 4}',
    )  # fmt: skip

    def run(*words: str) -> str:
        process = subprocess.run(
            words, cwd=folder, env=variables, capture_output=True, text=True, check=False
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    run("accelerate", "launch", "-m", "sgan_dist", "train", *small, "--run_dir=runs/a")
    run("sgan-dist", "train", *small, "--run_dir=runs/b")
    hashes = {
        json.loads((folder / f"runs/{name}/summary.json").read_text())["weights_sha256"]
        for name in "ab"
    }
    assert len(hashes) == 1
    assert "error" in run("sgan-dist", "evaluate", "runs/a")
    assert (folder / run("sgan-dist", "report", "runs/a").strip()).is_file()
    assert "test error" in run("sgan-dist", "compare", "runs/a")
    assert "unlabeled" in run("sgan-dist", "prepare", "--source=digits", "--out=data/other")
    assert (folder / run("sgan-dist", "slurm", "--out=batch").splitlines()[0]).is_file()
    assert "train" in run("python", "-m", "sgan_dist", "--help")
