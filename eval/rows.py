"""Result rows: one JSON object per number, in files that are replaced as a whole."""

import fcntl
import hashlib
import json
import os
import subprocess
from pathlib import Path

from eval.sources.registry import REPOSITORY
from loaders.errors import DataError

LOCK = ".rows.lock"  # held while a file of the folder is rewritten


def prompt_digest(texts: list[str], templates: list[str]) -> str:
    """SHA-256 over the class texts and templates, in their order."""
    return hashlib.sha256(json.dumps([texts, templates]).encode()).hexdigest()


def git_hash() -> str:
    """Commit of the repository; "unknown" outside a git checkout."""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_rows(path: Path) -> list[dict]:
    """Rows of one .jsonl file; a line that is not JSON raises DataError with its number."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
    return rows


def write_rows(folder: Path, rows: list[dict]) -> Path:
    """Put `rows` into FOLDER/<run>_<task>.jsonl by atomic rename and return its path.

    Rows there with the same run, checkpoint hash, data set, task and prompts are replaced. Those
    of other prompts stay beside them: the two protocols of ImageNet are two results. Commands that
    run at the same time, as tasks of an array do, wait for one another.
    """
    path = folder / f"{rows[0]['run']}_{rows[0]['task']}.jsonl"

    def key(row: dict) -> tuple:
        names = ("run", "checkpoint_hash", "dataset", "task", "prompt_digest")
        return tuple(row[name] for name in names)

    replaced = {key(row) for row in rows}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = [r for r in read_rows(path) if key(r) not in replaced] if path.exists() else []
        partial_file = path.with_suffix(f".{os.getpid()}.tmp")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*kept, *rows])
        partial_file.write_text(text, encoding="utf-8")
        os.replace(partial_file, path)
    return path
