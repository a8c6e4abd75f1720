"""Patterns of shards: braces, wildcards, lists, and errors that name the pattern."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgan_dist.data.prepare.patterns import expand
from sgan_dist.errors import UserError


@pytest.mark.parametrize(
    "patterns",
    [
        ["web-{000..002}.tar"],
        ["web-*.tar"],
        ["./web-00[0-2].tar"],
        ["web-000.tar::web-{001,002}.tar"],
        ["web-000.tar", "../tars/web-00{1..2}.tar"],
        ["TARS/web-??[012].tar"],
    ],
)
def test_local_patterns(tars: Path, monkeypatch: pytest.MonkeyPatch, patterns: list[str]) -> None:
    monkeypatch.chdir(tars)
    patterns = [pattern.replace("TARS", str(tars)) for pattern in patterns]
    paths = [str(tars / f"web-{number:03d}.tar") for number in range(3)]
    assert list(expand(patterns, "unlabeled")) == paths


def test_order_brackets_and_urls(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tars)
    paths = [str(tars / f"web-{number:03d}.tar") for number in range(3)]
    assert expand(["web-002.tar", "web-000.tar"], "test") == (paths[2], paths[0])
    (tars / "odd[1].tar").write_bytes(b"")
    assert expand(["odd[1].tar"], "test") == (str(tars / "odd[1].tar"),)
    urls = tuple(f"http://a/0{n}.tar" for n in range(3))
    assert expand(["http://a/{00..02}.tar"], "test") == urls


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["nothing-*.tar"], "no test shard .*nothing"),
        (["web-{000..003}.tar"], "web-003.tar"),
        (["web-000.tar", "web-00*.tar"], "web-000.tar twice"),
        (["web-000.tar", "./web-000.tar"], "twice"),
        (["web-{000.tar"], "web-{000.tar"),
        (["http://a/*.tar"], "brace range"),
        (["ftp://a/b.tar"], "ftp://a/b.tar"),
        (["web-000.tar::"], "empty"),
        ([], "at least one"),
        (["."], "no test shard"),
    ],
)
def test_refused_patterns(
    tars: Path, monkeypatch: pytest.MonkeyPatch, patterns: list[str], message: str
) -> None:
    monkeypatch.chdir(tars)
    with pytest.raises(UserError, match=message):
        expand(patterns, "test")
