"""The Triton kernels, compiled for a GPU: that they are accepted, and what they take."""

import itertools
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from losses import _kernels_classes, _kernels_triton  # noqa: E402
from tests.losses.test_kernels import KINDS, Case, make  # noqa: E402


class Compiler:
    """Stands for a kernel: compiles what is launched, and starts nothing."""

    def __init__(self, kernel, capability: int):
        self.kernel, self.target = kernel, GPUTarget("cuda", capability, 32)
        self.shared, self.stack = 0, 0

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, num_warps, num_stages=3, **named):
        names = self.kernel.arg_names
        values = {**dict(zip(names, arguments, strict=False)), **named}
        assert sorted(values) == sorted(names)
        signature, constants, attributes = {}, {}, {}
        for place, (name, parameter) in enumerate(zip(names, self.kernel.params, strict=True)):
            value = values[name]
            if parameter.is_constexpr or value is None:
                signature[name], constants[(place,)] = "constexpr", value
            else:
                signature[name] = TYPES[value.dtype] if torch.is_tensor(value) else "i32"
                if torch.is_tensor(value) or (name in MULTIPLES and value % 16 == 0):
                    attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        compiled = triton.compile(source, target=self.target, options=options)
        self.shared, self.stack = compiled.metadata.shared, stack_bytes(compiled.asm["cubin"])


MULTIPLES = "stride", "count", "width"  # of these multiples of 16 are compiled in
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


def stack_bytes(binary: bytes) -> int:
    """Bytes of stack of each thread of a kernel: registers that did not fit."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [tool, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", said)[1])


# All that GPUs of two kinds can be asked for: kernel, kind, excluded, capability.
KERNELS = "logsumexps", "pair_weights", "sigmoid", "softplus_sums"
REST = KERNELS, KINDS, ("", "pairs"), (80, 90)


@pytest.mark.parametrize(
    ("kernel", "kind", "excluded", "capability"),
    [
        ("combine", "float32", "", 90),
        ("logsumexps", "bfloat16", "", 90),
        ("pair_weights", "bfloat16", "pairs", 90),
        *(pytest.param(*choice, marks=pytest.mark.soak) for choice in itertools.product(*REST)),
    ],
)
def test_kernels_compile_for_a_gpu(kernel, kind, excluded, capability, monkeypatch, tmp_path):
    """Within the registers, and with memory for four programs at once on a multiprocessor."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles, *_ = make(Case(144, 144, 1024, 10.0, kind, excluded))
    launched = {}
    for name in ("combine", "logsumexps", "pair_weights", "softplus_sums"):
        launched[name] = Compiler(getattr(_kernels_triton, name), capability)
        monkeypatch.setattr(_kernels_triton, name, launched[name])
        if name != kernel.replace("sigmoid", "pair_weights"):
            launched[name].compile = lambda *_, **__: None
    r, c, bias = torch.zeros(144), torch.zeros(144), torch.zeros(())
    {
        "combine": tiles.forward,
        "logsumexps": tiles.forward,
        "pair_weights": lambda: tiles.backward(r, c, r, c),
        "sigmoid": lambda: tiles.sigmoid_gradients(bias),
        "softplus_sums": lambda: tiles.softplus_sum(bias),
    }[kernel]()
    chosen = launched[kernel.replace("sigmoid", "pair_weights")]
    assert chosen.shared <= 40 * 1024
    assert chosen.stack == 0


def test_sums_by_class_compile_for_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = {}
    for name in ("_segments", "_class_means", "_dots", "_finish"):
        made[name] = Compiler(getattr(_kernels_classes, name), 90)
        monkeypatch.setattr(_kernels_classes, name, made[name])
    x, table, weights = torch.zeros(32, 512).bfloat16(), torch.zeros(32, 512), torch.zeros(32)
    ids, counts = _kernels_classes.numbered(torch.zeros(32, dtype=torch.int64))
    _kernels_classes.means(x, ids, counts, weights)
    _kernels_classes.dots(x, table, ids)
    _kernels_classes.finish(table, torch.zeros(()), x, table, ids, weights)
    for name, compiler in made.items():
        assert compiler.shared <= 48 * 1024, name
        assert compiler.stack == 0, name
