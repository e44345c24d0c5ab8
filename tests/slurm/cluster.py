"""Runs a real Slurm with five nodes on one machine: munged, slurmctld and five slurmd in private namespaces.

Mounts, network and process ids are private. The nodes' names exist only inside, ports cannot clash, and all processes
inside (daemons, jobs, ranks) end with the first process inside, which ends with the test's process.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_TOOLS = ("sbatch", "slurmctld", "slurmd", "munged", "unshare", "nsenter", "ip", "mount")
_NUM_NODES = 5
_START_SECONDS = 60.0

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd-%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,sched_interval=1,bf_interval=1
PreemptParameters=send_user_signal
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=300
NodeName=n[1-{nodes}] NodeHostname=localhost NodeAddr=n[1-{nodes}] Port=[17001-{last_port}] CPUs=4 RealMemory=4096
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
"""Credentials expire after 5 s, as a requeued job waits for as long; there is no cgroup."""


class SlurmError(RuntimeError):
    """A daemon or a tool of Slurm's failed."""


def missing() -> str | None:
    """Returns why Slurm cannot run here, or None if it can."""
    if sys.platform != "linux":
        return f"Slurm's test needs Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return f"Slurm's daemons in namespaces need root, this is user {os.geteuid()}"
    absent = [tool for tool in _TOOLS if shutil.which(tool, path=_path()) is None]
    if absent:
        return f"Slurm's test needs slurm-wlm and munge, there is no {' and no '.join(absent)}"
    tried = subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"namespaces cannot be made: {tried.stderr.strip()}" if tried.returncode else None


class Slurm:
    """A cluster with the nodes n1 to n5, created by `open_slurm`."""

    def __init__(self, base: Path) -> None:
        self.base = base
        for name in ("state", "log", "run", *(f"spool/n{node}" for node in range(1, _NUM_NODES + 1))):
            (base / name).mkdir(parents=True)
        hosts = "".join(f"127.0.1.{node} n{node}\n" for node in range(1, _NUM_NODES + 1))
        (base / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n{hosts}")
        (base / "slurm.conf").write_text(
            _CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0],
                base=base,
                nodes=_NUM_NODES,
                last_port=17000 + _NUM_NODES,
            )
        )
        (base / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (base / "run" / "munge.key").write_bytes(os.urandom(128))
        (base / "run" / "munge.key").chmod(0o600)
        self._holder = self._enter_new()
        self._daemons: list[subprocess.Popen[bytes]] = []

    def run(self, *command: str, **environment: str) -> str:
        done = self.attempt(*command, **environment)
        if done.returncode:
            raise SlurmError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    def attempt(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the cluster and returns its result even if it fails."""
        given = self._environment(environment)
        return subprocess.run(
            [*self._inside(), *command], env=given, capture_output=True, text=True, timeout=120, check=False
        )

    def job(self, number: str) -> dict[str, str]:
        """Returns Slurm's record of a job: JobState, Restarts, ExitCode."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                raise SlurmError(f"{what}: not after {seconds} s; {self.run('squeue')}")
            time.sleep(0.1)

    def start(self) -> None:
        """Starts the daemons and waits until the nodes are idle."""
        run, log = self.base / "run", self.base / "log"
        munge = ["munged", "--foreground", "--force", f"--key-file={run}/munge.key", f"--socket={run}/munge.socket"]
        munge += [f"--pid-file={run}/munged.pid", f"--log-file={log}/munged.log", f"--seed-file={run}/munged.seed"]
        self._start_daemon(*munge)
        self.wait_for("munged", lambda: (run / "munge.socket").exists(), _START_SECONDS)
        self._start_daemon("slurmctld", "-D", "-i", "-f", f"{self.base}/slurm.conf")
        for node in range(1, _NUM_NODES + 1):
            self._start_daemon("slurmd", "-D", "-f", f"{self.base}/slurm.conf", "-N", f"n{node}")
        idle = ("sinfo", "--noheader", "--Node", "--partition=batch", "--states=idle", "--format=%n")
        self.wait_for("nodes", lambda: len(self.attempt(*idle).stdout.split()) == _NUM_NODES, _START_SECONDS)

    def close(self) -> None:
        """Ends the first process in the namespaces, which ends all others."""
        self._holder.kill()
        self._holder.wait()
        for daemon in self._daemons:
            daemon.wait()

    def _enter_new(self) -> subprocess.Popen[str]:
        # Names are looked up only for families of which a link other than lo has an address.
        link = "ip link add eth0 type veth peer eth1 && ip addr add 10.78.0.1/24 dev eth0 && ip link set eth0 up"
        script = f"ip link set lo up && {link} && "
        script += f"mount --bind {self.base}/hosts /etc/hosts && echo ready && exec sleep infinity"
        holder = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--fork"),
                *("--kill-child", "--mount-proc", "bash", "-c", script),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            holder.kill()
            raise SlurmError("namespaces with their own /etc/hosts cannot be made")
        return holder

    def _inside(self) -> list[str]:
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        return ["nsenter", f"--target={children[0]}", "--mount", "--net", "--pid", f"--wd={Path.cwd()}", "--"]

    def _start_daemon(self, *command: str) -> None:
        out = (self.base / "log" / "daemons.log").open("ab")
        with out:
            self._daemons.append(
                subprocess.Popen([*self._inside(), *command], env=self._environment({}), stdout=out, stderr=out)
            )

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**kept, "PATH": _path(), "SLURM_CONF": f"{self.base}/slurm.conf", **more}


@contextmanager
def open_slurm(base: Path) -> Iterator[Slurm]:
    """Starts a cluster, and stops all of it on exit."""
    slurm = Slurm(base)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.close()


def _path() -> str:
    """Returns the path of a daemon, which may be outside the user's PATH."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
