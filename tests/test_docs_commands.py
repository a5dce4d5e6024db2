"""Commands of the documents, as typed: run on small inputs, or read by their own argument parser.

A block of code in which a line begins with a command is run line by line, in a new folder that
looks like the root of the repository, with the INPUTS that the line names; `/d/` and `/tmp/` are
folders in it. An HTML comment on the line before a block says otherwise:

    <!-- docs test: not run, REASON -->    its commands are read by their parsers only
    <!-- docs test: file NAME -->          the block is a file, which later blocks use

So are commands within a text, `python x.py …` between backticks.
"""

import argparse
import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from loaders.errors import run_cli
from tests.eval import conftest as small
from tests.test_imports import OURS

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"(?:^<!-- docs test: (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
MARKS = re.compile(r"not run, .+|file [\w.]+")
# What lines of a shell begin with; blocks of other lines are pictures of folders and files.
PROGRAMS = ("python", "torchrun", "accelerate", "deepspeed", "srun", "sbatch", "make")
PROGRAMS += ("source", "for", "mkdir", "cp", "cat", "ls", "tar")
SEPARATORS = {"&&", "||", ";", "|", "&", "do", "done"}
LINKED = OURS | {"configs", "data", "ds_configs", "prompts", "slurm", "train.py"}
PLACES = re.compile(r"(?<![\w/.])/(?=(?:d|tmp)/)")  # where a document puts data
SAMPLES = 12


class Read(Exception):
    """A parser has read its arguments."""


@dataclass(frozen=True)
class Block:
    """A block of code: where it begins, what stands in it, and how it is marked."""

    where: str
    language: str
    text: str
    mark: str | None

    @property
    def lines(self) -> list[tuple[str, str]]:
        """(place, line) of every line of a shell, continued ones joined; else none."""
        document, _, start = self.where.rpartition(":")
        found, number, whole = [], int(start), ""
        for line in self.text.splitlines():
            number += 1
            whole += line.removesuffix("\\")
            if not line.endswith("\\"):
                found.append((f"{document}:{number}", whole))
                whole = ""
        shell = self.language in ("", "bash", "sh") and any(
            line.split()[:1] and line.split()[0] in PROGRAMS for _, line in found
        )
        return [(place, line) for place, line in found if line.strip()] if shell else []


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [
        Block(
            f"{document}:{text.count(chr(10), 0, found.start('language')) + 1}",
            *found.group("language", "text", "mark"),
        )
        for found in BLOCK.finditer(text)
    ]


