"""A real SLURM cluster on this machine: munged, slurmctld and one slurmd per node, without systemd.

Every slurmd has mount and UTS namespaces of its own: its jobs see a host named n1, n2, ... with an
address of its own, and each process of a node, reparented or not, is found by its namespace.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from tests.ranks import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "setpriv")
INSTALL = "apt-get install slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge"
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
SERVICES = ("slurmctld", "munged")
FREEZER = Path("/sys/fs/cgroup/freezer")
JOBS = 1000  # a cluster's job ids: from the first one, at most that many

# Sets the node's name and /etc/hosts, which nothing outside its namespaces sees, and runs slurmd.
NODE = 'hostname "$1"; mount --bind "$2" /etc/hosts; exec "$3" -D -f "$4" -N "$1"'

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.sock,cred_expire=5
CredType=cred/munge
FirstJobId={first_job}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/log/slurmctld
SlurmdLogFile={directory}/log/%n
ProctrackType={proctrack}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
LaunchParameters=enable_nss_slurm
ReturnToService=2
SlurmdTimeout=10
MessageTimeout=5
KillWait=5
InactiveLimit=0
CompleteWait=0
MinJobAge=7200
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=DEFAULT Nodes=n[1-{count}] MaxTime=INFINITE State=UP
PartitionName=test Default=YES PriorityTier=1 PreemptMode=OFF
PartitionName=requeue PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=cancel PriorityTier=1 PreemptMode=CANCEL GraceTime=60
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
"""


