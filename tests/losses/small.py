"""Methods as small as the tests want them: the only place that knows their options."""

import dataclasses

import torch

import losses

# Of the options that make a method large; the others keep their defaults.
OPTIONS = {
    "simclr": {"hidden": 7, "projection": 5},
    "slip": {"hidden": 7, "projection": 5},
    "moco": {"queue": 20, "projection": 6},
    "declip": {"queue": 20, "hidden": 24, "bottleneck": 8},
    # With a parameter of its own, which starts with large gradients.
    "otter": {"form": "released", "alpha": 0.8},
}

# What a method's model needs beyond the tiny one (tests/engine/tiny.py).
MODELS = {
    "uniclip": {"augmentation": {"width": 6, "hidden": 10}},
}


def build(name, dims, **options):
    """Method `name` with small heads and queues, and the options that it has of those given."""
    known = {field.name for field in dataclasses.fields(losses.find(name).Config)}
    given = {key: value for key, value in options.items() if key in known}
    torch.manual_seed(3)  # heads
    return losses.build(name, {**OPTIONS.get(name, {}), **given}, dims)
