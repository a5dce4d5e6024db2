"""A real SLURM on this machine: munge, a controller and virtual nodes, on loopback, by pid.

Everything lies in one private folder with ports of its own, so that several clusters can run at a
time; stopping one touches only processes that carry its `SLURM_CONF`.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.slurm.packages import SEARCH

ROOT = Path(__file__).parent.parent.parent
NODES = ("n1", "n2", "n3")
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_interval=1,sched_min_interval=100000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdTimeout=300
KillWait=5
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
LaunchParameters=use_interactive_step
GresTypes=gpu
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10
PartitionName=low Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=60
"""


class Cluster:
    """munge, slurmctld and three virtual nodes of 4 CPUs and 2 pretended GPUs in `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.configuration = folder, folder / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen] = {}
        dropped = ("SLURM_", "SBATCH_", "MASTER_", "UNICL_")
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(dropped)},
            "PATH": SEARCH, "SLURM_CONF": str(self.configuration), "UNICL_VENV": sys.prefix,
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def start(self) -> None:
        """Write the configuration and start everything; RuntimeError with the logs if it fails."""
        for name in ("munge", "state", "spool", "log", "gpu"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o711)
        host = _resolvable_host()
        controller, *ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostName={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 "
            "RealMemory=1000 Gres=gpu:2 State=UNKNOWN"
            for node, port in zip(NODES, ports, strict=True)
        )
        self.configuration.write_text(
            CONFIGURATION.format(
                folder=self.folder, host=host, user=getpass.getuser(), nodes=nodes,
                controller_port=controller,
            )
        )  # fmt: skip
        # slurmd 22.05 loads a cgroup plugin even where none is used; v1 starts without a mount.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for number in range(2):  # a GPU must be a device
            (self.folder / f"gpu/{number}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(
            f"NodeName={','.join(NODES)} Name=gpu File={self.folder}/gpu/[0-1]\n"
        )
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{n}-file={self.folder}/munge/{n}" for n in ("key", "pid", "seed", "log")]
        socket_path = self.folder / "munge/socket"
        self.launch("munged", "--foreground", "--force", f"--socket={socket_path}", *files)
        self.wait(socket_path.exists, "munge's socket")
        self.launch("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait(self.idle, "all nodes idle")

    def launch(self, program: str, *arguments: str, name: str | None = None) -> None:
        """Start a daemon in the foreground, its output into log/NAME.out."""
        name = name or program
        with (self.folder / f"log/{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                [shutil.which(program, path=SEARCH), *arguments], env=self.environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.folder,
            )  # fmt: skip

    def start_node(self, node: str) -> None:
        """Start slurmd of a virtual node."""
        self.launch("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """Kill -9 a virtual node: slurmd, its step daemons, and every process of its jobs."""
        self.daemons.pop(node).kill()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == node:
                    parents = [p for p in process.parents() if p.name() == "slurmstepd"]
                    for each in (*parents, process):
                        each.kill()

    def processes(self) -> list[psutil.Process]:
        """Every process that was started by this cluster."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == str(self.configuration):
                    found.append(process)
        return found

    def tasks(self, job: str) -> list[psutil.Process]:
        """The ranks of a training job: the Python processes that a step daemon started."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                mine = process.environ().get("SLURM_JOB_ID") == job
                python = process.name().startswith("python")
                if mine and python and process.parent().name() == "slurmstepd":
                    found.append(process)
        return found

    def stop(self) -> None:
        """Cancel all jobs, end all daemons in reverse order, then whatever is left."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", f"--user={getpass.getuser()}")
            deadline = time.monotonic() + 15
            while self.run("squeue", "-h") and time.monotonic() < deadline:
                time.sleep(0.1)
        for name in reversed(list(self.daemons)):
            self._end(name)
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _end(self, name: str) -> None:
        daemon = self.daemons.pop(name)
        daemon.terminate()
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def idle(self) -> bool:
        """Whether every node waits for work; RuntimeError when a daemon has ended."""
        for name, daemon in self.daemons.items():
            if daemon.poll() is not None:
                raise RuntimeError(f"{name} ended with {daemon.returncode}\n{self.logs()}")
        states = self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False)
        return set(states.split()) == set(NODES)

    def logs(self) -> str:
        """The end of every log, for the message of a failure."""
        files = sorted((self.folder / "log").iterdir())
        return "\n".join(f"== {f.name}\n{f.read_text(errors='replace')[-1500:]}" for f in files)

    def run(self, *command: str, check: bool = True, **variables: str) -> str:
        """Output of a SLURM command, run in the repository's root; stderr is in the error."""
        done = subprocess.run(
            command, cwd=ROOT, env={**self.environment, **variables}, text=True, timeout=60,
            capture_output=True, check=False,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise subprocess.SubprocessError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *arguments: str, **variables: str) -> str:
        """Job id of `sbatch` with these arguments."""
        return self.run("sbatch", "--parsable", *arguments, **variables).strip()

    def jobs(self, job: str) -> list[dict[str, str]]:
        """What the controller knows of a job, one record per array task."""
        text = self.run("scontrol", "show", "job", "-o", job, check=False)
        return [dict(p.split("=", 1) for p in line.split() if "=" in p)
                for line in text.splitlines() if line.startswith("JobId=")]  # fmt: skip

    def states(self, job: str) -> set[str]:
        """States of all tasks of a job."""
        return {record["JobState"] for record in self.jobs(job)}

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 300) -> None:
        """Wait for a condition; RuntimeError with all logs when it does not come."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {seconds} s for {what}\n{self.logs()}")
            time.sleep(0.1)

    def finished(self, job: str) -> set[str]:
        """Wait until every task of a job has ended; the states they ended in."""
        self.wait(lambda: (s := self.states(job)) and s <= FINAL, f"job {job} to end")
        return self.states(job)

    def start_now(self, job: str, *changes: str) -> None:
        """A requeued job waits two minutes before it starts again; not here.

        `changes`: what else `scontrol update` shall change, as `TimeLimit=10`.
        """

        def requeued():
            assert not self.states(job) & FINAL, f"job {job} ended: {self.states(job)}"
            return self.states(job) == {"PENDING"}

        self.wait(requeued, f"job {job} to be requeued")
        # slurmd revokes the credential of the life before, and takes none of the same second.
        time.sleep(1.5)
        self.run("scontrol", "update", f"JobId={job}", *changes, "StartTime=now")


def _resolvable_host() -> str:
    """This host's short name; the daemons look it up, so root adds it to /etc/hosts if need be."""
    host = Path("/proc/sys/kernel/hostname").read_text().strip().split(".")[0]
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        with Path("/etc/hosts").open("a") as file:
            file.write(f"127.0.0.1 {host}\n")
    return host


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.socket()) for _ in range(count)]
        for server in servers:
            server.bind(("127.0.0.1", 0))
        return [server.getsockname()[1] for server in servers]
