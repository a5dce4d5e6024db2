"""Who am I, and where are the others: what each launcher says about a process.

Works the same under `deepspeed`, `torchrun`, `srun` (one task per device, no launcher between),
`mpirun` and plain `python`. Nothing here imports torch.

SLURM's variables are also set where they describe no task, so the step decides. What a command is
where it is typed, measured with SLURM 22.05:

    typed in                             SLURM_STEP_ID         the command is
    batch script; shell of `salloc`      not set               one process
    shell of `salloc` on a cluster with  4294967290; the job's one process
      use_interactive_step                 SLURM_NTASKS stays
    `srun`, also `srun --overlap`        0, 1, 2 ...           task SLURM_PROCID of
                                                                 SLURM_STEP_NUM_TASKS
    `srun --ntasks=1 --pty bash`         0, 1, 2 ...           one process: task 0 of 1
    `srun --ntasks=4 --pty bash`         0, 1, 2 ...           refused: only the shell of task 0
                                                                 lives on, the others never come
    `torchrun`, `deepspeed`, `mpirun`    any                   what these say
"""

import os
import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping

from loaders.errors import ConfigError

# torch's name of a variable, and where other launchers put the same number. Processes of mpirun may
# carry SLURM's variables of the task that started them, so its own come first.
_SOURCES = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK"),
    # SLURM_NTASKS may be the job's (`srun --preserve-env`); the step's own number is always there.
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "PMI_SIZE"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID"),
}

# SLURM_MAX_NORMAL_STEP_ID of slurm.h. Above it: SLURM_INTERACTIVE_STEP 0xfffffffa, the shell of
# salloc; SLURM_BATCH_SCRIPT 0xfffffffb (0xfffffffe before 20.11); SLURM_EXTERN_CONT 0xfffffffc;
# SLURM_PENDING_STEP 0xfffffffd; NO_VAL 0xfffffffe; INFINITE 0xffffffff.
_LAST_STEP = 0xFFFFFFF0


def in_step(env: Mapping[str, str]) -> bool:
    """Whether SLURM's variables describe a task that `srun` started, not a batch script, a shell
    of `salloc` or another special step (as numbers, or as words such as `interactive`)."""
    step = env.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) <= _LAST_STEP


def map_environment(env: MutableMapping[str, str]) -> None:
    """Fill RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT from what the launcher gave.

    Variables that are set already win. SLURM's are used only where they describe a task; see
    above. The port under SLURM is 10000 + job id modulo 50000, so that jobs that share a node do
    not meet.

    Raises:
        ConfigError: several processes but no address of the first one; or a shell in the terminal
            of a step of several tasks, of which no other would arrive.
    """
    task = in_step(env)
    if task and "RANK" not in env:
        _refuse_terminal(env)
    for name, others in _SOURCES.items():
        for other in others:
            if other in env and (task or not other.startswith("SLURM")):
                env.setdefault(name, env[other])
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", "0")
    single = env["WORLD_SIZE"] == "1"
    if "MASTER_ADDR" not in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
        if single:
            env["MASTER_ADDR"] = "127.0.0.1"
        elif task and nodes and env["RANK"] == env.get("SLURM_PROCID"):
            env["MASTER_ADDR"] = address(first_host(nodes))
        else:
            raise ConfigError(
                f"this is rank {env['RANK']} of {env['WORLD_SIZE']}, but MASTER_ADDR is not set: "
                "start with torchrun, deepspeed or srun, or export the address of rank 0"
            )
    if "MASTER_PORT" not in env:
        job = re.match(r"\d+", env.get("SLURM_JOB_ID", ""))
        env["MASTER_PORT"] = str(
            free_port() if single else 10000 + int(job.group()) % 50000 if job else 29500
        )


def _refuse_terminal(env: Mapping[str, str]) -> None:
    """Raise ConfigError in a shell of `srun --pty` with several tasks.

    SLURM gives a terminal to task 0 only, and the shells of the others end at once. The task itself
    (`srun --pty python`) is right: SLURM_TASK_PID is this process then.
    """
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and env.get("SLURM_TASK_PID") != str(os.getpid()) and os.isatty(0):
        raise ConfigError(
            f"this terminal belongs to task 0 of the {tasks} of an `srun --pty` step, and the "
            "shells of the others have ended, so nobody would arrive: start the processes with "
            "torchrun, or ask for --ntasks=1, or export RANK=0 WORLD_SIZE=1 for a single process"
        )


def first_host(nodes: str) -> str:
    """First host name of a SLURM node list such as `gpu[03-05,07],login1`.

    Asks `scontrol`, which knows every form; without it expands the common bracket form.
    """
    try:
        answer = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        return answer.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        head = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
        return head.group(1) + (head.group(2) or "")


def address(host: str) -> str:
    """What other nodes reach a SLURM node by: its name, or where that does not resolve, as on
    cloud or virtual nodes, the `NodeAddr` that SLURM itself uses.

    The name comes first because asking the controller from every rank of a large job is slow.
    """
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    try:
        answer = subprocess.run(
            ["scontrol", "show", "node", "-o", host], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return host
    found = re.search(r"\bNodeAddr=(\S+)", answer.stdout)
    return found.group(1) if found else host


def free_port() -> int:
    """A TCP port that is free on this host now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
