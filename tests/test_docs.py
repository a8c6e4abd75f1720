"""README and docs name only what exists: links, anchors, files, settings, commands, recipes, tests."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from sgan_dist.cli import main
from sgan_dist.config import SETTINGS, find_config, parse
from tests.ranks import REPOSITORY

PAGES = [
    *REPOSITORY.glob("*.md"),
    *REPOSITORY.glob("docs/**/*.md"),
    *REPOSITORY.glob(".github/*.md"),
]
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # that names what was, too
SECTIONS = {key.partition(".")[0] for key in SETTINGS if "." in key}
ROOMS = ("benchmarks", "configs", "docs", "examples", "launch", "sgan_dist", "tests")


def each_page(pages: list[Path]) -> pytest.MarkDecorator:
    names = [str(page.relative_to(REPOSITORY)) for page in pages]
    return pytest.mark.parametrize("page", pages, ids=names)


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in words}


def commands(page: Path) -> Iterator[list[str]]:
    """The command lines of a page, as words: blocks of code, and spans that start as commands do."""
    text = page.read_text()
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    for line in [*lines, *spans]:
        with contextlib.suppress(ValueError):  # a shell's line, or output with a single quote
            words = shlex.split(line, comments=True)
            if words and "..." not in words:
                yield words


def sgan_dist_commands(page: Path) -> Iterator[list[str]]:
    """The command lines of `sgan-dist`, by any of its names: sub-command and arguments."""
    for words in commands(page):
        for name, start in (("sgan-dist", []), ("sgan_dist", []), ("launch/train.py", ["train"])):
            if name in words[:-1] or words[-1] == "launch/train.py" == name:
                yield start + words[words.index(name) + 1 :]


@each_page(PAGES)
def test_relative_links_and_anchors_exist(page: Path) -> None:
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target
        for test in re.findall(r"`(test_\w+)`", text):
            assert f"def {test}(" in linked.read_text(), f"{target} has no {test}"


@each_page(CURRENT)
def test_files_exist(page: Path) -> None:
    paths = re.findall(rf"(?<![\w/.-])(?:{'|'.join(ROOMS)})/[\w./-]*\w", page.read_text())
    missing = {path for path in paths if not any(REPOSITORY.glob(f"{path}*"))}
    assert not missing


@each_page(CURRENT)
def test_settings_exist(page: Path) -> None:
    names = "|".join(SECTIONS)
    mentioned = set(re.findall(rf"(?:`|--|`config\.)((?:{names})\.[a-z_]+)", page.read_text()))
    files = {name for name in mentioned if re.search(r"\.(py|md|yaml|sbatch)$", name)}
    assert mentioned - files <= SETTINGS.keys()


@each_page(CURRENT)
def test_commands_and_their_options_exist(page: Path) -> None:
    helps = {"": help_of()}
    for command, *arguments in sgan_dist_commands(page):
        if command.startswith("--"):
            assert command in helps[""]
            continue
        assert re.search(rf"^    {command}\b", helps[""], re.M), command
        if command in ("train", "plan"):
            assert arguments == ["--help"] or parse(arguments, "digits")
            continue
        helps.setdefault(command, help_of(command))
        for option in (word for word in arguments if word.startswith("--")):
            assert option.partition("=")[0] in helps[command], option


def help_of(*command: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        main([*command, "--help"])
    return output.getvalue()


@each_page(CURRENT)
def test_recipes_exist(page: Path) -> None:
    for words in commands(page):
        options = {"--config", "slurm/train.sbatch", "slurm/sweep.sbatch"}
        for option, name in itertools.pairwise(words):
            if option in options:
                assert find_config(name).is_file(), name


@each_page([*PAGES, *REPOSITORY.glob(".github/workflows/*.yml")])
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:`|^|run: )make ([\w-]+)", page.read_text(), re.M))
    assert named <= targets


@each_page([REPOSITORY / "README.md", REPOSITORY / "docs/results.md"])
def test_each_row_of_results_has_its_command(page: Path) -> None:
    rows = [line for line in page.read_text().splitlines() if re.match(r"\|.*\d %", line)]
    assert rows
    for row in rows:
        assert re.search(r"`(python|accelerate|OMP_NUM_THREADS=1 accelerate) [^`]+` \|$", row), row
