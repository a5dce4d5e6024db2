"""A tiny two-tower model with drop path, and batches of noise, for tests of the engine."""

import torch

import losses
import models
from engine import deepspeed_engine, optim
from engine.config import OptimConfig
from engine.step import Stepper
from losses._gather import Gather
from tests.losses import small

MODEL = {
    "image": {
        "name": "swin_tiny", "size": 32,
        "kwargs": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4,
                   "drop_path_rate": 0.0},
    },
    "text": {"width": 16, "layers": 1, "heads": 2, "context_length": 12, "vocab_size": 49409},
    "embed_dim": 8,
}  # fmt: skip
DIMS = {"embed_dim": 8, "image_width": 32, "text_width": 16, "num_classes": 5, "vocab_size": 49409}


def model_settings(name):
    """The `model:` section that method `name` trains."""
    return {**MODEL, **small.MODELS.get(name, {})}


def dims(model):
    """The sizes that a method is told, of this model."""
    return {**DIMS, "image_width": model.image_width, "text_width": model.text_width}


def build(name="unicl", drop_path=0.0):
    torch.manual_seed(5)
    settings = model_settings(name)
    kwargs = {**settings["image"]["kwargs"], "drop_path_rate": drop_path}
    model = models.build({**settings, "image": {**settings["image"], "kwargs": kwargs}})
    return deepspeed_engine.TrainModule(model, losses.build(name, {}, dims(model))).train()


def make_batch(step, size, images=2, texts=1):
    generator = torch.Generator().manual_seed(100 + step)
    text = torch.randint(1, 49000, (size, texts, 12), generator=generator)
    text[:, :, -1] = 49407
    labels = torch.randint(-1, 5, (size,), generator=generator)
    pixels = torch.randn(size, images, 3, 32, 32, generator=generator)
    seeds = torch.randint(0, 2**62, (size + 1,), generator=generator)
    parameters = torch.rand(size, images, 13, generator=generator)
    objects = torch.randn(size, 3, 6, generator=generator)
    found = torch.randint(0, 4, (size, 1), generator=generator)  # none to three in an image
    return {
        "image": pixels, "augmentation": parameters, "text": text, "label": labels,
        "seed": seeds[1:], "step_seed": seeds[:1].repeat(size),
        "objects": objects, "objects_mask": torch.arange(3) < found,
    }  # fmt: skip


def cut(batch, part, parts):
    size = len(batch["label"]) // parts
    return {key: value[part * size : (part + 1) * size] for key, value in batch.items()}


# eps = 1 makes AdamW nearly linear in the gradient: a wrong factor shows, rounding does not.
OPTIM = OptimConfig(lr=1.0, betas=(0.5, 0.5), eps=1.0, weight_decay=0.1)


def deepspeed_settings(size, stage, world_size, pieces=1, bf16=False):
    """A complete DeepSpeed configuration for global batches of `size`."""
    return {
        "train_batch_size": size,
        "train_micro_batch_size_per_gpu": size // (world_size * pieces),
        "gradient_accumulation_steps": pieces,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }


def train(
    rank, world_size, stage, pieces, name="unicl", steps=3, size=12, bf16=False, drop_path=0.0,
    kept=None, offload=False,
):  # fmt: skip
    """Weights after `steps` steps of the engine on this rank's share of each batch."""
    module = build(name, drop_path)
    optimizer = optim.build(module.model, module.method, OPTIM)
    config = deepspeed_settings(size, stage, world_size, pieces, bf16)
    if offload:  # as in the shipped file
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        config["zero_force_ds_cpu_optimizer"] = False
    engine = deepspeed_engine.initialise(module, optimizer, config, torch.device("cpu"))
    stepper = Stepper(engine, Gather(), seed=3)
    stepper.kept = kept
    losses_seen = []
    for step in range(steps):
        mine = cut(make_batch(step, size), rank, world_size)
        out = stepper(step, [cut(mine, piece, pieces) for piece in range(pieces)])
        losses_seen.append(float(out["loss"]))
    return {
        "losses": losses_seen,
        "weights": {k: v.float() for k, v in deepspeed_engine.full_state(engine)},
    }
