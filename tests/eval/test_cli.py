"""Which sets a command evaluates, under srun too, and models that are no run folders."""

import json
import os
import socket

import pytest
import torch
import yaml

from eval import rows, zero_shot
from eval.tasks import evaluation, outcome
from loaders.errors import ConfigError, DataError
from models import weights
from tests.multiprocess import fork_server


def command(world, output, *names, registry=None, extra=()):
    arguments = ["--checkpoint", str(world / "runs/tiny"), "--datasets", *names]
    arguments += ["--output", str(output), "--batch-size", "8", "--workers", "0", *extra]
    zero_shot.main(arguments, registry or world / "registry.yaml")


@pytest.fixture
def with_absent(world, tmp_path):
    """The toy registry with an absent optional set in its collection."""
    content = yaml.safe_load((world / "registry.yaml").read_text())
    row = content["datasets"]["toy_classes"]
    absent = {"source": "auto", "splits": {"test": {"samples": 1}}, "optional": True}
    content["datasets"]["lost"] = row | absent | {"obtain": "fetch {name} {split} to {folder}"}
    content["collections"]["toys"].append("lost")
    path = tmp_path / "registry.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_absent_sets_of_a_collection_are_listed_and_the_others_run(
    world, tmp_path, with_absent, capsys
):
    command(world, tmp_path, "toys", registry=with_absent, extra=["--data-root", str(tmp_path)])
    folder = tmp_path / "lost/test"
    assert f"obtain them with: lost: fetch lost test to {folder}" in capsys.readouterr().out
    found = rows.read_rows(tmp_path / "tiny_zero_shot.jsonl")
    assert {row["dataset"] for row in found} == {"toy_classes"}


def test_an_absent_set_that_is_named_is_an_error(world, tmp_path, with_absent):
    with pytest.raises(DataError, match=r"lost.*is not there; obtain it with: fetch lost"):
        command(world, tmp_path, "toys", "lost", registry=with_absent)
    with pytest.raises(ConfigError, match="toy_classes has no protocol unicl"):
        command(world, tmp_path, "toy_classes", extra=["--protocol", "unicl"])


def test_two_protocols_are_two_results(world, tmp_path):
    content = yaml.safe_load((world / "registry.yaml").read_text())
    content["datasets"]["toy_classes"]["protocols"] = {
        "unicl": {"templates": "unicl_81", "resize_ratio": 1.143},
        "elevater": {"templates": "clip_80", "resize_ratio": 1.0},
    }
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(content))
    for extra in ((), ("--protocol", "elevater"), ("--protocol", "unicl")):
        command(world, tmp_path, "toy_classes", registry=tmp_path / "both.yaml", extra=extra)
    found = rows.read_rows(tmp_path / "tiny_zero_shot.jsonl")
    told = {row["protocol"].split("; ")[1]: row["prompt_digest"] for row in found}
    assert list(told) == [
        "protocol elevater: resize 32 crop 32, softmax of 100 x cosine",
        "protocol unicl: resize 37 crop 32, softmax of 100 x cosine",
    ]
    assert len(set(told.values())) == 2
    assert len(found) == 2 * 3  # the second run of `unicl` replaced the first


def test_nan_features_name_the_data_set(world, tmp_path, monkeypatch):
    loaded = weights.load(world / "runs/tiny")
    with torch.no_grad():
        # The weights are finite, the features will not be.
        next(p for n, p in loaded.model.named_parameters() if n.startswith("image")).fill_(3e38)
    monkeypatch.setattr(weights, "load", lambda path: loaded)
    with pytest.raises(DataError, match="toy_classes: the query features hold NaN"):
        command(world, tmp_path, "toy_classes")


def test_a_file_of_its_own_has_a_name_and_no_log(world, tmp_path):
    run = weights.load(world / "runs/tiny")
    assert outcome.samples_seen(run) == 7 * 64
    exported = weights.LoadedRun(
        run.model, run.cfg, None, run.checkpoint_hash, tmp_path / "swin.pth", "swin"
    )
    assert (exported.name, outcome.samples_seen(exported)) == ("swin", None)


def srun_task(rank, size, job, queue):
    """What srun gives a process: no RANK, no MASTER_ADDR."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(
        SLURM_STEP_ID="0",
        SLURM_JOB_ID=str(job),
        SLURM_PROCID=str(rank),
        SLURM_LOCALID=str(rank),
        SLURM_NTASKS=str(size),
        SLURM_STEP_NODELIST="localhost",
    )
    accelerator = evaluation.make_accelerator()
    total = accelerator.gather(torch.tensor([accelerator.process_index + 1])).tolist()
    queue.put((accelerator.num_processes, accelerator.process_index, total))


def test_srun_joins_its_tasks():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    # engine.dist: port = 10000 + job number modulo 50000
    context, job = fork_server(), (port - 10000) % 50000
    queue = context.Queue()
    tasks = [context.Process(target=srun_task, args=(r, 2, job, queue)) for r in range(2)]
    for task in tasks:
        task.start()
    found = sorted(queue.get(timeout=120) for _ in tasks)
    for task in tasks:
        task.join(timeout=20)
    assert found == [(2, 0, [1, 2]), (2, 1, [1, 2])]


def test_rows_say_which_split_was_published(world, tmp_path):
    command(world, tmp_path, "toy_classes")
    row = json.loads((tmp_path / "tiny_zero_shot.jsonl").read_text().splitlines()[0])
    assert row["split"] == "test"
