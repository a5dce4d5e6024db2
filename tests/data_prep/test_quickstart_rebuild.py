"""The shipped quick-start data is what its packages give: a whole rebuild.

It downloads 250 MB and draws every image, so `make test` runs it only when something that decides
the result has changed since the last rebuild that gave the shipped manifests; `make soak` always
does. rebuilt.sha256 says what that was: a rebuild that passes writes it, and it is committed.
"""

import ast
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.clipart import classes, packages
from tests import apt
from tests.test_imports import OURS, imports

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "data_prep" / "quickstart.py"
REBUILT = Path(__file__).with_name("rebuilt.sha256")


def shipped() -> list[Path]:
    """The manifests of the sets that are in the repository."""
    found = sorted((REPOSITORY / "data" / "quickstart").glob("*/manifest.json"))
    return [path for path in found if path.parent.name != "stamps"]


def parts() -> list[Path]:
    """What decides the result: the program with all that it imports, packages, names, manifests."""
    program, waiting = set(), [SCRIPT]
    while waiting:
        path = waiting.pop()
        program.add(path)
        modules = [name for name, _ in imports(path) if name.split(".")[0] in OURS]
        files = {REPOSITORY / f"{name.replace('.', '/')}.py" for name in modules}
        assert all(file.is_file() for file in files), files
        waiting += files - program
    names = [classes.PROMPTS, REPOSITORY / "requirements.txt"]
    return sorted([*program, *names, *shipped()])


def digest() -> str:
    """SHA-256 of the parts, with their paths; of programs what they do, see `acting`."""
    found = hashlib.sha256()
    for path in parts():
        content = path.read_bytes()
        content = acting(content).encode() if path.suffix == ".py" else content
        found.update(f"{path.relative_to(REPOSITORY)} {len(content)}\n".encode() + content)
    return found.hexdigest()


def acting(source: str | bytes) -> str:
    """A program without comments, docstrings and layout, which decide nothing."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            del node.body[0]
            node.body = node.body or [ast.Pass()]
    return ast.unparse(tree)


def refresh_package_lists():
    """A bare machine has no lists, and `apt-get download` then knows no package."""
    lists = Path("/var/lib/apt/lists").glob("*_Packages*")
    if os.geteuid() == 0 and shutil.which("apt-get") and not any(lists):
        with apt.alone():
            subprocess.run(["apt-get", "update", "-qq"], check=False, timeout=300)


def rebuild(tmp_path):
    """The whole build from the real packages: downloads 250 MB unless they are in the cache."""
    refresh_package_lists()
    try:
        for package in packages.SHIPPED_PACKAGES:
            packages.fetch(package, packages.default_cache())
    except packages.PackageUnavailable as error:
        pytest.skip(str(error))
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(shipped()) == 4
    for path in shipped():
        rebuilt = tmp_path / path.parent.name / "manifest.json"
        assert rebuilt.read_bytes() == path.read_bytes(), path.parent.name
    assert (tmp_path / "LICENSES" / "ATTRIBUTION.md").is_file()
    REBUILT.write_text(digest() + "\n")


@pytest.mark.soak
def test_rebuild_from_the_packages_gives_the_shipped_manifests(tmp_path):
    rebuild(tmp_path)


def test_rebuild_after_a_change_of_its_parts(tmp_path):
    if REBUILT.read_text().strip() == digest():
        pytest.skip("the same parts have already given the shipped manifests (rebuilt.sha256)")
    rebuild(tmp_path)


def test_the_parts_are_all_that_decides_the_result():
    names = {path.relative_to(REPOSITORY).as_posix() for path in parts()}
    program = {
        path.relative_to(REPOSITORY).as_posix() for path in SCRIPT.parent.glob("quickstart*")
    }
    data = {f"data/quickstart/{path.parent.name}/manifest.json" for path in shipped()}
    common = {"loaders/manifest.py", "prompts/quickstart.json", "requirements.txt"}
    assert program | data | common <= names


def test_words_about_a_part_ask_for_no_rebuild_and_its_code_does():
    source = 'def f(x):\n    """Adds one."""\n    return x + 1\n'
    assert acting(source) == acting('# Adds.\ndef f(x):\n    """Adds 1."""\n\n    return (x + 1)\n')
    assert acting(source) != acting(source.replace("+ 1", "+ 2"))
    assert acting('x = "a"') != acting('x = "b"')
