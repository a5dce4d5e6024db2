"""train.py as people start it: kill and continue, and every refusal before training."""

import contextlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib

import psutil
import pytest
from PIL import Image
from safetensors.numpy import load_file

from loaders.manifest import write_manifest
from tests import commands
from tests.commands import CONFIG, ROOT
from tests.multiprocess import free_port


def command(*arguments, ranks=1):
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        launcher += ["--master_port", str(free_port())]
    return [*launcher, "train.py", "--config", CONFIG, *arguments]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def start(*arguments, ranks=1, timeout=240, path=""):
    """A fresh interpreter, or a real torchrun: `tests.commands.train` does the same for less."""
    return subprocess.run(
        command(*arguments, ranks=ranks), cwd=ROOT, env=environment() | {"PYTHONPATH": str(path)},
        timeout=timeout, capture_output=True, text=True, check=False,
    )  # fmt: skip


# Python imports a module of this name by itself; what it holds goes when Python ends.
SIGNAL_AT_THE_END = """
import os, signal

class Last:
    def __del__(self, kill=os.kill, own=os.getpid(), number=signal.SIGUSR1, now=os.getpid):
        if now() == own:
            kill(own, number)

last = Last()
"""


def trace(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    keys = ("step", "samples", "loss", "floor", "lr", "scale", "grad_norm", "mean_positives")
    return [{key: json.loads(line)[key] for key in keys} for line in lines]


def interrupt(folder, arguments, after, number):
    """Start a 2-rank run and send a signal to the ranks once `after` steps are logged."""
    process = subprocess.Popen(
        command(*arguments, ranks=2), cwd=ROOT, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    metrics = folder / "metrics.jsonl"
    deadline = time.time() + 200
    while time.time() < deadline:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= after:
            break
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.05)
    # torchrun starts its ranks in sessions of their own: reach ranks and data workers one by one.
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)
    process.wait(timeout=120)
    psutil.wait_procs(family, timeout=60)


@pytest.mark.soak
def test_killed_run_continues_to_the_last_bit(tmp_path):
    """30 steps on 2 ranks = 15 and more, kill -9, same command: same trace, same weights.

    As tests/kill does it twenty times, but under torchrun.
    """
    settings = ["train.steps=30", "log.save_every_steps=15", "--output-dir"]
    whole = start(*settings, str(tmp_path / "whole"), ranks=2)
    assert whole.returncode == 0, whole.stderr[:3000]

    cut = [*settings, str(tmp_path / "cut")]
    interrupt(tmp_path / "cut", cut, after=18, number=signal.SIGKILL)
    assert (tmp_path / "cut/checkpoints/LAST_GOOD").read_text() == "step_0000015\n"
    resumed = start(*cut, ranks=2)
    assert resumed.returncode == 0, resumed.stderr[:3000]
    assert "after step 15" in resumed.stdout

    expected, actual = trace(tmp_path / "whole"), trace(tmp_path / "cut")
    assert [r["step"] for r in expected] == list(range(1, 31))
    assert actual == expected  # floats compared to the last bit
    assert len({r["loss"] for r in expected}) == 30
    name = "checkpoints/step_0000030/model.safetensors"
    first, second = (load_file(tmp_path / run / name) for run in ("whole", "cut"))
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first)


def test_terminated_run_saves_at_the_step_edge_and_refuses_another_configuration(tmp_path):
    """And goes on with another number of ranks by the same command; USR1 at the exit of a run that
    is finished is no failure."""
    settings = ["log.save_every_steps=1000", "--output-dir", str(tmp_path), "train.steps=400"]
    interrupt(tmp_path, settings, after=3, number=signal.SIGTERM)
    last = (tmp_path / "checkpoints/LAST_GOOD").read_text().strip()
    assert json.loads((tmp_path / f"checkpoints/{last}/run.json").read_text())["step"] >= 3
    other = commands.train(*settings, "seed=1", ranks=2, kill_on_bad_exit=True)
    assert other.returncode == 3
    assert "belongs to another configuration" in other.stderr
    assert "seed: checkpoint 0, now 1" in other.stderr
    step = int(last.removeprefix("step_"))
    (tmp_path.parent / "sitecustomize.py").write_text(SIGNAL_AT_THE_END)
    single = start(*settings[:-1], f"train.steps={step + 2}", path=tmp_path.parent)
    assert single.returncode == 0, single.stderr[-3000:]
    assert f"after step {step}" in single.stdout
    assert [line["step"] for line in trace(tmp_path)] == [*range(1, step + 3)]


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    result = commands.train(
        "train.steps=5", "train.accumulation=2", "--dry-run", "--output-dir", str(tmp_path / "o")
    )
    assert result.returncode == 0, result.stderr
    assert "global batch 8 = 1 ranks x 2 micro-batches x 4" in result.stdout
    assert "4 image_label, 4 image_text" in result.stdout
    assert not (tmp_path / "o").exists()


def jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "JPEG")
    return buffer.getvalue()


