"""A SLURM cluster on this machine: real daemons, two nodes of one core each, with everything in a temporary folder."""

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
ReturnToService=0
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=2000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Commands of the cluster."""

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


def why_not() -> str:
    """What is missing here; empty where the daemons can run."""
    if lacking := [name for name in DAEMONS if shutil.which(name, path=WHERE) is None]:
        return f"{lacking[0]} is not installed (Debian: slurmctld, slurmd, munge)"
    return "" if os.geteuid() == 0 else "SLURM's daemons need root"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running cluster, which the commands of this process find by SLURM_CONF."""
    if reason := why_not():
        pytest.skip(reason)
    pytest.importorskip("submitit")
    folder = tmp_path_factory.mktemp("slurm")
    patch = pytest.MonkeyPatch()
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _configure(folder)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", WHERE)
        daemons.append(_munge(folder))
        daemons.append(_daemon(folder, "slurmctld", "-D"))
        daemons += [_daemon(folder, "slurmd", "-D", "-N", node) for node in NODES]
        _wait_until_idle(folder)
        yield Cluster()
        subprocess.run(["scancel", "--user=root"], check=False, capture_output=True)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            daemon.kill()
        patch.undo()


def _configure(folder: Path) -> None:
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        for taken in (one, two, three):
            taken.bind(("127.0.0.1", 0))
        ports = [taken.getsockname()[1] for taken in (one, two, three)]
    for name in ("state", "munge", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, ports=ports))


def _munge(folder: Path) -> "subprocess.Popen[bytes]":
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    # Every folder above its socket must be open to others, which temporary folders of tests are not; --force says so.
    places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder}/munge/{name}" for option, name in places.items()]
    daemon = _daemon(folder, "munged", "--force", "--foreground", *options)
    _wait((folder / "munge" / "socket").exists, folder)
    return daemon


def _daemon(folder: Path, name: str, *options: str) -> "subprocess.Popen[bytes]":
    path = shutil.which(name, path=WHERE)
    assert path is not None
    with (folder / f"{name}.{len(list(folder.iterdir()))}.log").open("wb") as log:
        return subprocess.Popen([path, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _wait_until_idle(folder: Path) -> None:
    def idle() -> bool:
        done = subprocess.run(["sinfo", "--noheader", "--format=%t %D"], capture_output=True, text=True, check=False)
        return done.stdout.strip() == f"idle {len(NODES)}"

    _wait(idle, folder)


def _wait(ready: Callable[[], bool], folder: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
            sys.stderr.write(logs)
            pytest.fail(f"SLURM did not start; its logs:\n{logs}")
        time.sleep(0.5)
