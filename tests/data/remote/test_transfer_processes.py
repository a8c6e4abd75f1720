"""Downloads in other processes: a full disk, an exit during a download, and how they are started."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from sgan_dist.data.remote.transfer import fetch
from tests.data.remote.downloads import BODY, PATIENT, Place, fetch_in_child, is_clean, run_code
from tests.servers import Handler, stall

pytestmark = pytest.mark.timeout(120)

FULL_DISK = """
import resource, sys
from pathlib import Path
from sgan_dist.config import RemoteConfig
from sgan_dist.data.remote.transfer import fetch
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    fetch(sys.argv[1], Path(sys.argv[2]), RemoteConfig())
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.process
@pytest.mark.parametrize("piped", [False, True], ids=["download", "pipe"])
def test_a_full_disk_is_not_a_network_error(place: Place, target: Path, piped: bool) -> None:
    server, location, path = place
    if piped:
        location = f"pipe:cat {server.folder}/data/a.tar"
    output = run_code(FULL_DISK, location, target)
    assert output.startswith(f"UserError cannot write {target.parent} (File too large): make room")
    assert server.requests[path] == (0 if piped else 1)
    assert is_clean(target)


STALLED_AT_EXIT = """
import sys, threading
from pathlib import Path
from sgan_dist.config import RemoteConfig
from sgan_dist.data.remote.transfer import fetch
patient = RemoteConfig(read_timeout=3600.0)
fetch(sys.argv[1] + sys.argv[3], Path(sys.argv[2]), patient)
arguments = (sys.argv[1], Path(sys.argv[2] + "x"), patient)
threading.Thread(target=fetch, args=arguments, daemon=True).start()
while not Path(sys.argv[4]).exists():
    threading.Event().wait(0.01)
print("end")
"""


@pytest.mark.process
def test_a_stalled_download_does_not_delay_an_exit(
    place: Place, target: Path, tmp_path: Path
) -> None:
    server, location, path = place
    started = tmp_path / "started"

    def stalls(handler: Handler, body: bytes) -> None:
        started.touch()
        stall(handler, body)

    def serves(handler: Handler, body: bytes) -> None:
        handler.begin(len(body))
        handler.wfile.write(body)

    server.faults[path] = [serves, stalls]
    query = "?first" if location.startswith("http") else ""  # only http has queries
    assert run_code(STALLED_AT_EXIT, location, target, query, started) == "end\n"


FORKSERVER = """
import multiprocessing, sys
from pathlib import Path
from tests.data.remote.downloads import fetch_in_child
if __name__ == '__main__':
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['fsspec.implementations.http'])
    child = context.Process(target=fetch_in_child, args=(sys.argv[1], Path(sys.argv[2])))
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""


@pytest.mark.process
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_by_start_method(place: Place, target: Path, method: str) -> None:
    _, location, _ = place
    child_target = target.with_name("child.tar")
    fetch(location, target, PATIENT)  # this process has fsspec's thread and instances
    if method == "forkserver":
        run_code(FORKSERVER, location, child_target)
    else:
        context = multiprocessing.get_context("spawn")
        child = context.Process(target=fetch_in_child, args=(location, child_target))
        child.start()
        child.join()
        assert child.exitcode == 0
    assert child_target.read_bytes() == BODY
