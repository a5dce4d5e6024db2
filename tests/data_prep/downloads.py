"""Real downloads for tests: lists over the test server, the command, and reading results."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.data_prep.http_server import LIMIT, Server, images, jpeg, serve

REPOSITORY = Path(__file__).resolve().parents[2]
SHARD = 12
MARK = "UNICL_TEST_DOWNLOAD"
OPTIONS = {
    "--samples-per-shard": SHARD,
    "--processes": 2,
    "--threads": 8,
    "--timeout": 1.5,
    "--retries": 1,
    "--image-seconds": 3,
    "--stall-minutes": 0.5,
    "--max-image-bytes": LIMIT,
    "--min-image-size": 10,
    "--max-aspect-ratio": 20,
    "--user-agent-token": "unicl-test",
}

# What becomes of each address: the order is that of the list.
EXPECTED = (
    dict.fromkeys(images(), "success")
    | {"/noai.jpg": "opt-out", "/noindex.jpg": "opt-out", "/mended.jpg": "http 5xx"}
    | {f"/jpeg/{number}.jpg": "success" for number in range(8)}
    | {
        "/missing.jpg": "http 404",
        "/forbidden.jpg": "http 403",
        "/gone.jpg": "http 410",
        "/unavailable.jpg": "http 5xx",
        "/redirect.jpg": "success",
        "/hops/5": "success",
        "/hops/6": "redirect",
        "/loop": "redirect",
        "/file.jpg": "scheme not allowed",
        "/ftp.jpg": "scheme not allowed",
        "/html.jpg": "html page",
        "/short.jpg": "incomplete",
        "/truncated.jpg": "not an image",
        "/zero.jpg": "empty body",
        "/bomb.png": "too many pixels",
        "/huge.jpg": "too large",
        "/endless.jpg": "too large",
        "/drip.jpg": "too slow",
        "/hang.jpg": "timeout",
        "/reset.jpg": "connection",
        "/nohttp.jpg": "connection",
    }
    | {f"/jpeg/{number}.jpg": "success" for number in range(8, 11)}
    | {
        "/gzip.jpg": "success",
        "/deflate.jpg": "success",
        "/swollen.jpg": "too large",
        "/brotli.jpg": "compressed body",
        "/packed.jpg": "compressed body",
        "/drawing.jpg": "svg",
        "/answer.jpg": "json",
        "/paper.jpg": "pdf",
        "/nocontent.jpg": "http 204",
        "/small.jpg": "image too small",
        "/wide.jpg": "aspect ratio",
        "/credentials.jpg": "credentials in url",
        "/port.jpg": "bad url",
    }
)
BODIES = {path: images()[path] for path in images()} | {
    f"/jpeg/{number}.jpg": jpeg(number) for number in range(11)
}
BODIES |= {"/gzip.jpg": jpeg(910), "/deflate.jpg": jpeg(911)}
BODIES |= {"/redirect.jpg": jpeg(900), "/hops/5": images()["/redirect5.jpg"]}


def write_list(path: Path, server: Server, paths: Sequence[str], url_first: bool = False) -> Path:
    """A list as GCC-3M is published (caption, url), or as GCC-12M (url, caption)."""
    rows = [(f'"caption of {name}', server.url(name)) for name in paths]
    lines = ["\t".join(reversed(row) if url_first else row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def command(tsv: Path, out: Path, *more: object, **changed: object) -> list[str]:
    """The command of gcc.py; `changed`: values of options, by name."""
    options = OPTIONS | {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    flags = [str(text) for pair in options.items() for text in pair]
    script = REPOSITORY / "data_prep" / "gcc.py"
    return [sys.executable, str(script), "--tsv", str(tsv), "--out", str(out), *flags,
            "--allow-private-addresses", *map(str, more)]  # fmt: skip


def without_torch(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of a machine that has no torch.

    data_prep must do without it, and each process of img2dataset, which imports webdataset, which
    imports torch where there is one, starts three seconds earlier.
    """
    folders = [str(REPOSITORY / "tests/data_prep/without_torch"), environment.get("PYTHONPATH")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def run(arguments: Sequence[str], environment: Mapping[str, str] | None = None):
    """Run a command to its end, output captured; by default in an environment without torch."""
    environment = without_torch() if environment is None else environment
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=300, env=environment, check=False
    )


