"""One run of img2dataset as a child process: start it, watch it, take over its finished shards.

The child writes to a folder of its own, seeded with an empty `_stats.json` for every shard that
it shall not fetch (that is what img2dataset skips by). A shard is moved to the set as soon as it
is complete: its statistics are whole, and its tar and its parquet hold what they say.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.download import url_list
from data_prep.download.reasons import DNS, SUCCESS, reason_group
from data_prep.sets import set_folder
from loaders.errors import ConfigError, DataError
from loaders.progress import Progress
from loaders.tarreader import iterate_members

CHILD = Path(__file__).with_name("img2ds_child.py")
_POLL_SECONDS = 0.2
# Until the first download the child imports its packages, which takes long on a busy disk.
_START_SECONDS = 180
_STATS = re.compile(r"(\d{5,})_stats\.json")
_TAIL_BYTES = 1 << 14
_TAIL_LINES = 30
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_SAYS_DISK_FULL = re.compile("|".join(rf"Errno {e}\]|{os.strerror(e)}" for e in DISK_FULL))


class Launch:
    """One start of img2dataset for the shards `todo`.

    `home`: folder to work in, not there yet. `rows`: rows of each shard of the list. `options`:
    `options.Options`. `bar`: progress over the rows of the part. `before`: rows of the part that
    were fetched before, by reason group.
    """

    def __init__(
        self,
        out: Path,
        home: Path,
        todo: Sequence[int],
        rows: Sequence[int],
        options,
        bar: Progress,
        before: Counter,
    ) -> None:
        self.out, self.home, self.rows, self.options, self.bar = out, home, rows, options, bar
        self.todo = set(todo)
        self.output, self.ready = home / "shards", home / "ready"
        self.started = home / "started"  # grows by a byte for each image begun
        self.staged = 0  # bytes of the largest unfinished tar, when the disk is full
        self.problems: list[str] = []
        self._first_row = bar.total - sum(rows[shard] for shard in todo)
        self._fetched, self._reasons = 0, Counter(before)
        self._printed = b""

    def run(self) -> str:
        """Fetch until nothing is left to do or img2dataset gives up; says why it ended.

        Raises OSError (ENOSPC, EDQUOT) when the disk is full. Leaves nothing running.
        """
        try:
            with _child(self._prepare()) as child:
                reason = self._watch(child)
        except OSError as error:
            if error.errno in DISK_FULL and self.output.is_dir():
                self._rescue()
            raise
        finally:
            shutil.rmtree(self.home, ignore_errors=True)
        return "; ".join([*self.problems, reason])

    def tail(self) -> str:
        """The last lines that img2dataset printed."""
        lines = re.split(r"[\r\n]+", self._printed.decode(errors="replace"))
        return "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:] if line.strip())

    def _prepare(self) -> Path:
        """Lay out the folder; returns the path of the child's configuration."""
        for path in (self.output, self.ready, self.home / "list"):
            path.mkdir(parents=True)
        index = url_list.read_index(self.out)
        for entry in index["files"]:  # not a file that an unfinished append left behind
            (self.home / "list" / entry["file"]).symlink_to(
                (self.out / set_folder.LIST / entry["file"]).resolve()
            )
        for shard in set(range(len(self.rows))) - self.todo:
            (self.output / f"{set_folder.shard_name(shard)}_stats.json").touch()
        config = self.home / "config.json"
        config.write_text(json.dumps(self._config(index["columns"])), encoding="utf-8")
        return config

    def _config(self, columns: Sequence[str]) -> dict:
        options = self.options
        shared = {
            "user_agent_token": options.user_agent_token,
            "disallowed_header_directives": list(options.disallowed_header_directives),
        }
        img2dataset = {
            "url_list": str((self.home / "list").resolve()),
            "input_format": "parquet",
            "url_col": "url",
            "caption_col": "caption" if "caption" in columns else None,
            "save_additional_columns": [c for c in columns if c not in ("url", "caption")],
            "output_folder": str(self.output.resolve()),
            "output_format": "webdataset",
            "number_sample_per_shard": set_folder.load(self.out).samples_per_shard,
            "processes_count": min(options.processes, len(self.todo)),
            "thread_count": options.threads,
            "image_size": options.image_size,
            "resize_mode": "keep_ratio",
            "resize_only_if_bigger": True,
            "encode_format": "jpg",
            "encode_quality": options.encode_quality,
            "min_image_size": options.min_image_size,
            "max_aspect_ratio": options.max_aspect_ratio,
            "compute_hash": "sha256",
            "timeout": options.timeout,
            "retries": options.retries,
            "incremental_mode": "incremental",
        }
        settings = {
            "image_seconds": options.image_seconds,
            "max_image_bytes": options.max_image_bytes,
            "max_image_pixels": options.max_image_pixels,
            "allow_private_addresses": options.allow_private_addresses,
            "local_root": options.local_root and str(options.local_root),
            "started": str(self.started.resolve()),
        }
        return {"img2dataset": img2dataset | shared, "settings": settings | shared}

    def _watch(self, child: subprocess.Popen) -> str:
        """Take over shards until none is left, the child has ended, or it does nothing more."""
        last, since = None, time.monotonic()
        while True:
            ended = child.poll()  # before looking for shards: what it wrote last is then seen
            self._listen(child)
            complete, state = self._look()
            for shard in complete:
                self._take_over(shard)
            if not self.todo:
                self.bar.update(self._first_row + self._fetched - self.bar.n)
                return "finished"
            if ended is not None:
                return f"img2dataset ended with code {ended}, shards {some(self.todo)} missing"
            now = time.monotonic()
            if state != last:
                last, since = state, now
            begun = state[0] > 0
            limit = self.options.stall_minutes * 60
            if now - since > (limit if begun else max(limit, _START_SECONDS)):
                return (
                    f"nothing was downloaded for {(now - since) / 60:.1f} minutes (a worker that "
                    "was killed, by a lack of memory for example, is never replaced)"
                )
            time.sleep(_POLL_SECONDS)

    def _listen(self, child: subprocess.Popen) -> None:
        """Read what the child printed; raise an OSError if it met a full disk."""
        text = child.stdout.read() or b""
        self._printed = (self._printed + text)[-_TAIL_BYTES:]
        if text and _SAYS_DISK_FULL.search(self._printed.decode(errors="replace")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _look(self) -> tuple[list[int], tuple[int, ...]]:
        """Shards that seem complete, and a state that changes with every sign of life."""
        complete, written = [], 0
        with os.scandir(self.output) as entries:
            for entry in entries:
                if entry.name.endswith((".tar", ".parquet")):
                    written += entry.stat().st_size
                elif match := _STATS.fullmatch(entry.name):
                    complete += {int(match[1])} & self.todo
        begun = self.started.stat().st_size if self.started.exists() else 0
        row = self._first_row + max(self._fetched, begun)
        self.bar.update(min(row, self.bar.total) - self.bar.n)
        return sorted(complete), (begun, len(self.todo), written)

    def _rescue(self) -> None:
        """Take over what is complete on a full disk, after making room by what is not."""
        complete, _ = self._look()
        for path in self.output.glob("*.*"):
            if path.suffix in (".tar", ".parquet") and int(path.stem) not in complete:
                self.staged = max(self.staged, path.stat().st_size)
                os.truncate(path, 0)  # a killed worker may hold it open for a moment more
                path.unlink()
        for shard in complete:
            self._take_over(shard)

    def _take_over(self, shard: int) -> None:
        """Check a shard and move it to the set, unless its statistics are still being written."""
        name = set_folder.shard_name(shard)
        try:
            stats = json.loads((self.output / f"{name}_stats.json").read_bytes())
        except ValueError:
            return
        problem = check_shard(self.output, shard, stats, self.rows[shard])
        if problem:
            self.problems.append(problem)
            self.todo.remove(shard)
            return
        # A copy: img2dataset's logger may be about to read the original. It comes first, because
        # it needs room on the disk.
        shutil.copyfile(self.output / f"{name}_stats.json", self.ready / f"{name}_stats.json")
        for end in (".tar", ".parquet"):
            os.replace(self.output / f"{name}{end}", self.ready / f"{name}{end}")
        set_folder.publish(self.out, shard, self.ready)
        self.todo.remove(shard)
        self._fetched += stats["count"]
        self._reasons += count_reasons([stats])
        total = self._reasons.total()
        kept, dns = (f"{self._reasons[group] / total:.1%}" for group in (SUCCESS, DNS))
        self.bar.set_postfix(kept=kept, dns_errors=dns, refresh=False)


@contextmanager
def _child(config: Path) -> Iterator[subprocess.Popen]:
    """img2dataset in a session of its own, which is killed at the end with all its processes."""
    child = subprocess.Popen(
        [sys.executable, "-P", CHILD, config],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        start_new_session=True,
        env={**os.environ, "IMG2DS_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1"},
    )
    os.set_blocking(child.stdout.fileno(), False)
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()


def check_path(out: Path) -> None:
    """Raise `ConfigError` for a folder that img2dataset cannot write to because of its name."""
    path = str(out.resolve())
    if set("*?[]") & set(path) or "::" in path:
        raise ConfigError(
            f"{out}: img2dataset reads *, ?, [, ] and :: in a path as a pattern; name a folder "
            "without them"
        )


def some(shards: Iterable[int]) -> str:
    """The first numbers of a set of shards, for a message."""
    numbers = sorted(shards)
    return ", ".join(map(str, numbers[:10])) + (
        f" and {len(numbers) - 10} more" * (len(numbers) > 10)
    )


def count_reasons(statistics: Iterable[dict]) -> Counter:
    """Rows by reason group over the statistics of shards."""
    groups: Counter = Counter()
    for stats in statistics:
        for message, n in stats["status_dict"].items():
            groups[reason_group(message)] += n
    return groups


def check_shard(home: Path, shard: int, stats: dict, rows: int) -> str | None:
    """What is wrong with a shard that img2dataset says is complete; None if nothing is."""
    name = set_folder.shard_name(shard)
    try:
        members = [member.name for member in iterate_members(home / f"{name}.tar")]
        images = sum(member.endswith(".jpg") for member in members)
        stored = pq.read_metadata(home / f"{name}.parquet").num_rows
        facts = {
            "rows in the list": (rows, stats["count"]),
            "rows in the parquet": (stored, stats["count"]),
            "reasons": (sum(stats["status_dict"].values()), stats["count"]),
            "images in the tar": (images, stats["successes"]),
        }
    except (DataError, OSError, pa.ArrowException, KeyError) as error:
        return f"shard {name} is damaged ({error})"
    wrong = [f"{a} {what}, {b} stated" for what, (a, b) in facts.items() if a != b]
    return f"shard {name} is damaged ({'; '.join(wrong)})" if wrong else None