def commands(line: str) -> list[list[str]]:
    """Words of each command of a line, without comments and the marks of `[a choice]`."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    parts = [list(words) for mark, words in itertools.groupby(lexer, SEPARATORS.__contains__)
             if not mark]  # fmt: skip
    return [[word.strip("[]") for word in words] for words in parts]


def ours(words: list[str], place: str = "") -> tuple[str, list[str]] | None:
    """(module, arguments) of a command of this repository, None for any other."""
    for i, word in enumerate(words):
        module, rest = (
            word.removeprefix("/r/").removesuffix(".py").replace("/", "."),
            words[i + 1 :],
        )
        if word == "-m" and rest:
            module, rest = rest[0], rest[1:]
        elif not word.endswith(".py"):
            continue
        if module.split(".")[0] in OURS:
            exists = (ROOT / (module.replace(".", "/") + ".py")).is_file()
            assert exists, f"{place}: there is no {module}: {' '.join(words)}"
            return module, rest
    return None


def variants(arguments: list[str]) -> list[list[str]]:
    """`{a,b}` as a word of its own means one of these."""
    choices = [
        word[1:-1].split(",") if re.fullmatch(r"\{\w+(,\w+)+\}", word) else [word]
        for word in arguments
    ]
    return [list(chosen) for chosen in itertools.product(*choices)]


def documented() -> list[tuple[str, list[str]]]:
    """(place, words) of every command of the documents: of blocks, and within texts."""
    found = []
    for document in INPUTS:
        for block in blocks(document):
            for place, line in block.lines:
                found += [(place, words) for words in commands(line)]
        text = BLOCK.sub(lambda match: "\n" * match.group().count("\n"),
                         (ROOT / document).read_text(encoding="utf-8"))  # fmt: skip
        for span in re.finditer(r"`([^`\n]+ [^`\n]+)`", text):
            first = span.group(1).split()[0]
            if first in PROGRAMS or ("/" in first and first.endswith(".py")):
                place = f"{document}:{text.count(chr(10), 0, span.start()) + 1}"
                found += [(place, words) for words in commands(span.group(1))]
    return found


def test_parsers_know_every_documented_flag(monkeypatch, capsys):
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def read(*arguments, original=original, **options):
            original(*arguments, **options)
            raise Read

        monkeypatch.setattr(argparse.ArgumentParser, name, read)
    wrong, seen = [], set()
    for place, words in documented():
        module, arguments = ours(words, place) or (None, [])
        for given in variants(arguments) if module else []:
            seen.add(module)
            monkeypatch.setattr(sys, "argv", [module, *given])
            with pytest.raises((Read, SystemExit)) as end:
                importlib.import_module(module).main()
            if end.type is SystemExit:
                said = capsys.readouterr().err.strip().splitlines()[-1]
                wrong.append(f"{place}: {' '.join(words)}\n    {said}")
    assert not wrong, "\n".join(wrong)
    assert {"data_prep.gcc", "data_prep.coco", "eval.detection", "models.export"} <= seen


def test_other_blocks_are_what_they_say():
    """Marks are spelt right; Python compiles; YAML is read."""
    for block in itertools.chain.from_iterable(map(blocks, INPUTS)):
        assert block.mark is None or MARKS.fullmatch(block.mark), (block.where, block.mark)
        if block.language == "python":
            compile(block.text, block.where, "exec")
        if block.language == "yaml":
            assert yaml.safe_load(block.text), block.where


def class_folders(folder: Path) -> None:
    """Pictures of three classes, in `train` and `test`."""
    random = np.random.default_rng(0)
    for split, (label, name), i in itertools.product(
        ("train", "test"), enumerate(("crested_tit", "wren", "rook")), range(6)
    ):
        path = folder / split / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(small.drawing(label, random))


def pairs(folder: Path) -> None:
    """Pictures with captions, and a list of bad ones."""
    random, samples = np.random.default_rng(1), []
    for i in range(SAMPLES):
        caption = f"a {'dog' if i % 3 else 'cat'} number {i}"
        samples.append({"png": small.drawing(i % 3, random), "txt": caption})
    small.write_set(folder, "image_text", samples)
    (folder / "bad_samples.tsv").write_text(f"{keys()[0]}\n")


def keys() -> list[str]:
    """Keys of the samples of `pairs`."""
    half = SAMPLES // 2 + 1
    return [f"{i // half:05d}{i % half:04d}" for i in range(SAMPLES)]


def rewrites(path: Path) -> None:
    """A table of four texts a sample."""
    rows = [{"key": key, "rewrites": [f"{key} {i}" for i in range(4)]} for key in keys()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arrays(folder: Path) -> None:
    """An array for each sample."""
    folder.mkdir()
    for key in keys():
        np.save(folder / f"{key}.npy", np.ones((2, 8), np.float16))


# What lines may name: by document, and by path in the new folder, what makes it.
INPUTS = {
    "docs/data.md": {"d/gcc3m": pairs, "rewrites.jsonl": rewrites, "FOLDER": arrays},
    "docs/evaluation.md": {
        "RUN": lambda path: small.write_run(path, seed=0), "birds": class_folders, "pairs": pairs,
    },
}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A new folder as working folder, with links to the packages, configurations and data."""
    for name in LINKED:
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    for name in ("d", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def prepare(text: str, document: str) -> None:
    """Make the inputs that a text names and that are not there."""
    for name, make in INPUTS[document].items():
        named = re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", text)
        if named and not Path(name).exists():
            make(Path(name))


def run(place: str, line: str, monkeypatch, capfd) -> None:
    """A line as a shell runs it; a command of ours within this process, which has all imported."""
    found = commands(line)
    module, _ = (ours(found[0], place) if len(found) == 1 else None) or (None, [])
    # The shell takes quotes, patterns and comments away, and leaves the words of the command.
    script = f"set -- {line}\nprintf '%s\\0' \"$@\"" if module else line
    shell = subprocess.run(["bash", "-ec", script], capture_output=True, text=True)
    code, said = shell.returncode, shell.stdout + shell.stderr
    if module and not code:
        words = shell.stdout.split("\0")[:-1]
        monkeypatch.setattr(sys, "argv", [module, *ours(words, place)[1]])
        try:
            run_cli(importlib.import_module(module).main)
        except SystemExit as end:
            code = end.code or 0
        said = "".join(capfd.readouterr())
    assert code == 0, f"{place}: {line}\n{said}\nmark the block, or add what it needs to INPUTS"


@pytest.mark.parametrize("document", INPUTS)
def test_blocks_run_as_typed(document, home, monkeypatch, capfd):
    ran = 0
    for block in blocks(document):
        if (block.mark or "").startswith("file "):
            prepare(block.text, document)
            Path(block.mark.removeprefix("file ")).write_text(block.text)
        for place, line in block.lines if block.mark is None else ():
            prepare(line, document)
            run(place, PLACES.sub(f"{home}/", line), monkeypatch, capfd)
            ran += 1
    assert ran > 3