def unavailable() -> str | None:
    """Why no cluster can be started on this machine, and the fix; None if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"SLURM's tests need {', '.join(absent)}: {INSTALL}"
    if os.geteuid() != 0:
        return "SLURM's tests need root: slurmd starts jobs, and its nodes are mount namespaces"
    done = subprocess.run(
        ["unshare", "--mount", "--uts", "true"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return f"SLURM's tests need mount and UTS namespaces: {done.stderr.strip()}"
    return None


class Cluster:
    """A cluster of nodes n1, n2, ..., each with 4 CPUs and two GPUs, copies of /dev/null.

    Its files are in `directory`, whose path must be short (unix sockets), and which any user may enter
    (munged checks it). Jobs run in `directory`/jobs unless `cwd` is given.
    """

    def __init__(self, directory: Path, nodes: int = 2) -> None:
        self.directory = directory
        self.jobs = directory / "jobs"
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        # Other ids than those of any cluster on this machine: cgroups are named by node and job.
        self.first_job = JOBS * random.randrange(1, 60_000)
        self.cgroups = os.access(FREEZER, os.W_OK)  # whether SLURM tracks steps by cgroups
        self.addresses = {
            node: f"127.{self.first_job // JOBS % 250 + 1}.0.{i}"
            for i, node in enumerate(self.nodes, 1)
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._namespaces: dict[
            str, int
        ] = {}  # open files, so that the kernel reuses no inode number

    def start(self) -> None:
        """Starts the daemons and waits until every node is idle."""
        for name in ("state", "log", "jobs"):
            (self.directory / name).mkdir()
        self._configure()
        try:
            self._start_daemon(
                "munged",
                [
                    "munged",
                    "--foreground",
                    f"--key-file={self.directory}/munge.key",
                    f"--socket={self.directory}/munge.sock",
                    f"--pid-file={self.directory}/munged.pid",
                    f"--seed-file={self.directory}/munged.seed",
                ],
            )
            self._wait("munged's socket", (self.directory / "munge.sock").exists)
            self._start_daemon("slurmctld", ["slurmctld", "-D"])
            for node in self.nodes:
                self.start_node(node)
            for node in self.nodes:
                self.wait_for_node(node, "idle")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Cancels the jobs, ends the daemons, and leaves no process and no cgroup behind."""
        if "slurmctld" in self._daemons:
            with contextlib.suppress(AssertionError):  # processes still running are killed below
                self._wait("cancelled jobs", self._cancel_all, timeout=30, pause=0.2)
        for name in [*self.nodes, *SERVICES]:
            self._stop_daemon(name)
        for node in list(self._namespaces):
            self.kill_node(node)
        for process in self._clients():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._remove_cgroups()

    def environment(self) -> dict[str, str]:
        """The environment of a command that talks to this cluster, from outside of any job."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return {**clean, "PATH": PATH, "SLURM_CONF": f"{self.directory}/slurm.conf"}

    def run(
        self,
        *command: str,
        timeout: float = 60,
        script: str = "",
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> str:
        """The output of a SLURM command, `script` its input, with more environment variables."""
        done = subprocess.run(
            command,
            input=script,
            env={**self.environment(), **(variables or {})},
            cwd=cwd or self.jobs,
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise AssertionError(f"{command} exit {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def submit(
        self,
        *args: str,
        script: str = "",
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> int:
        """`sbatch` with these arguments, or with the text of a script; returns the job's id."""
        answer = self.run(
            "sbatch", "--parsable", *args, script=script, cwd=cwd, variables=variables
        )
        return int(answer.strip().split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ...; `ARRAY_TASK` is a job too."""
        text = self.run("scontrol", "show", "job", "-o", str(number))
        parts = re.split(r"(?:^|\s)([A-Z][\w/:]*)=", text.strip())
        return dict(zip(parts[1::2], map(str.strip, parts[2::2]), strict=True))

    def log(self, number: int | str) -> str:
        """What a job has printed so far."""
        path = Path(self.job(number).get("StdOut", ""))
        return path.read_text(errors="replace") if path.is_file() else ""

    def wait_for(self, number: int | str, *states: str, timeout: float = 60) -> dict[str, str]:
        """The job once it is in one of the states; AssertionError with its log's tail if not."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in states:
            if job["JobState"] in ENDED or time.monotonic() > deadline:
                self._fail(job, f"never got to {' or '.join(states)}")
            time.sleep(0.1)
        return job

    def wait_for_log(self, number: int | str, text: str, timeout: float = 60) -> str:
        """The job's log once it holds `text`."""
        deadline = time.monotonic() + timeout
        while text not in (log := self.log(number)):
            job = self.job(number)
            if job["JobState"] in ENDED and text not in self.log(number):
                self._fail(job, f"never printed {text!r}")
            if time.monotonic() > deadline:
                self._fail(job, f"did not print {text!r} within {timeout} s")
            time.sleep(0.1)
        return log

    def cancel(self, number: int) -> None:
        self.run("scancel", str(number))

    def node_state(self, name: str) -> str:
        """The state in sinfo: idle, mixed, allocated, down, ...; with a `*` if it does not answer."""
        return self.run("sinfo", "-h", "-N", "-p", "test", "-n", name, "-o", "%T").strip()

    def wait_for_node(self, name: str, *states: str, timeout: float = 60) -> None:
        """Waits until the node is in one of the states."""
        self._wait(
            f"{name} {' or '.join(states)}", lambda: self.node_state(name) in states, timeout
        )

    def node_processes(self, name: str) -> list[psutil.Process]:
        """Every process of a node: its slurmd, the slurmstepds, and those of the jobs."""
        if name not in self._namespaces:
            return []
        namespace = os.fstat(self._namespaces[name]).st_ino
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{process.pid}/ns/uts").stat().st_ino == namespace:
                    processes.append(process)
        return processes

    def kill_node(self, name: str) -> None:
        """Kills all processes of a node, as if its power had failed."""
        deadline = time.monotonic() + 30
        while members := self.node_processes(name):
            for process in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if daemon := self._daemons.get(name):
                daemon.poll()  # reaps it
            if time.monotonic() > deadline:
                raise AssertionError(f"{name}: cannot kill {members}")
            time.sleep(0.02)
        if daemon := self._daemons.pop(name, None):
            daemon.wait()
        if name in self._namespaces:
            os.close(self._namespaces.pop(name))

    def start_node(self, name: str) -> None:
        """Boots a node; it is ready once `wait_for_node(name, "idle")` returns."""
        self.kill_node(name)
        (self.directory / f"spool.{name}").mkdir(exist_ok=True)
        hosts, slurmd = str(self.directory / "hosts"), shutil.which("slurmd", path=PATH)
        configuration = f"{self.directory}/slurm.conf"
        program = ["sh", "-ec", NODE, "sh", name, hosts, str(slurmd), configuration]
        process = self._start_daemon(name, ["unshare", "--mount", "--uts", *program])
        outside = Path("/proc/self/ns/uts").stat().st_ino
        namespace = Path(f"/proc/{process.pid}/ns/uts")
        self._wait(f"{name}'s namespace", lambda: namespace.stat().st_ino != outside)
        self._namespaces[name] = os.open(namespace, os.O_RDONLY)

    def _configure(self) -> None:
        directory = self.directory
        gpus = [directory / "gpu0", directory / "gpu1"]
        for gpu in gpus:
            os.mknod(gpu, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (directory / "gres.conf").write_text(f"Name=gpu File={directory}/gpu[0-1]\n")
        (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        hosts = [f"{address} {name}\n" for name, address in self.addresses.items()]
        (directory / "hosts").write_text(Path("/etc/hosts").read_text() + "\n" + "".join(hosts))
        key = directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        lines = [
            f"NodeName={name} NodeHostname={name} NodeAddr={address} Port={free_port()} "
            "CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
            for name, address in self.addresses.items()
        ]
        (directory / "slurm.conf").write_text(
            CONFIGURATION.format(
                directory=directory,
                host=os.uname().nodename.split(".")[0],
                port=free_port(),
                first_job=self.first_job,
                proctrack="proctrack/cgroup" if self.cgroups else "proctrack/linuxproc",
                nodes="\n".join(lines),
                count=len(self.nodes),
            )
        )

    def _start_daemon(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        """Starts a daemon, which ends with this process, even if that is killed."""
        with open(self.directory / "log" / f"{name}.out", "ab") as out:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "--", *command],
                env=self.environment(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._daemons[name] = process
        return process

    def _stop_daemon(self, name: str) -> None:
        process = self._daemons.pop(name, None)
        if process is None:
            return
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _cancel_all(self) -> bool:
        """Cancels all jobs, requeued ones included; returns whether there was none."""
        jobs = self.run("squeue", "-h", "-o", "%A").split()
        if jobs:
            self.run("scancel", "--quiet", *jobs)
        return not jobs

    def _clients(self) -> list[psutil.Process]:
        """All processes of this cluster's commands and jobs, but for this one and its ancestors."""
        variable = f"SLURM_CONF={self.directory}/slurm.conf".encode()
        ancestors = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                if variable in variables and process.pid not in ancestors:
                    processes.append(process)
        return processes

    def _remove_cgroups(self) -> None:
        """Removes the freezer cgroups of this cluster's jobs, then empty ones above them."""
        for node in self.nodes:
            root = FREEZER / f"slurm_{node}"
            span = range(self.first_job, self.first_job + JOBS)
            jobs = [p for p in root.glob("uid_*/job_*") if int(p.name.split("_")[1]) in span]
            below = [path for job in jobs for path in job.glob("**/*") if path.is_dir()]
            for path in [*reversed(below), *jobs, *root.glob("uid_*"), root]:
                with contextlib.suppress(OSError):  # removed, or of another cluster
                    path.rmdir()

    def _wait(
        self, what: str, reached: Callable[[], bool], timeout: float = 30, pause: float = 0.05
    ) -> None:
        deadline = time.monotonic() + timeout
        while not reached():
            codes = {name: self._daemons[name].poll() for name in SERVICES if name in self._daemons}
            ended = {name: code for name, code in codes.items() if code is not None}
            if ended or time.monotonic() > deadline:
                logs = sorted((self.directory / "log").iterdir())
                reason = f"ended: {ended}" if ended else f"waited {timeout} s"
                raise AssertionError("\n".join([f"no {what} ({reason})", *map(_tail, logs)]))
            time.sleep(pause)

    def _fail(self, job: dict[str, str], what: str) -> None:
        facts = {k: job.get(k) for k in ("JobState", "Reason", "ExitCode", "Restarts", "NodeList")}
        tail = _tail(Path(job.get("StdOut", "")))
        raise AssertionError(f"job {job['JobId']} {what}: {facts}\n{tail}")


def _tail(path: Path, lines: int = 40) -> str:
    text = path.read_text(errors="replace") if path.is_file() else "(no such file)"
    return "\n".join([f"--- {path}", *text.splitlines()[-lines:]])
