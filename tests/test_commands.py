"""Commands run as files, `python eval/zero_shot.py`, from any folder."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_imports import OURS, files

ROOT = Path(__file__).parent.parent
COMMANDS = [
    path
    for package in ("engine", "eval", "data_prep", "models", "loaders")
    for path in files(package)
    if '\nif __name__ == "__main__":' in path.read_text()
]


def of_ours(statement):
    """Whether a statement imports a package of the repository."""
    names = [alias.name for alias in getattr(statement, "names", [])]
    names = [statement.module] if isinstance(statement, ast.ImportFrom) else names
    return any(name.split(".")[0] in OURS for name in names)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_repository_is_on_the_path_before_its_packages_are_imported(path):
    body = ast.parse(path.read_text()).body
    imports = [number for number, part in enumerate(body) if of_ours(part)]
    before = "\n".join(ast.unparse(part) for part in body[: min(imports, default=len(body))])
    assert not imports or "sys.path" in before, f"python {path.name} would not find {OURS}"


@pytest.mark.parametrize("package", ["engine", "eval", "data_prep", "models"])
def test_paths_of_arguments_may_begin_with_the_home_folder(package):
    """They are read by `loaders.specs.as_path`: a shell leaves the `~` of `--output=~/x` alone."""
    assert [path.name for path in files(package) if "type=Path" in path.read_text()] == []


def test_a_command_starts_as_a_file_from_another_folder(tmp_path):
    """The one that needs no torch: what a SLURM job does with exit code 3."""
    done = subprocess.run(
        [sys.executable, ROOT / "engine" / "signals.py", "3"],
        cwd=tmp_path, capture_output=True, text=True, env={"SLURM_JOB_ID": "1", "PATH": ""},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "")
    assert "exit code 3: the same again would not help" in done.stdout
