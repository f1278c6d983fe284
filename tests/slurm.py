"""A SLURM cluster on this machine: real daemons, two nodes of one core each, with everything in a temporary folder.

Each node has its own host name and its own processes, so that a lost one takes everything with it that ran there.
"""

import functools
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

DAEMONS = ("munged", "slurmctld", "slurmd")
WHERE = f"/usr/sbin:{os.environ.get('PATH', '')}"
NODES = ("n1", "n2")
NAMESPACES = ("unshare", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child")
# The shell stays as the node's first process and buries the others.
NODE = 'hostname "$1" && mount --bind "$2/hosts" /etc/hosts && "$3" -D -N "$1"; exit'
CONFIGURATION = """\
ClusterName=excise
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=10
MinJobAge=10
SlurmdTimeout={lost_after}
ReturnToService=0
MailProg=/bin/true
NodeName=n1 NodeHostname=n1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=2000
NodeName=n2 NodeHostname=n2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=2000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


LOST_AFTER = 20
"""Seconds without an answer after which SLURM takes a node for lost; 300 where nobody says otherwise."""


class Cluster:
    """Commands of the cluster."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def ask(self, *command: str) -> str:
        """Run one of SLURM's commands and return what it prints."""
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    def running(self) -> dict[str, str]:
        """The node of each job that runs, by the number that the queue shows."""
        lines = self.ask("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i %N").splitlines()
        return dict(line.split() for line in lines)

    def set_node(self, node: str, state: str) -> None:
        """Such as down or resume."""
        self.ask("scontrol", "update", f"nodename={node}", f"state={state}", "reason=test")

    def start(self, node: str) -> None:
        """Switch a node on."""
        words = (*NAMESPACES, "sh", "-c", NODE, "sh", node, str(self.folder), _found("slurmd"))
        self.nodes[node] = _process(self.folder, f"slurmd.{node}", *words)

    def lose(self, node: str) -> None:
        """Cut a node's power: all its processes end at once, and nobody tells SLURM."""
        process = self.nodes.pop(node)
        process.kill()
        process.wait(20)

    def make_ready(self) -> None:
        """Empty the queue, and have all nodes again."""
        subprocess.run(["scancel", "--user=root"], check=False, capture_output=True)
        for node in NODES:
            if node not in self.nodes:
                self.start(node)
        _wait(functools.partial(_is_idle, self), self.folder, 120)


def _is_idle(cluster: Cluster) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%N %T"], capture_output=True, text=True, check=False
    )
    states = dict(line.split() for line in done.stdout.splitlines())
    for node, state in states.items():
        if state in ("down", "drained"):
            cluster.set_node(node, "resume")
    return states == dict.fromkeys(NODES, "idle") and not cluster.ask("squeue", "--noheader")


def why_not() -> str:
    """What is missing here; empty where the daemons can run."""
    if lacking := [name for name in DAEMONS if shutil.which(name, path=WHERE) is None]:
        return f"{lacking[0]} is not installed (Debian: slurmctld, slurmd, munge)"
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    done = subprocess.run([*NAMESPACES, "mount", "--bind", "/", "/mnt"], check=False, capture_output=True)
    return "" if done.returncode == 0 else "SLURM's nodes need namespaces of their own, which unshare cannot make here"


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The running daemons, which the commands of this process find by SLURM_CONF."""
    if reason := why_not():
        pytest.skip(reason)
    pytest.importorskip("submitit")
    folder = tmp_path_factory.mktemp("slurm")
    patch = pytest.MonkeyPatch()
    cluster, others = Cluster(folder), list[subprocess.Popen[bytes]]()
    try:
        _configure(folder)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", WHERE)
        others.append(_munge(folder))
        others.append(_process(folder, "slurmctld", _found("slurmctld"), "-D"))
        yield cluster
        subprocess.run(["scancel", "--user=root"], check=False, capture_output=True)
    finally:
        for node in [*cluster.nodes]:
            cluster.lose(node)
        for daemon in reversed(others):
            daemon.terminate()
        for daemon in others:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            daemon.kill()
        patch.undo()


@pytest.fixture
def cluster(daemons: Cluster) -> Cluster:
    """The cluster with both nodes idle and an empty queue, whatever an earlier test did to it."""
    daemons.make_ready()
    return daemons


def _configure(folder: Path) -> None:
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        for taken in (one, two, three):
            taken.bind(("127.0.0.1", 0))
        ports = [taken.getsockname()[1] for taken in (one, two, three)]
    for name in ("state", "munge", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(folder=folder, host=host, ports=ports, lost_after=LOST_AFTER)
    )
    (folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n")


def _munge(folder: Path) -> "subprocess.Popen[bytes]":
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    # Every folder above its socket must be open to others, which temporary folders of tests are not; --force says so.
    places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder}/munge/{name}" for option, name in places.items()]
    daemon = _process(folder, "munged", _found("munged"), "--force", "--foreground", *options)
    _wait((folder / "munge" / "socket").exists, folder)
    return daemon


def _found(name: str) -> str:
    path = shutil.which(name, path=WHERE)
    assert path is not None
    return path


def _process(folder: Path, name: str, *words: str) -> "subprocess.Popen[bytes]":
    with (folder / f"{name}.{len(list(folder.iterdir()))}.log").open("wb") as log:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _wait(ready: Callable[[], bool], folder: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
            sys.stderr.write(logs)
            pytest.fail(f"SLURM did not start; its logs:\n{logs}")
        time.sleep(0.5)
