"""Launchers such as torchrun start a command several times; one of these processes works, or all train one model.

Importing this must stay cheap: the command line asks before anything else is imported.
"""

import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from ...editing.errors import RequestError

RANKS = {
    "WORLD_SIZE": "RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
}
"""Variables of torchrun and accelerate, Open MPI, MPICH and srun: how many processes there are, and which this one is."""
MEETING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What processes need to find each other; with ``TORCHELASTIC_USE_AGENT_STORE``, which says who keeps their store."""
OF_LAUNCHERS = (*RANKS, *RANKS.values(), *MEETING, "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_", "TORCHELASTIC_")
"""What else accelerate and torchrun set, by how it begins."""
ONE_PROCESS = "excise works in one process, which uses all GPUs where a model needs them"
SHARDING = ("accelerate", "launch", "--use_fsdp", "--fsdp_version", "2")


@dataclass(frozen=True)
class Launch:
    """Processes that were started to share a training."""

    rank: int
    count: int
    variables: Mapping[str, str]
    """What the launcher had set; taken out of the environment, where the libraries would wait for the other processes."""
    contradiction: str = ""
    """What the launcher asks for that does not go with a training that is shared."""

    @contextmanager
    def in_environment(self) -> Iterator[None]:
        """While this lasts, libraries see that there are several processes."""
        wanted = {name: self.variables[name] for name in (*MEETING, AGENT_STORE) if name in self.variables}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name in wanted:
                os.environ.pop(name, None)


AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
LAUNCH: ContextVar[Launch | None] = ContextVar("LAUNCH", default=None)
"""Of this process, where a launcher asked for a sharded training."""


def processes() -> int:
    """How many processes share what can be shared."""
    launch = LAUNCH.get()
    return 1 if launch is None or launch.contradiction else launch.count


def started_by(*, shared: bool) -> tuple[str, ...]:
    """The words before a command that start it as it was started, where processes share its training."""
    count = processes()
    return (*SHARDING, "--num_processes", str(count), "-m") if shared and count > 1 else ()


def rank_and_size(variables: Mapping[str, str]) -> tuple[int, int]:
    """Which process this is, from 0, and how many a launcher started; 0 of 1 without a launcher."""
    for size, rank in RANKS.items():
        count = variables.get(size, "")
        if count.isdigit() and int(count) > 1:
            number = variables.get(rank, "")
            return int(number) if number.isdigit() else 0, int(count)
    return 0, 1


def launch_of(variables: MutableMapping[str, str], words: Sequence[str]) -> Launch | None:
    """The processes that may share a training, where a launcher asks for that; its variables are taken out then.

    Args:
        variables: The environment.
        words: The command's arguments: of all commands ``run`` alone trains.
    """
    rank, count = rank_and_size(variables)
    asked = _is_set(variables, "ACCELERATE_USE_FSDP") or _parallel(variables)
    if count == 1 or not asked or words[:1] != ["run"] or "--dry-run" in words or "--help" in words:
        return None
    contradiction = _contradiction(variables)
    return Launch(rank, count, taken_out(variables), contradiction)


def taken_out(variables: MutableMapping[str, str]) -> dict[str, str]:
    """Take a launcher's variables out, and return them."""
    names = [name for name in variables if name in OF_LAUNCHERS or name.startswith(PREFIXES)]
    return {name: variables.pop(name) for name in names}


def _is_set(variables: Mapping[str, str], name: str) -> bool:
    return variables.get(name, "").lower() in ("1", "true", "yes")


def _parallel(variables: Mapping[str, str]) -> str:
    """Another way to divide a model that the launcher asks for, in words."""
    for name, what in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if _is_set(variables, name):
            return what
    for part, what in (("TP", "tensor parallelism"), ("CP", "context parallelism"), ("SP", "sequence parallelism")):
        if variables.get(f"PARALLELISM_CONFIG_{part}_SIZE", "1") not in ("", "1"):
            return what
    replicas = variables.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1")
    return "" if replicas in ("", "1") else f"{replicas} replicas of the model"


def _contradiction(variables: Mapping[str, str]) -> str:
    """Why a training cannot be shared as the launcher asks, and what to do; empty where it can."""
    if other := _parallel(variables):
        return f"the launcher asks for {other}, and excise shards with FSDP 2 alone; start it with {' '.join(SHARDING)}"
    if (version := variables.get("FSDP_VERSION", "1")) != "2":
        return f"the launcher asks for FSDP {version:.20}, and excise shards with FSDP 2 alone; add --fsdp_version 2"
    if _is_set(variables, "FSDP_OFFLOAD_PARAMS"):
        return (
            "the launcher asks for parameters in main memory; leave out --fsdp_offload_params, or start more processes"
        )
    if _is_set(variables, "FSDP_ACTIVATION_CHECKPOINTING"):
        return (
            "the launcher asks for activation checkpointing; leave out --fsdp_activation_checkpointing and use --set"
            " gradient_checkpointing=true"
        )
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in variables]:
        return f"the launcher does not set {', '.join(missing)}, so processes cannot meet; start it with {' '.join(SHARDING)}"
    return ""


def work_alone(variables: MutableMapping[str, str]) -> tuple[bool, str]:
    """Whether this process is the one that works, and what it says; a launcher's variables are taken out then.

    Left in, the training library would wait for the other processes for ever.
    """
    rank, count = rank_and_size(variables)
    if count == 1:
        if _is_set(variables, "ACCELERATE_USE_FSDP"):
            # The library would shard over one process, which has nothing to share.
            taken_out(variables)
        return True, ""
    if rank:
        return False, stops(rank, count, ONE_PROCESS)
    taken_out(variables)
    return True, f"process 0 of {count} works alone: {ONE_PROCESS}; start it without a launcher"


def stops(rank: int, count: int, why: str) -> str:
    """What a process says that has nothing to do."""
    return f"process {rank} of {count} stops: {why}"


def refuse_ranks() -> None:
    """Check that no launcher started this process beside others, for programs that call the package.

    Raises:
        RequestError: One did.
    """
    rank, count = rank_and_size(os.environ)
    if count > 1:
        raise RequestError(
            f"this is process {rank} of {count}, and {ONE_PROCESS}; start the program without a launcher"
        )