def run_in_own_network(code: str, addresses: Sequence[str], home: Path) -> list[str]:
    """Run Python code with the argument `home` where loopback has these addresses too; its lines.

    Skips the test where a network namespace cannot be made.
    """
    set_up = " && ".join(["ip link set lo up", *(f"ip addr add {a}/32 dev lo" for a in addresses)])
    enter = ["unshare", "--net", "sh", "-c"]
    if run([*enter, set_up]).returncode if shutil.which("unshare") else True:
        pytest.skip("a network namespace cannot be made here (unshare --net, ip)")
    script = home / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    program = ["sh", sys.executable, str(script), str(home)]
    done = run([*enter, f'{set_up} && "$@"', *program], environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def rows(out: Path) -> list[dict]:
    """Rows of the parquet files of all finished shards, with the shard number."""
    found = []
    for path in sorted((out / "shards").glob("*.parquet")):
        if path.with_name(f"{path.stem}_stats.json").exists():
            found += [row | {"shard": int(path.stem)} for row in pq.read_table(path).to_pylist()]
    return found


def kept(out: Path) -> list[tuple[int, str]]:
    """(row, sha256 of the downloaded bytes) of every image, sorted."""
    return sorted((r["row"], r["sha256"]) for r in rows(out) if r["status"] == "success")


def state(out: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and bytes of the files of finished shards."""
    done = [path.name[:5] for path in (out / "shards").glob("*_stats.json")]
    paths = (path for path in (out / "shards").iterdir() if path.name[:5] in done)
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


class Marked:
    """A command in the background whose descendants are known by a variable of the environment."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**without_torch(), MARK: self.mark},
        )

    def family(self) -> list[psutil.Process]:
        """The processes that are alive, the command itself included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait_for(self, what, seconds: float = 120):
        """Poll until `what()` is true; returns its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := what():
                return value
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.02)
        raise AssertionError("did not happen")

    def kill(self) -> None:
        """kill -9 of the command alone, then wait until all its descendants have gone."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        end = time.monotonic() + 30
        while (left := self.family()) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left, [process.cmdline() for process in left]

    def finish(self, returncode: int = 0) -> str:
        """Wait until it ends with `returncode`; returns what was printed."""
        text = self.process.communicate(timeout=300)[0]
        assert self.process.returncode == returncode, text
        return text


@contextmanager
def marked(arguments: Sequence[str]) -> Iterator[Marked]:
    """A `Marked` command; nothing of it is left afterwards."""
    command = Marked(arguments)
    try:
        yield command
    finally:
        for process in command.family():
            process.kill()
        command.process.communicate()


@dataclass
class Base:
    """An uninterrupted download of `EXPECTED`, its server still running."""

    out: Path
    tsv: Path
    server: Server
    requests: dict[str, int]
    printed: str


_bases: dict[Path, Base] = {}


def base(folder: Path) -> Iterator[Base]:
    """Body of the session fixture `base`, shared by the test modules of a session."""
    if folder not in _bases:
        folder.mkdir()
        with serve() as server:
            tsv = write_list(folder / "cc3m.tsv", server, list(EXPECTED))
            done = run(command(tsv, folder / "D"), os.environ)  # with torch, as most have it
            assert done.returncode == 0, done.stdout + done.stderr
            _bases[folder] = Base(folder / "D", tsv, server, dict(server.requests), done.stdout)
            yield _bases[folder]
        del _bases[folder]
    else:
        yield _bases[folder]
