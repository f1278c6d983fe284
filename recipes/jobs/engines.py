"""Where many jobs run: processes on this machine, or a SLURM cluster."""

import os
import re
import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec

from ...editing.errors import RequestError, nearest

KEYS = {
    "partition": "partition",
    "time": "time",
    "mem": "mem",
    "cpus": "cpus_per_task",
    "gpus": "gpus_per_node",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "nodelist": "nodelist",
    "exclude": "exclude",
    "reservation": "reservation",
    "at_once": "array_parallelism",
}
"""What ``slurm:`` takes, and what sbatch or submitit calls it."""
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True)
class Local:
    """Processes on this machine."""

    at_once: int = 1


@dataclass(frozen=True)
class Slurm:
    """One SLURM job each, from one array."""

    parameters: dict[str, str] = field(default_factory=dict)
    """By the names in ``KEYS``."""

    @property
    def minutes(self) -> int:
        """Time limit of a job; an hour where none is given."""
        return minutes_of(self.parameters["time"]) if "time" in self.parameters else 60


Engine = Local | Slurm


def parse_engine(text: str) -> Engine:
    """``local:N`` or ``slurm[:key=value,...]``.

    Raises:
        RequestError: It is neither, a key is unknown, or SLURM or submitit is not installed here.

    Example:
        >>> parse_engine("local:4")
        Local(at_once=4)
    """
    name, _, rest = text.partition(":")
    if name == "local":
        if not re.fullmatch(r"[1-9]\d{0,3}", rest):
            raise RequestError(f"--jobs {text}: give the number of processes at once, such as local:2")
        return Local(int(rest))
    if name != "slurm":
        hint = nearest(name, ["local", "slurm"])
        raise RequestError(f"--jobs {text}: no engine {name!r}{hint}; give local:N or slurm[:key=value,...]")
    engine = Slurm(_parameters(text, rest))
    _check_time(text, engine)
    if find_spec("submitit") is None:
        raise RequestError("--jobs slurm needs submitit; install it with: pip install 'excise[jobs]'")
    if lacking := [tool for tool in ("sbatch", "srun", "squeue") if shutil.which(tool) is None]:
        raise RequestError(
            f"--jobs slurm: there is no {lacking[0]} here; run it on a host that submits to the cluster, or use local:N"
        )
    return engine


def _parameters(text: str, rest: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise RequestError(f"--jobs {text}: {part!r} is not key=value; keys: {', '.join(KEYS)}")
        if key not in KEYS:
            raise RequestError(
                f"--jobs {text}: slurm has no key {key!r}{nearest(key, list(KEYS))}; keys: {', '.join(KEYS)}"
            )
        if key in ("cpus", "at_once") and not re.fullmatch(r"[1-9]\d{0,5}", value):
            raise RequestError(f"--jobs {text}: {key}={value} is no whole number above 0")
        parameters[key] = value
    return parameters


def _check_time(text: str, engine: Slurm) -> None:
    given = engine.parameters.get("time", "60")
    if not TIME.fullmatch(given) or engine.minutes < 1:
        raise RequestError(f"--jobs {text}: time={given} is no time; give minutes, H:MM:SS or D-HH:MM:SS")


def minutes_of(text: str) -> int:
    """SLURM's notations of a time limit, in minutes: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Example:
        >>> minutes_of("1-02:30:00")
        1590
    """
    match = TIME.fullmatch(text)
    if match is None:
        return 0
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1]:
        return days * 1440 + first * 60 + second + (third > 0)
    return first * 60 + second + (third > 0) if match[4] else first + (second > 0)


def threads_each(at_once: int) -> int:
    """Cores of this machine for each of some processes, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // at_once)


def own_cores() -> int:
    """Cores that this process may use; fewer where the user said so."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(threads_each(1), int(given)) if given.isdigit() and int(given) else threads_each(1)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA names them; none is counted with a driver that does not answer."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [part.strip() for part in listed.split(",") if part.strip() and part.strip() != "-1"]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
