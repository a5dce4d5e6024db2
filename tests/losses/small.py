"""Methods as small as the tests want them: the only place that knows their options."""

import dataclasses

import torch

import losses
from losses._gather import Gather

# Of the options that make a method large; the others keep their defaults.
OPTIONS = {
    "simclr": {"hidden": 7, "projection": 5},
    "slip": {"hidden": 7, "projection": 5},
    "moco": {"queue": 20, "projection": 6},
    "declip": {"queue": 20, "hidden": 24, "bottleneck": 8},
    # With a parameter of its own, which starts with large gradients.
    "otter": {"form": "released", "alpha": 0.8},
    "oner": {"objectives": ["itc", "xmc", "cic", "cmc"]},
}

# What a method's model needs beyond the tiny one (tests/engine/tiny.py).
MODELS = {
    "filip": {"similarity": "late", "token_dim": 6},
    "oner": {
        "kind": "one_tower",
        "image": {"name": "vit_tiny_patch16_224", "size": 32,
                  "kwargs": {"depth": 1, "embed_dim": 16, "num_heads": 2}},
    },
    "uniclip": {"augmentation": {"width": 6, "hidden": 10}},
    "pyramidclip": {
        "image": {"name": "vit_tiny_patch16_224", "size": 32,
                  "kwargs": {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}},
        "regions": {"width": 6, "count": 3, "blocks": 1},
    },
}  # fmt: skip


def build(name, dims, **options):
    """Method `name` with small heads and queues, and the options that it has of those given."""
    known = {field.name for field in dataclasses.fields(losses.find(name).Config)}
    given = {key: value for key, value in options.items() if key in known}
    torch.manual_seed(3)  # heads
    return losses.build(name, {**OPTIONS.get(name, {}), **given}, dims)


def leaves(features):
    """Copies of the features that collect gradients."""
    return {name: value.clone().requires_grad_() for name, value in features.items()}


def run(method, features):
    """What a method returns of the features of one process, labels aside."""
    return method(features, torch.zeros(len(features["scale"]), dtype=torch.int64), Gather())
