"""Launchers such as torchrun start a command several times; only one of these processes works.

Importing this must stay cheap: the command line asks before anything else is imported.
"""

import os
from collections.abc import Mapping, MutableMapping

from ...editing.errors import RequestError

RANKS = {
    "WORLD_SIZE": "RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
}
"""Variables of torchrun and accelerate, Open MPI, MPICH and srun: how many processes there are, and which this one is."""
OF_LAUNCHERS = (
    *RANKS, *RANKS.values(), "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
)  # fmt: skip
ONE_PROCESS = "excise works in one process, which uses all GPUs where a model needs them"


def rank_and_size(variables: Mapping[str, str]) -> tuple[int, int]:
    """Which process this is, from 0, and how many a launcher started; 0 of 1 without a launcher."""
    for size, rank in RANKS.items():
        count = variables.get(size, "")
        if count.isdigit() and int(count) > 1:
            number = variables.get(rank, "")
            return int(number) if number.isdigit() else 0, int(count)
    return 0, 1


def work_alone(variables: MutableMapping[str, str]) -> tuple[bool, str]:
    """Whether this process is the one that works, and what it says; a launcher's variables are taken out then.

    Left in, the training library would wait for the other processes for ever.
    """
    rank, count = rank_and_size(variables)
    if count == 1:
        return True, ""
    if rank:
        return False, f"process {rank} of {count} stops: {ONE_PROCESS}"
    for name in OF_LAUNCHERS:
        variables.pop(name, None)
    return True, f"process 0 of {count} works alone: {ONE_PROCESS}; start it without a launcher"


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
