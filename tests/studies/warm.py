"""A launcher for tests: `python -S warm.py SOCKET script.py …` runs a script as `python` would, in
a process that is forked from a server with everything imported. It takes a tenth of a second, where
a fresh interpreter needs ten of a core.

The client is the process that a study knows: it hands SIGTERM on to the script, as a launcher does,
and the script gets it also where the client dies. The server is a process of
`tests.multiprocess.fork_server`.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def words(address: Path) -> str:
    """The launcher for the server at `address`."""
    return f"python -S {Path(__file__).resolve()} {address}"


def client() -> int:
    """Have the server run the rest of the command line; its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        call = {"argv": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
        # As a launcher does: hand SIGTERM on, and wait for the script.
        signal.signal(signal.SIGTERM, lambda *_: connection.send(b"t"))
        socket.send_fds(connection, [b"."], [1, 2])
        connection.sendall(json.dumps(call).encode() + b"\n")
        return int(connection.makefile().readline())


def serve(address: Path) -> None:
    """One script after the other, until this process is killed; importable."""
    sys.path.insert(0, str(ROOT))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address))
        server.listen()
        while True:
            connection, _ = server.accept()
            with connection:
                _, fds, _, _ = socket.recv_fds(connection, 1, 2)
                call = json.loads(connection.makefile().readline())
                child = os.fork()
                if child == 0:
                    server.close()
                    connection.close()
                    _script(call, fds)
                for number in fds:
                    os.close(number)
                _watch(connection, child)


def _watch(connection: socket.socket, child: int) -> None:
    """Tell the client how the script ended; SIGTERM to it when the client is gone."""
    told = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):
                connection.sendall(f"{128 - code if code < 0 else code}\n".encode())
            return
        if select.select([] if told else [connection], [], [], 0.02)[0]:
            os.kill(child, signal.SIGTERM)
            told = True


def _script(call: dict, fds: list[int]) -> None:
    import multiprocessing
    import runpy
    import traceback

    import torch

    torch.set_num_threads(1)
    # As in a process of its own: data workers are forked from it.
    multiprocessing.set_start_method("fork", force=True)
    for number, descriptor in enumerate(fds, start=1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    sys.argv = call["argv"]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(client())
