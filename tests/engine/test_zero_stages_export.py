"""Checkpoints of every ZeRO stage, exported: the weights that two processes trained."""

import json

import torch
from safetensors.torch import load_file

from engine import checkpoint, deepspeed_engine, optim
from engine.step import Stepper
from losses._gather import Gather
from models import weights
from models.export import export
from tests import multiprocess
from tests.engine import tiny


def train_and_save(rank, world_size, folder):
    """A step under every ZeRO stage; the trained engine's own features of a fixed batch."""
    features = {}
    for stage in range(4):
        module = tiny.build()
        config = {
            "train_batch_size": 12,
            "train_micro_batch_size_per_gpu": 12 // world_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": 0,
                "parameter_alignment": True,
            },
            "steps_per_print": 10**9,
        }
        optimizer = optim.build(module.model, module.method, tiny.OPTIM)
        engine = deepspeed_engine.initialise(module, optimizer, config, torch.device("cpu"))
        stepper = Stepper(engine, Gather(), seed=3)
        stepper(0, [tiny.cut(tiny.make_batch(0, 12), rank, world_size)])
        checkpoint.save(engine, folder / f"zero{stage}", 1, {"train.global_batch": 12}, 1)
        batch = tiny.make_batch(9, 4)
        with torch.no_grad():
            engine.eval()
            features[stage] = [
                engine.module.model.encode_image(batch["image"][:, 0])["feature"],
                engine.module.model.encode_text(batch["text"][:, 0])["feature"],
            ]
    return features


@torch.no_grad()
def test_checkpoints_of_every_zero_stage_export_the_trained_weights(tmp_path):
    features, _ = multiprocess.run(train_and_save, 2, tmp_path)
    batch = tiny.make_batch(9, 4)
    start = tiny.build().eval().model.encode_text(batch["text"][:, 0])["feature"]
    for stage in range(4):
        run = tmp_path / f"zero{stage}"
        (run / "config.yaml").write_text(json.dumps({"model": tiny.MODEL}))  # JSON is YAML
        saved = load_file(run / "checkpoints" / "step_0000001" / "model.safetensors")
        assert {name.partition(".")[0] for name in saved} == {"model"}
        export(run, "pt", tmp_path / f"pt{stage}")
        model = weights.load(tmp_path / f"pt{stage}" / f"zero{stage}.pt").model
        image, text = (torch.from_numpy(value) for value in features[stage])
        for ours, expected in (
            (model.encode_image(batch["image"][:, 0]), image),
            (model.encode_text(batch["text"][:, 0]), text),
        ):
            torch.testing.assert_close(ours["feature"], expected, rtol=0, atol=1e-5)
            assert expected.std() > 0.01
        assert (text - start).abs().max() > 1e-3  # it has been trained
