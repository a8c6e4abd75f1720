"""Locations: which are remote, and how names are joined to them."""

from __future__ import annotations

import pytest

from sgan_dist.data.remote.urls import is_remote, join
from sgan_dist.errors import UserError


@pytest.mark.parametrize(
    ("location", "answer"),
    [
        ("http://host/a", True),
        ("https://host/a", True),
        ("s3://bucket/a", True),
        ("gs://bucket/a", True),
        ("pipe:cat a", True),
        ("data/digits", False),
        ("/data/digits", False),
        ("./a:b", False),
        ("http:/a", False),
    ],
)
def test_is_remote(location: str, answer: bool) -> None:
    assert is_remote(location) is answer


@pytest.mark.parametrize("location", ["ftp://host/a", "file:///a", "hdfs://a", "HTTP://host/a"])
def test_other_schemes_are_refused(location: str) -> None:
    with pytest.raises(UserError, match=f"(?i)cannot read {location}: give the path .*http://"):
        is_remote(location)


@pytest.mark.parametrize(
    ("root", "name", "joined"),
    [
        ("data", "unlabeled/0.tar", "data/unlabeled/0.tar"),
        ("data", "/other/0.tar", "/other/0.tar"),
        ("data", "s3://b/0.tar", "s3://b/0.tar"),
        ("http://h/d", "pipe:cat x", "pipe:cat x"),
        ("http://h/d", "/other/0.tar", "/other/0.tar"),
        ("http://h/d/", "a/0.tar", "http://h/d/a/0.tar"),
        ("http://h", "0.tar", "http://h/0.tar"),
        ("https://h/d?sig=a%2Fb%3D", "a/0.tar", "https://h/d/a/0.tar?sig=a%2Fb%3D"),
        ("http://h/d", "a b#1?.tar", "http://h/d/a%20b%231%3F.tar"),
        ("s3://b/d/", "a b.tar", "s3://b/d/a b.tar"),
        ("gs://b", "0.tar", "gs://b/0.tar"),
        ("pipe:ssh host cat /d", "a/0.tar", "pipe:ssh host cat /d/a/0.tar"),
        ("pipe:cat /d/", "a b;c.tar", "pipe:cat /d/'a b;c.tar'"),
    ],
)
def test_join(root: str, name: str, joined: str) -> None:
    assert join(root, name) == joined
