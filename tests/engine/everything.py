"""A method that is two: DeCLIP's queue and heads, OTTER's teacher and parameter, in one run."""

from losses import declip, otter
from losses._method import Method as Base
from losses._method import NoOptions
from tests.losses import small


class Method(Base):
    """Each keeps its state and its features; the terms of both are added."""

    Config = NoOptions
    images = declip.Method.images
    texts = declip.Method.texts
    teacher = True
    smallest_batch = otter.Method.smallest_batch

    def __init__(self, cfg, dims):
        super().__init__(cfg, dims)
        self.first, self.second = small.build("declip", dims), small.build("otter", dims)

    def encode(self, model, batch):
        return {**self.first.encode(model, batch), **_renamed(self.second.encode(model, batch))}

    def targets(self, teacher, batch):
        return _renamed(self.second.targets(teacher, batch))

    def decay(self, step):
        return self.second.decay(step)

    def loss(self, features, labels, gather):
        marked = {k[len(MARK) :]: v for k, v in features.items() if k.startswith(MARK)}
        out = self.second(marked, labels, gather)
        del out["sample_loss"]
        out["transport_loss"] = out.pop("contrastive_loss")
        rest = {k: v for k, v in features.items() if not k.startswith(MARK)}
        return {**self.first(rest, labels, gather), **out}

    def step_end(self):
        self.first.step_end()


MARK = "otter_"


def _renamed(features):
    return {MARK + name: value for name, value in features.items()}
