"""Commands run as files, `python eval/zero_shot.py`, from any folder."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_imports import OURS, files

ROOT = Path(__file__).parent.parent
COMMANDS = [
    path
    for package in ("engine", "eval", "data_prep", "models", "loaders", "studies")
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


@pytest.mark.parametrize("package", ["engine", "eval", "data_prep", "models", "studies"])
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


def wrong_ones(folder):
    """(module, arguments, exit code, words of the message): what a person gets wrong."""
    given = [
        "--checkpoint",
        str(folder / "run"),
        "--output",
        str(folder),
        "--data-root",
        str(folder),
    ]
    for name, absent, there in (
        ("zero_shot", "imagenet1k", "openclipart_classes"),
        ("linear_probe", "imagenet1k", "openclipart_classes"),
        ("finetune", "cifar-10", "openclipart_classes"),
        ("retrieval", "flickr30k_1k", "openclipart_captions"),
        ("knn", "cifar-10", None),  # no shipped set lists it
    ):
        command = f"eval.{name}"
        yield command, [*given, "--datasets", "cifar"], 2, "did you mean"
        yield command, [*given, "--datasets", absent], 3, f"{absent}: {folder}"
        if there:
            yield command, [*given, "--datasets", there], 3, f"{folder / 'run'}: no such file or"
    few = ["--checkpoint", str(folder), "--output", str(folder), "--evaluate", "zeroshot"]
    yield "eval.several", few, 2, "it begins with one of zero_shot, linear_probe"
    sets = ["--checkpoint", str(folder), "--val", "-", "--output", str(folder)]
    yield "eval.detection", [*sets, "--train", str(folder)], 3, "make the set with data_prep/coco"
    encoders = ["--encoder", "x", "--text-encoder", str(folder), "--data", str(folder / "none")]
    yield "eval.reference", [*encoders, "--output", str(folder)], 2, "name a new folder"
    yield "eval.reference", [*encoders, "--output", str(folder / "new")], 3, "shards are missing"
    run = ["--config", "tests/engine/tiny.yaml", "train.steps=1", "--output-dir", str(folder)]
    none = folder / "none"
    yield "train", [*run, f"data.image_label={none}"], 3, f"data.image_label: {none}: 1 of 1 shards"
    model = ["--checkpoint", str(none), "--format", "pt", "--output", str(folder / "new")]
    yield "models.export", model, 3, f"{none}: no such file or folder"
    given = ["--checkpoint", str(folder / "run"), str(folder / "none.png")]
    yield "eval.predict", given, 2, "give --classes to name what pictures show"
    yield "eval.predict", [*given, "--classes", "a"], 2, "two names or more"
    yield "eval.predict", [*given, "--classes", "a, b"], 3, f"{folder / 'run'}: no such file or"
    given[1] = str(folder)
    yield "eval.predict", [*given, "--classes", "a, b"], 3, "none.png: no such file or folder"
    given = ["--checkpoint", str(folder), "--format", "pt", "--output", str(folder / "out")]
    yield "models.export", [*given, "--push-to-hub", "me/x"], 2, "needs --license"
    yield "eval.tables", [str(folder / "none")], 3, "holds no result rows"
    places = ["--results", str(folder / "none"), "--output", str(folder)]
    yield "eval.plots", ["--runs", str(folder), *places], 3, "holds no result rows"
    page = ["--output", str(folder), "--checkpoint", str(folder / "run"), "--data"]
    yield "eval.explore", [*page, str(folder / "none")], 3, "no data set; --data takes"
    twemoji = str(ROOT / "data/quickstart/emoji_twemoji")
    yield "eval.explore", [*page, twemoji], 3, f"{folder / 'run'}: no such file or"
    page = [*page, twemoji, "--checkpoint", *["run"] * 3]
    yield "eval.explore", page, 2, "3 given, side by side fit two"
    places = [str(folder / "none"), "--output", str(folder)]
    yield "data_prep.report", places, 3, "none"
    (folder / "study.yaml").write_text("name: x\nseed: [0]\n")
    for name in ("studies.run", "studies.report"):
        yield name, [str(folder / "study.yaml")], 2, "unknown key 'seed'; the nearest is 'seeds'"
        yield name, [str(folder / "none.yaml")], 2, "cannot read configuration"
    for form in ("md", "tex", "csv", "html"):
        yield "eval.tables", [str(folder), "--format", form], 0, "mean per class"


def test_commands_answer_before_they_load_torch(tmp_path):
    """Help, wrong flags, wrong names and missing folders; and tables of any text format. torch
    and DeepSpeed take ten seconds and more; what is left takes a fraction of one."""
    row = {"dataset": "emoji_twemoji", "task": "zero_shot", "metric": "mean_per_class", "n": 9}
    row |= {"run": "a", "config_name": "a", "checkpoint_hash": "b", "step": 1, "classes": 3}
    row |= {"value": 50.0, "ci95": [40.0, 60.0], "protocol": "c", "prompt_digest": "d"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    commands = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in COMMANDS
        if path.parent.name in ("eval", "data_prep", "models", "studies")
    ]
    assert len(commands) > 20
    cases = [("eval.in_training", None, 0, "")]
    cases += [
        (name, ["--help"], 0, "usage: ") for name in ("train", "engine.dist_check", *commands)
    ]
    cases += [(name, ["--no-such"], 2, "error: ") for name in commands]
    cases += wrong_ones(tmp_path)
    # The method of a whole configuration comes with torch, but DeepSpeed waits for the data.
    run = ["--config", "tests/engine/tiny.yaml", "train.steps=1", "evals.every_steps=1"]
    run += ["evals.tasks={zero_shot: [imagenet1k]}", "--output-dir", str(tmp_path)]
    last = ("train", run, 3, "imagenet1k: ")
    cases += [last]
    done = subprocess.run(
        [sys.executable, "-m", "tests.start_up"], cwd=ROOT, capture_output=True, text=True,
        input=json.dumps([case[:2] for case in cases]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for case, (code, text, loaded) in zip(cases, json.loads(done.stdout), strict=True):
        wanted = (case[2], ["torch"] if case is last else [])
        assert (code, loaded) == wanted, (*case[:2], text)
        assert case[3] in text, (*case[:2], text)


@pytest.mark.parametrize("name", ["evaluation", "gpu_step", "scaling_model"])
def test_help_of_a_benchmark_needs_no_torch(name):
    """On a machine without it; the first are answered for all by the package itself."""
    parents = [str(ROOT / "tests/data_prep/without_torch"), str(ROOT)]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--help"],
        cwd=ROOT, env={"PYTHONPATH": os.pathsep.join(parents)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m benchmarks.{name} [-h] [--")
    for path in (ROOT / "benchmarks").glob("*.py"):
        called = re.findall(r'^ +(?:harness|gpu)\.main\("(\w+)", ', path.read_text(), re.MULTILINE)
        assert called in ([], [path.stem]), "benchmarks/__init__.py goes by this name"


@pytest.mark.parametrize("installed", [False, True])
def test_a_chain_without_slurm_says_so_in_a_sentence(installed, tmp_path):
    """No `sbatch`, or a controller that does not answer."""
    for tool in ("dirname", "grep", "sed"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    if installed:
        for tool in ("sbatch", "scontrol"):
            (tmp_path / tool).write_text("#!/bin/sh\necho Slurmctld is DOWN\nexit 1\n")
            (tmp_path / tool).chmod(0o755)
    done = subprocess.run(
        [shutil.which("bash"), "slurm/chain.sh", "configs/quickstart_unicl.yaml", tmp_path / "run",
         "--evaluate", "slurm/quickstart_evaluate.txt"],
        cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    reason = "Slurmctld is DOWN" if installed else "sbatch is not found"
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"error: no SLURM answers here ({reason}): submit from a login")
    assert done.stderr.count("\n") == 1
