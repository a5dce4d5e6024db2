"""`train.compile`: the compiled step is the plain one."""

import pytest
import torch

from engine import compilation
from engine.step import Stepper, saved_bytes
from loaders.errors import ConfigError
from losses._gather import Gather
from tests.engine import tiny
from tests.engine.test_step import Graph

CPU = torch.device("cpu")


def one_step(name, compiled):
    """Loss, gradients and saved bytes: three micro-batches, one graph kept, random layers."""
    torch._dynamo.reset()
    module = tiny.build(name, drop_path=0.5)
    drops = module.model.modules() if name == "oner" else module.model.image.modules()
    for part in drops:
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.3
    if compiled:
        compilation.compile_towers(module.model, 1, CPU)
    pieces = [tiny.cut(tiny.make_batch(0, 12), part, 3) for part in range(3)]
    for length, piece in zip((12, 9, 5), pieces, strict=True):  # as long as its longest text
        piece["text"][:, :, length - 1 :] = 0
        piece["text"][:, :, length - 1] = 49407
    pieces[1]["text"][1] = pieces[1]["text"][0]  # equal texts: fewer rows
    stepper = Stepper(Graph(module), Gather(), seed=3)
    stepper.kept = 1
    out = stepper(0, pieces)
    gradients = {name: p.grad for name, p in module.named_parameters()}
    size = saved_bytes(lambda: module(pieces[0]), module)
    return out["loss"], gradients, size


@pytest.mark.soak  # a minute of compiling
@pytest.mark.parametrize("name", ["unicl", "oner"])  # two towers, and one
def test_compiled_step_equals_the_plain_one(name):
    loss, plain, size = one_step(name, compiled=False)
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled_loss, compiled, compiled_size = one_step(name, compiled=True)
    # Images and texts, with and without gradient.
    assert counters["stats"]["unique_graphs"] >= 4
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-6)
    assert compiled.keys() == plain.keys()
    for name, gradient in plain.items():
        reference = gradient.abs().max()
        error = (compiled[name] - gradient).abs().max()
        assert error <= 1e-5 * max(reference, 1e-2), (name, error, reference)
    assert 0.2 < compiled_size / size < 2  # graphs are still measured, for the memory budget


def test_what_was_compiled_is_kept_where_a_user_expects_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "unicl" / "torch_compile"
    # torch writes its default into the variable when it is imported.
    for default in ("", torch._inductor.runtime.cache_dir_utils.default_cache_dir()):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default)
        assert compilation.cache_folder() == kept
    assert str(kept) in compilation.announcement()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert compilation.cache_folder() == tmp_path / "mine"


def test_without_a_compiler_the_start_is_refused(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/such/compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    with pytest.raises(ConfigError, match=r"train.compile=true: .*g\+\+.*train.compile=false"):
        compilation.compile_towers(tiny.build().model, 1, CPU)


def test_zero_3_is_refused():
    with pytest.raises(ConfigError, match="stage 3"):
        compilation.compile_towers(tiny.build().model, 3, CPU)
