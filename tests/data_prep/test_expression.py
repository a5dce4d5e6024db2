"""Expressions of reshard.py: what they mean, and what is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sets.expression import CannotEvaluate, Expression
from loaders.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("width = 3", 6, "invalid syntax"),
        ("'é' in caption and 9**9", 19, "operator Pow"),
        ("width < 3 and ().__class__", 14, "__class__"),
        ("caption.__init__.__globals__", 0, "__globals__"),
        ("caption.format(1)", 0, "no method 'format'"),
        ("caption.replace('a', 'b')", 0, "no method 'replace'"),
        ("','.join(caption)", 0, "no method 'join'"),
        ("caption.lower", 0, "must be called"),
        ("1 and open('/etc/passwd')", 6, "no function 'open'"),
        ("eval('1')", 0, "no function 'eval'"),
        ("__import__('os')", 0, "no function '__import__'"),
        ("fields['f'](1)", 0, "only functions and methods by name"),
        ("(lambda: 1)()", 0, "only functions and methods by name"),
        ("1 << 99", 0, "operator LShift"),
        ("f'{width:>9999999999}'", 0, "JoinedStr is not available"),
        ("[x for x in caption]", 0, "ListComp is not available"),
        ("max(caption, key=len)", 13, "keyword is not available"),
        ("(y := 3)", 1, "NamedExpr is not available"),
        ("width;", 5, "invalid syntax"),
        ("import os", 0, "invalid syntax"),
        ("", 0, "invalid syntax"),
    ],
)
def test_what_is_not_allowed_is_shown_with_a_caret(text, column, message):
    with pytest.raises(ConfigError, match=message) as error:
        Expression(text)
    first, shown, caret = str(error.value).split("\n")
    assert first.startswith("--where: ")
    assert shown == f"  {text}"
    assert caret == " " * (2 + column) + "^"


@pytest.mark.parametrize(
    "text",
    [
        "'a' * 999999999",
        "'%999999999d' % 1",
        "'a' * 99999 + 'a' * 99999",
        "all(True for a in 'a' * 99999)",
    ],
)
def test_what_would_fill_the_memory_is_refused(text):
    with pytest.raises(CannotEvaluate):
        Expression(text)({})


NUMBERS = st.one_of(st.sampled_from(["a", "b"]), st.integers(-3, 9).map(str))
TEXTS = st.sampled_from(["s", "'Dog'", "s.lower()", "s[1:]", "fields['s']", "s.strip('d')"])
COMPARISONS = st.one_of(
    st.tuples(NUMBERS, st.sampled_from(["+", "-", "*", "//", "%"]), NUMBERS).map(" ".join),
    st.tuples(NUMBERS, st.sampled_from(["<", "<=", "==", "!=", ">", ">="]), NUMBERS).map(" ".join),
    st.tuples(TEXTS, st.sampled_from(["in", "not in", "==", "<"]), TEXTS).map(" ".join),
    st.tuples(NUMBERS, NUMBERS, NUMBERS).map("{0[0]} < {0[1]} <= {0[2]}".format),
    st.tuples(NUMBERS, NUMBERS).map("{0[0]} in [{0[1]}, 3, 5]".format),
    TEXTS.map("any(c in 'dg' for c in {})".format),
    TEXTS.map("len({}) > 2".format),
)
EXPRESSIONS = st.recursive(
    COMPARISONS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(
            "({0[0]}) {0[1]} ({0[2]})".format
        ),
        inner.map("not ({})".format),
        st.tuples(inner, inner, inner).map("({0[0]}) if ({0[1]}) else ({0[2]})".format),
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(EXPRESSIONS, st.integers(-3, 9), st.integers(-3, 9), st.sampled_from(["", "dog", "a Dog"]))
def test_expressions_mean_what_they_mean_in_python(text, a, b, s):
    fields = {"a": a, "b": b, "s": s}
    names = {**fields, "fields": fields}
    try:
        expected = bool(eval(text, {}, names))
    except ZeroDivisionError:
        with pytest.raises(CannotEvaluate, match="ZeroDivisionError"):
            Expression(text)(names)
    else:
        assert Expression(text)(names) is expected
