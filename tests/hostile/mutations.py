"""Valid inputs and ways to spoil them, drawn by hypothesis."""

import json
import tarfile

import hypothesis.strategies as st
import yaml

from tests.hostile.parts import END, header, member, pax, raw_pax, sign, tar_bytes
from tests.loaders.conftest import encoded

TINY = encoded(1, (8, 8))
CAPTION = json.dumps({"caption": "from json", "label": 1}).encode()


def _members(long: str) -> list[tuple[str, bytes]]:
    members = []
    for key in ("a/0", "b", f"{long}c", "größe"):
        members += [(f"{key}.jpg", TINY), (f"{key}.txt", "a größe".encode())]
        members += [(f"{key}.json", CAPTION), (f"{key}.cls", b"1\n")]
    return members


TARS = [
    tar_bytes(_members("folder/" * 5)[:12], tarfile.USTAR_FORMAT),
    tar_bytes(_members("folder/" * 30), tarfile.GNU_FORMAT),
    tar_bytes(_members("folder/" * 30), tarfile.PAX_FORMAT),
    pax((b"path", b"p.jpg"), (b"size", b"%d" % len(TINY))) + member(b"x", TINY) + END,
]
# Headers to put between others: each is valid, and an attack or a trap for careless readers.
HEADERS = [
    *(header(b"k.jpg", 0, kind) for kind in (*(b"%c" % c for c in range(256)),)),
    *(header(b"k.jpg", size) for size in (1, 511, 513, b"\xff" * 12, b"\x80" + b"\xff" * 11)),
    *(pax((key, value)) for key in (b"path", b"size", b"GNU.sparse.major", b"hdrcharset", b"x")
      for value in (b"", b"0", b"-1", b"9" * 40, b"../x", b"/x.jpg", b"\xff.jpg", b"a\0b.jpg",
                    b"n" * 5000)),
    *(pax((b"size", b"7"), kind=b"g"), pax((b"path", b"one.jpg"), kind=b"g")),
    raw_pax(b"5 a=\n" * 100), raw_pax(b"99999999 a=\n"), raw_pax(b"\0" * 30), END,
]  # fmt: skip


@st.composite
def mutated(draw, bases: list[bytes], pieces: list[bytes]) -> bytes:
    """One of `bases` after one to four changes: bits, bytes, cuts, copies, insertions."""
    data = bytearray(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        if draw(st.booleans()):  # where the headers are
            place = place // 512 * 512 + draw(st.sampled_from((0, 100, 124, 148, 156, 257, 345)))
        kind = draw(st.sampled_from(("bit", "bytes", "cut", "insert", "delete", "copy", "piece")))
        if kind == "bit" and place < len(data):
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "bytes":
            value = draw(st.binary(max_size=16))
            data[place : place + len(value)] = value
        elif kind == "cut":
            del data[place:]
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=600))
        elif kind == "delete":
            del data[place : place + draw(st.integers(1, 1024))]
        elif kind == "copy":
            source = draw(st.integers(0, max(len(data) - 1, 0)))
            data[place:place] = data[source : source + draw(st.sampled_from((1, 7, 512, 1024)))]
        else:
            start = place // 512 * 512
            data[start:start] = draw(st.sampled_from(pieces))
    return bytes(data)


@st.composite
def tars(draw) -> bytes:
    """Spoiled tars; half of them with checksums made right again, or they all fail there."""
    data = bytearray(draw(mutated(TARS, HEADERS)))
    if draw(st.booleans()):
        for start in range(0, len(data) - 511, 512):
            block = data[start : start + 512]
            if block[257:262] == b"ustar":
                data[start : start + 512] = sign(block)
    return bytes(data)


_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from((
        2**63, -1, 10**30, 1e999, "", "\0", "\ud800", "..", "/", "${name}", "${x", "???",
        "image_text", "unicl", "clip", "null", "txt", "json.", "🙂", "\x1b[2J",
    )),
)  # fmt: skip
VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def spoiled(draw, base) -> object:
    """A copy of nested dicts and lists with one to three values replaced, added or removed."""
    content = json.loads(json.dumps(base))
    for _ in range(draw(st.integers(1, 3))):
        at = content
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and draw(st.booleans()):
                at = at[key]
                continue
            if draw(st.integers(0, 5)) == 0:
                del at[key]
            elif isinstance(at, dict) and draw(st.integers(0, 5)) == 0:
                at[draw(st.text(max_size=5))] = draw(VALUES)
            else:
                at[key] = draw(VALUES)
            break
    return content


def json_texts(base) -> st.SearchStrategy[bytes]:
    """JSON with spoiled values, or spoiled text."""
    text = json.dumps(base).encode()
    pieces = [
        b"[" * 3000,
        b'{"a":' * 3000,
        b"9" * 5000,
        b"NaN",
        b'"\\ud800"',
        b"\xff",
        b"null",
        b",",
    ]
    values = spoiled(base).map(lambda content: json.dumps(content).encode())
    return st.one_of(values, mutated([text], pieces))


def yaml_texts(base: str) -> st.SearchStrategy[bytes]:
    """YAML with spoiled values, or spoiled text."""
    values = spoiled(yaml.safe_load(base)).map(
        lambda content: yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass")
    )
    pieces = [
        b"&a [*a]\n", b"*a", b"!!python/name:os.system ''\n", b"? ", b"- ", b"{", b"[" * 50,
        b"${name}", b"\n\t", b"1" * 400, b"1:2:3", b"base: .\n", b"base: [1]\n",
        b"<<: {a: 1}\n", b"---\n", b"%YAML 9.9\n",
    ]  # fmt: skip
    return st.one_of(values, mutated([base.encode()], pieces), st.binary(max_size=60))
