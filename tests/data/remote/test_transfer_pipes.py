"""Downloads from commands: pipe:COMMAND."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sgan_dist.config import RemoteConfig
from sgan_dist.data.remote.transfer import Stopped, fetch, read
from sgan_dist.data.remote.urls import join
from sgan_dist.errors import UserError
from tests.data.remote.downloads import BODY, HASTY, PATIENT, SHA256, is_clean

pytestmark = pytest.mark.timeout(120)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.process
def test_a_command_that_succeeds(tmp_path: Path, target: Path) -> None:
    (tmp_path / "a b.tar").write_bytes(BODY)
    # more on standard error than a pipe holds
    noise = "head -c 300000 /dev/zero >&2"
    location = join(f"pipe:{noise}; cat {tmp_path}", "a b.tar")
    fetch(location, target, PATIENT, len(BODY), SHA256)
    assert target.read_bytes() == BODY
    assert read(location, PATIENT) == BODY


@pytest.mark.process
def test_a_command_that_fails(tmp_path: Path, target: Path) -> None:
    (tmp_path / "a.tar").write_bytes(BODY)
    count = f"echo x >> {tmp_path}/count"
    fails = f"pipe:{count}; cat {tmp_path}/a.tar; echo first >&2; echo ' no luck ' >&2; exit 3"
    with pytest.raises(UserError, match=r"\(exit status 3: no luck, 3 tries\)"):
        fetch(fails, target, PATIENT, len(BODY), SHA256)  # though all bytes arrived
    assert (tmp_path / "count").read_text() == "x\n" * 3
    assert is_clean(target)
    once = f"pipe:{count}; test $(wc -l < {tmp_path}/count) -gt 4 && cat {tmp_path}/a.tar"
    fetch(once, target, PATIENT, len(BODY), SHA256)
    assert (tmp_path / "count").read_text() == "x\n" * 5
    assert target.read_bytes() == BODY
    with pytest.raises(UserError, match="has 150000 bytes, the index says 300000"):
        fetch(f"pipe:head -c 150000 {tmp_path}/a.tar", target, PATIENT, len(BODY))


@pytest.mark.process
@pytest.mark.parametrize("leader", ["wait", "exec >&-; wait", "exit"], ids=str.split)
def test_a_command_that_stalls(tmp_path: Path, target: Path, leader: str) -> None:
    # a child of the shell holds the pipe; or the shell closed it and runs on; or it has ended
    holds = "" if leader != "exec >&-; wait" else " >/dev/null"
    stalled = f"pipe:echo some; sleep 3600{holds} & echo $! >> {tmp_path}/pids; {leader}"
    with pytest.raises(UserError, match=r"\(no (byte for|end) 1 seconds.*, 3 tries\)"):
        fetch(stalled, target, HASTY)
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3
    for pid in pids:
        while is_running(pid):  # the whole process group was killed
            time.sleep(0.01)
    assert is_clean(target)


@pytest.mark.process
def test_stopping_a_silent_command(tmp_path: Path, target: Path) -> None:
    stop = threading.Event()
    location = f"pipe:echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; sleep 3600"
    with ThreadPoolExecutor(1) as pool:
        patient = RemoteConfig(read_timeout=3600.0)
        download = pool.submit(fetch, location, target, patient, stop=stop)
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        stop.set()
        with pytest.raises(Stopped):
            download.result()
    assert not is_running(int((tmp_path / "pid").read_text()))
    assert is_clean(target)


@pytest.mark.process
def test_stopping_a_command_that_writes(target: Path) -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(Stopped):
        fetch("pipe:while :; do echo x; done", target, PATIENT, stop=stop)


@pytest.mark.process
def test_a_slow_command_is_not_a_stalled_one(target: Path) -> None:
    slowly = "pipe:for i in 1 2 3 4 5 6 7 8; do printf x; sleep 0.3; done"  # 2.4 s in all
    fetch(slowly, target, RemoteConfig(tries=1, read_timeout=2.0), size=8)
    assert target.read_bytes() == b"x" * 8
