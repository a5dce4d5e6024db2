"""Side-by-side measurements. Every figure is a ratio, or a peak, taken within one run.

`python -m benchmarks.NAME --help` is answered here, before torch and the peers that a benchmark
imports are loaded: that takes ten seconds and more.
"""

import ast
import sys
from pathlib import Path


def _help_is_asked_for() -> str | None:
    """The NAME of `python -m benchmarks.NAME --help` that looks for its module right now, if its
    options are those that `harness` has for all."""
    if sys.argv[:1] != ["-m"] or not {"-h", "--help"} & {*sys.argv[1:]}:
        return None
    name = sys.orig_argv[sys.orig_argv.index("-m") + 1].removeprefix(f"{__name__}.")
    source = Path(__file__).with_name(f"{name}.py")
    shared = source.is_file() and f'main("{name}", ' in source.read_text(encoding="utf-8")
    return name if shared else None


if _name := _help_is_asked_for():
    from benchmarks import harness

    _about = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{_name}.py").read_text()))
    harness.parser(_name, _about).parse_args()
