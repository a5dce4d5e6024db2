"""Downloads through data_prep/download/img2ds.py, against img2dataset alone.

All fetch the same list from the same server on loopback with the same parameters, in turns. The
wrapper's processes start without torch, which webdataset imports where it is installed; so that
this gain does not hide a cost, img2dataset is also run where torch cannot be imported. Compared
are the wall time of whole runs and the processor time of all their processes, which other work on
the machine disturbs less.
"""

import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks import harness
from data_prep.download import url_list
from data_prep.download.list_rows import Row
from data_prep.download.options import Options, identity
from data_prep.sets import set_folder

REPOSITORY = Path(__file__).resolve().parent.parent
PHOTOS = 200  # different images; the rows ask for them under different addresses
TARGET = 1.05
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_WRAPPED = """
import sys
from pathlib import Path
from data_prep.download import img2ds
from data_prep.download.options import Options
options = Options(
    processes=int(sys.argv[2]), threads=int(sys.argv[3]), allow_private_addresses=True
)
img2ds.download(Path(sys.argv[1]), 0, 1, options)
"""


def rows(quick: bool = False) -> Iterator[dict]:
    """Median over rounds of wrapper / bare, by wall time and by processor time."""
    count, size, rounds = (1_000, 250, 1) if quick else (14_000, 1_000, 3)
    processes, threads = len(os.sched_getaffinity(0)), 16
    load = round(os.getloadavg()[0], 1)
    names = ["wrapper", "img2dataset", "img2dataset_without_torch"]
    seconds: dict[str, dict[str, list[float]]] = {
        what: {name: [] for name in names} for what in ("wall", "processor")
    }
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # to count processes that were killed too
    with tempfile.TemporaryDirectory() as scratch, _server() as address:
        (Path(scratch) / "torch.py").write_text("raise ModuleNotFoundError('hidden')")
        for number in range(rounds):
            for name in names[number % 3 :] + names[: number % 3]:
                out = Path(scratch) / f"{name}-{number}"
                _write_list(out, address, count, size)
                run = _run_wrapper if name == "wrapper" else _run_bare
                path = scratch if name.endswith("torch") else ""
                for what, value in run(out, count, size, processes, threads, path).items():
                    seconds[what][name].append(round(value, 2))
    facts = {"rows": count, "samples_per_shard": size, "processes": processes, "threads": threads}
    facts |= {"rounds": rounds, "img2dataset": version("img2dataset"), "load_before": load}
    for what, measured in seconds.items():
        for peer in names[1:]:
            value = harness.ratio(measured, "wrapper", peer)
            yield harness.row(f"{what}_over_{peer}", value, TARGET, seconds=measured, **facts)


@contextmanager
def _server() -> Iterator[str]:
    """The test server in a process of its own, its images made; gives its address."""
    script = REPOSITORY / "tests" / "data_prep" / "http_server.py"
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        address = process.stdout.readline().strip()
        for number in range(PHOTOS):
            urllib.request.urlopen(f"{address}/photo/{number}.jpg").read()
        yield address
    finally:
        process.stdin.close()
        process.wait()


def _write_list(out: Path, address: str, count: int, size: int) -> None:
    """Begin a set whose list has `count` addresses."""
    out.mkdir()
    source = out.with_suffix(".txt")
    source.write_text(address)
    url_list.build(
        out,
        lambda notes: (
            Row(row, f"{address}/photo/{row % PHOTOS}.jpg?{row}", f"caption {row}", b"")
            for row in range(count)
        ),
        [source],
        {},
        size,
    )
    set_folder.begin(
        out,
        set_folder.Preparation(
            tool="benchmarks/data_prep_download.py",
            name="benchmark",
            kind="image_text",
            source="loopback",
            license="none",
            date=date.today().isoformat(),
            shards=-(-count // size),
            samples_per_shard=size,
            attempted=count,
            identity=identity(Options(), size),
        ),
    )


def _run_wrapper(out: Path, count: int, size: int, processes: int, threads: int, path: str):
    command = [sys.executable, "-c", _WRAPPED, str(out), str(processes), str(threads)]
    return _timed(command, out / set_folder.SHARDS, count, path)


def _run_bare(out: Path, count: int, size: int, processes: int, threads: int, path: str):
    """img2dataset's own command with the parameters that the wrapper gives it."""
    options = Options()
    flags = {
        "url_list": out / set_folder.LIST,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": '["row"]',
        "output_folder": out / "bare",
        "output_format": "webdataset",
        "number_sample_per_shard": size,
        "processes_count": processes,
        "thread_count": threads,
        "image_size": options.image_size,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "encode_quality": options.encode_quality,
        "compute_hash": "sha256",
        "timeout": options.timeout,
        "retries": options.retries,
        "user_agent_token": options.user_agent_token,
    }
    command = [sys.executable, "-m", "img2dataset.main"]
    command += [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    return _timed(command, out / "bare", count, path)


def _timed(command: list[str], shards: Path, count: int, path: str) -> dict[str, float]:
    """Seconds of a command that fetches all images; `path` comes first when it imports."""
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    environment["PYTHONPATH"] = f"{path}:{REPOSITORY}" if path else str(REPOSITORY)
    before, start = _processor_seconds(), time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    stats = [json.loads(path.read_bytes()) for path in shards.glob("*_stats.json")]
    if done.returncode or sum(shard["successes"] for shard in stats) != count:
        raise RuntimeError(f"not all images were fetched:\n{done.stdout}\n{done.stderr}")
    return {"wall": wall, "processor": _processor_seconds() - before}


def _processor_seconds() -> float:
    """User and system seconds of all children that have ended, theirs included."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass  # orphans that came to us
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    harness.main("data_prep_download", rows)
