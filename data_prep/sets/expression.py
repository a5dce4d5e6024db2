"""Expressions over the fields of a sample, such as `width >= 64 and 'dog' in caption.lower()`.

Evaluated by simpleeval (Daniel Fairhead, MIT), never by Python's `eval`. What it would allow
beyond comparisons, arithmetic and a few string methods is refused before the first sample is
read, because expressions are copied from papers and mails.
"""

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from simpleeval import DEFAULT_OPERATORS, EvalWithCompoundTypes, InvalidExpression, NameNotDefined

from loaders.errors import ConfigError

FUNCTIONS = {f.__name__: f for f in (abs, all, any, float, int, len, max, min, str, sum)}
# Methods that give a result no longer than the text: no join, replace, center, format.
_TEXT_METHODS = {
    *("lower", "upper", "casefold", "strip", "lstrip", "rstrip", "split", "startswith"),
    *("endswith", "count", "find", "isalpha", "isascii", "isdigit", "islower", "isupper"),
    *("removeprefix", "removesuffix"),
}
METHODS = {str: _TEXT_METHODS, dict: {"get", "keys", "values"}, list: {"count"}}
_METHOD_NAMES = set().union(*METHODS.values())
# Powers and shifts make numbers of any length; `%` on a text fills a field of any width.
_OPERATORS = {
    kind: function
    for kind, function in DEFAULT_OPERATORS.items()
    if kind not in (ast.Pow, ast.LShift, ast.RShift, ast.BitAnd, ast.BitOr, ast.BitXor, ast.Invert)
}
_STRUCTURE = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.BinOp, ast.Compare),
    *(ast.IfExp, ast.Call, ast.Attribute, ast.Subscript, ast.Slice, ast.Name, ast.Constant),
    *(ast.List, ast.Tuple, ast.Set, ast.GeneratorExp, ast.comprehension, ast.Load, ast.Store),
)
_EVALUATION_ERRORS = (
    *(InvalidExpression, TypeError, ValueError, LookupError, ArithmeticError, AttributeError),
    *(RecursionError, MemoryError),
)


class CannotEvaluate(Exception):
    """The expression does not fit a sample; the message says why, without naming the sample."""


class Expression:
    """A checked expression: call it with the fields of a sample to get True or False."""

    def __init__(self, text: str) -> None:
        """Parse and check. Raises `ConfigError` with the text and a caret below the fault."""
        self.text = text
        try:
            tree = ast.parse(text, mode="eval")
        except SyntaxError as error:
            column = (error.offset or 1) - 1
            raise _refused(text, error.lineno or 1, column, error.msg) from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(
                f"--where: cannot be parsed: {str(error) or 'nested too deep'}"
            ) from None
        for node, reason in _faults(tree):
            column = len(_line(text, node.lineno).encode()[: node.col_offset].decode())
            raise _refused(text, node.lineno, column, reason)
        self._tree = tree.body
        # A name in a generator expression is counted too; a field that is never read does no harm.
        self.names = frozenset(n.id for n in ast.walk(tree) if isinstance(n, ast.Name))
        self._evaluator = EvalWithCompoundTypes(
            operators={**_OPERATORS, ast.Mod: _remainder},
            functions=dict(FUNCTIONS),
            allowed_attrs=METHODS,
        )

    def __call__(self, fields: Mapping[str, Any]) -> bool:
        """Whether the sample fits. Raises `CannotEvaluate` for an absent field or a wrong type."""
        self._evaluator.names = fields
        try:
            return bool(self._evaluator.eval(self.text, self._tree))
        except NameNotDefined as error:
            known = ", ".join(sorted(map(str, fields)))
            raise CannotEvaluate(f"no field {error.name!r}; there are: {known}") from None
        except _EVALUATION_ERRORS as error:
            raise CannotEvaluate(f"{type(error).__name__}: {error}") from None


def _remainder(left: Any, right: Any) -> Any:
    if isinstance(left, str | bytes):
        raise TypeError("% on a text (formatting) is not available")
    return left % right


def _faults(tree: ast.Expression) -> Iterator[tuple[ast.expr, str]]:
    """Places of an expression that are not allowed, with the reason."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.operator | ast.cmpop | ast.unaryop):
            continue  # judged with the node that holds it, which has a position
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id not in FUNCTIONS:
                known = ", ".join(sorted(FUNCTIONS))
                yield node, f"no function {node.func.id!r}; there are: {known}"
        elif isinstance(node, ast.Call) and not isinstance(node.func, ast.Attribute):
            yield node, "only functions and methods by name can be called"
        elif isinstance(node, ast.Attribute):
            if node.attr not in _METHOD_NAMES:
                known = ", ".join(sorted(_METHOD_NAMES))
                yield node, f"no method {node.attr!r}; there are: {known}"
            elif id(node) not in called:
                yield node, f"method {node.attr!r} must be called: .{node.attr}(...)"
        elif isinstance(node, ast.BinOp | ast.UnaryOp) and type(node.op) not in _OPERATORS:
            yield node, f"operator {type(node.op).__name__} is not available"
        elif isinstance(node, ast.Call) and node.keywords:
            yield node, "arguments by keyword are not available"
        elif not isinstance(node, _STRUCTURE):
            yield node, f"{type(node).__name__} is not available"


def _refused(text: str, line: int, column: int, reason: str) -> ConfigError:
    return ConfigError(f"--where: {reason}\n  {_line(text, line)}\n  {' ' * column}^")


def _line(text: str, number: int) -> str:
    lines = text.splitlines() or [""]
    return lines[min(number, len(lines)) - 1]
