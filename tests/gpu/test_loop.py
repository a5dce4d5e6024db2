"""The training loop on a GPU: never waits, survives a kill, and recovers from fp16's overflow."""

import json
import re
import signal

import pytest
from safetensors.torch import load_file

from tests.gpu import runs
from tests.multiprocess import wait_for_lines

pytestmark = pytest.mark.gpu
CUDA, HOOK = True, "no_waiting"  # how a trial without a device differs


def test_the_host_does_not_wait_for_the_device(tmp_path):
    """`torch.cuda.set_sync_debug_mode("error")` from step 5 to 8, in 1 and in 4 micro-batches."""
    for pieces in runs.PIECES:
        folder = tmp_path / str(pieces)
        settings = (f"train.accumulation={pieces}", "log.every_steps=20", "data.workers=2",
                    "deepspeed=ds_configs/zero1_bf16.json")  # fmt: skip
        text = runs.finish(runs.start(folder, *settings, cuda=CUDA, hook=HOOK), folder)
        assert f"finished after {runs.STEPS} steps" in text


def test_a_killed_run_continues_to_the_last_bit(tmp_path, figures):
    """With deterministic algorithms; the operators that have none are named by torch."""
    settings = ("log.save_every_steps=5", "deepspeed=ds_configs/zero1_fp32.json")
    how = {"cuda": CUDA, "hook": "deterministic", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    beside = runs.start(whole, *settings, **how)
    process = runs.start(cut, *settings, **how)
    wait_for_lines(cut / "metrics.jsonl", 6, process)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    text = runs.finish(beside, whole) + runs.finish(runs.start(cut, *settings, **how), cut)
    assert "after step 5" in text or "finished after 10" in text
    named = sorted(set(re.findall(r"(\S+) does not have a deterministic implementation", text)))
    figures["operators without a deterministic form"] = ", ".join(named) or "none"
    figures["largest difference of a loss"] = runs.difference(runs.losses(cut), runs.losses(whole))
    name = f"checkpoints/step_{runs.STEPS:07d}/model.safetensors"
    first, second = (load_file(folder / name) for folder in (whole, cut))
    assert first.keys() == second.keys()
    equal = all(bool((first[key] == second[key]).all()) for key in first)
    figures["weights"] = "equal to the last bit" if equal else "differ"
    if named:
        assert figures["largest difference of a loss"] < runs.BOUNDS["fp32"]
    else:
        assert equal
        assert runs.losses(cut) == runs.losses(whole)


def test_fp16_overflows_and_recovers(tmp_path, figures):
    """A loss scale of 2^32 overflows in the first steps; it is halved until steps count."""
    file = json.loads((runs.ROOT / "ds_configs/zero1_fp32.json").read_text())
    del file["bf16"]
    file["fp16"] = {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}
    (tmp_path / "fp16.json").write_text(json.dumps(file))
    folder = tmp_path / "run"
    settings = (f"deepspeed={tmp_path}/fp16.json", "train.steps=40", "optim.warmup_steps=0")
    runs.finish(runs.start(folder, *settings, cuda=CUDA), folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in lines]
    figures |= {"first loss": found[0], "last loss": found[-1]}
    assert len(found) == 40
    assert runs.difference(found, found) == 0, "finite throughout"
    assert found[-1] < found[0], "steps that were not skipped have trained it"
    assert (folder / "checkpoints/step_0000040").is_dir()
