"""`train.py` as people start it, but forked from a server that has everything imported.

A fresh interpreter needs twelve seconds of a core until the first line of `main`. Launchers and
fresh interpreters have tests of their own: tests/engine/test_train.py (python, torchrun),
tests/engine/test_dist_check.py (torchrun), tests/slurm (srun).
"""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path

import train as script
from tests.multiprocess import fork_server, free_port

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "tests" / "engine" / "tiny.yaml")


class Command:
    """The ranks of a command in the background; as `subprocess.Popen` where that has the same.

    Args:
        main: what each rank runs after `prepare`; importable.
        arguments: of the command line, behind its name. ranks: how many processes.
        environment: variables beside those of this process.
        prepare: called first in each rank, importable: what a test changes inside the program.
        kill_on_bad_exit: end the others when a rank has failed, as torchrun and `srun
            --kill-on-bad-exit` do; without it each is left to find out.
    """

    def __init__(
        self,
        main: Callable[[], None],
        *arguments: object,
        ranks: int = 1,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
        kill_on_bad_exit: bool = False,
    ):
        self._kill_on_bad_exit = kill_on_bad_exit
        self._folder = tempfile.TemporaryDirectory(prefix="command-")
        for stream in ("stdout", "stderr"):
            (Path(self._folder.name) / stream).touch()
        self.args = list(map(str, arguments))
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        if ranks > 1:
            variables |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        context = fork_server()
        self.processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            life = (main, self.args, variables | place, self._folder.name, prepare)
            self.processes.append(context.Process(target=_rank, args=life))
            self.processes[-1].start()

    @property
    def pid(self) -> int:
        """Of rank 0."""
        return self.processes[0].pid

    @property
    def returncode(self) -> int | None:
        """The highest of those that failed, else 0; None while one of them runs."""
        codes = [process.exitcode for process in self.processes]
        failed = [code for code in codes if code]
        return None if None in codes else max(failed, default=0)  # above what our kill gives

    poll = returncode.fget

    def text(self, stream: str) -> str:
        """What all ranks have written so far to `stdout` or `stderr`."""
        return (Path(self._folder.name) / stream).read_text()

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Wait for all ranks; returns stdout and stderr. Raises `subprocess.TimeoutExpired`."""
        end = time.monotonic() + timeout
        while self.returncode is None:
            left = end - time.monotonic()
            if left <= 0:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout, self.text("stdout"))
            alive = [process.sentinel for process in self.processes if process.exitcode is None]
            wait(alive, timeout=left)
            if self._kill_on_bad_exit and any(process.exitcode for process in self.processes):
                self.kill()
        return self.text("stdout"), self.text("stderr")

    def send_signal(self, number: int) -> None:
        """To all ranks that have not ended."""
        for process in self.processes:
            if process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):  # it ends just now
                    os.kill(process.pid, number)

    def kill(self) -> None:
        """SIGKILL to all ranks; returns when they have gone."""
        for process in self.processes:
            process.kill()
            process.join()


def train(*arguments: object, **options) -> subprocess.CompletedProcess:
    """Run `train.py` on `tiny.yaml` to its end; `options` are those of `training`."""
    timeout = options.pop("timeout", 240)
    return finish(training(*arguments, **options), timeout)


def training(*arguments: object, **options) -> Command:
    """`train.py` on `tiny.yaml` in the background; `options` are those of `Command`."""
    return Command(script.main, "--config", CONFIG, *arguments, **options)


def finish(command: Command, timeout: float = 240) -> subprocess.CompletedProcess:
    """Wait for a command; code and output as `subprocess.run` gives them."""
    out, err = command.communicate(timeout)
    return subprocess.CompletedProcess(command.args, command.returncode, out, err)


def _rank(main, arguments, environment, folder, prepare):
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(folder) / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(ROOT)
    os.environ.clear()  # of the moment when the server started
    os.environ.update(environment)
    import torch

    from loaders.errors import run_cli

    torch.set_num_threads(1)
    # As in a process of its own: data workers are forked from their rank.
    multiprocessing.set_start_method("fork", force=True)
    if prepare:
        prepare()
    sys.argv = ["command", *arguments]
    run_cli(main)