def data_set(folder, samples, kind="image_label", names=("cat", "dog")):
    """A labelled (or captioned) data set of one shard; a sample is a dict of members."""
    (folder / "shards").mkdir(parents=True)
    with tarfile.open(folder / "shards" / "00000.tar", "w") as tar:
        for number, members in enumerate(samples):
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    classes = [{"id": i, "synset": None, "names": [n] if n else []} for i, n in enumerate(names)]
    write_manifest(
        folder, "broken", kind, classes, source="test", license="none", date="2026-01-01",
        attempted=len(samples),
    )  # fmt: skip
    return folder


def labelled(count, label=b"1"):
    return [{"jpg": jpeg(), "cls": label} for _ in range(count)]


def truncated(folder):
    path = data_set(folder, labelled(10)) / "shards" / "00000.tar"
    path.write_bytes(path.read_bytes()[:3000])
    return folder


def empty(folder):
    path = data_set(folder, labelled(10)) / "shards" / "00000.tar"
    path.write_bytes(b"")
    return folder


def without_classes(folder):
    data_set(folder, labelled(10))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "classes": []}))
    return folder


def changed(folder, change):
    data_set(folder, labelled(10))
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


REFUSED_DATA = {
    "missing shard": (
        lambda f: f"{data_set(f, labelled(10))}/shards/{{00000..00003}}.tar", "00001.tar"),
    "missing folder": (lambda f: f / "nowhere", "nowhere"),
    "truncated tar": (truncated, "00000.tar"),
    "empty tar": (empty, "00000.tar"),
    "label outside the table": (
        lambda f: changed(f, lambda m: m["classes"].pop()), "000000000.*1|1.*000000000"),
    "class without a name": (
        lambda f: changed(f, lambda m: m["classes"][1].update(names=[])), "name"),
    "no classes": (without_classes, "class"),
    "fewer samples than a batch": (lambda f: data_set(f, labelled(2)), "fewer than"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_DATA)
def test_bad_data_is_refused_before_training(tmp_path, case):
    from engine import build, config
    from loaders.errors import DataError

    make, words = REFUSED_DATA[case]
    spec = str(make(tmp_path / "data"))
    cfg = config.load(CONFIG, ["train.steps=2", f"data.image_label='{spec}'"])
    with pytest.raises(DataError, match=words):
        build.plan(cfg, world_size=1)


def test_exit_codes_of_usage_and_data(tmp_path):
    wrong_key = start("train.step=5")
    assert (wrong_key.returncode, wrong_key.stdout) == (2, "")
    assert "nearest is 'train.steps'" in wrong_key.stderr
    no_data = commands.train("train.steps=5", f"data.image_label={tmp_path}/none")
    assert no_data.returncode == 3
    assert f"{tmp_path}/none" in no_data.stderr


def huge_png():
    """A 20,000 x 20,000 PNG: big to decode, small to store."""
    png = b"\x89PNG\r\n\x1a\n"
    for body in (
        b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(bytes(60001) * 10),
        b"IEND",
    ):
        png += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png


BAD = [
    {"jpg": b"<html>404</html>", "txt": b"a page"}, {"jpg": b"", "txt": b"nothing"},
    {"png": huge_png(), "txt": b"a bomb"}, {"jpg": jpeg(), "txt": b"  "},
    {"jpg": jpeg(), "txt": b"\xff\xfe\xfa"}, {"jpg": jpeg()[:-10], "txt": b"half"},
]  # fmt: skip


def test_unreadable_samples_are_counted_and_fatal_only_above_the_threshold(tmp_path):
    good = [{"jpg": jpeg(), "txt": b"a red square"} for _ in range(10)]
    captions = data_set(tmp_path / "captions", [*good, *BAD], kind="image_text", names=())
    source = [f"data.image_text={captions}", "data.workers=0"]
    tolerant = commands.train(
        "train.steps=4", *source, "data.max_bad_fraction=1", "--output-dir", str(tmp_path / "a")
    )
    assert tolerant.returncode == 0, tolerant.stderr[:3000]
    lines = (tmp_path / "a/metrics.jsonl").read_text().splitlines()
    # 16 caption samples in 4 batches of 4: one pass, each bad one met once at least.
    met = sum(json.loads(line)["bad_samples"] for line in lines)
    assert met >= len(BAD)
    head, *listed = [
        line.split("\t") for line in (tmp_path / "a/bad_samples.tsv").read_text().splitlines()
    ]
    assert head == ["source", "shard", "key", "reason", "step"]
    assert len(listed) == met
    assert {row[2]: row[3] for row in listed} == dict(
        zip(
            (f"{number:09d}" for number in range(10, 16)),
            ("not_an_image", "zero_bytes", "too_large", "empty_caption", "caption_not_utf8",
             "truncated"),
            strict=True,
        )
    )  # fmt: skip
    assert tolerant.stdout.count("first bad sample: ") == 1
    assert f"{met} bad samples: " in tolerant.stdout
    strict = commands.train(
        "train.steps=400",
        *source,
        "data.max_bad_fraction=0.01",
        "--output-dir",
        str(tmp_path / "b"),
    )
    assert strict.returncode == 5, strict.stderr[:3000]
    for reason in (
        "not_an_image",
        "zero_bytes",
        "too_large",
        "empty_caption",
        "caption_not_utf8",
        "truncated",
    ):
        assert reason in strict.stderr, strict.stderr
