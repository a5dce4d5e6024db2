"""Configuration files that attack: ConfigError with the file's name, soon and in little memory."""

import os
from functools import partial

import pytest

import train
from engine import config
from loaders.errors import ConfigError
from models import plain_yaml
from tests import commands
from tests.commands import ROOT
from tests.hostile.parts import limit_memory

GOOD = (ROOT / "tests" / "engine" / "tiny.yaml").read_text()
GOOD = GOOD.replace("global_batch: 8", "global_batch: 8, steps: 3")


def laughs(levels: int = 30) -> str:
    lines = ["model:", "  a0: &a0 [lol, lol]"]
    lines += [f"  a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels)]
    return "\n".join(lines)


ATTACKS = {
    "object": ("name: !!python/object/apply:os.system ['touch {marker}']", "object tag"),
    "new object": ("name: !!python/object/new:os.system ['touch {marker}']", "object tag"),
    "name": ("name: !!python/name:os.system", "object tag"),
    "module": ("name: !!python/module:os", "object tag"),
    "path": ("name: !!python/object/apply:pathlib.PosixPath [/etc]", "object tag"),
    "own tag": ("name: !system ls", "constructor"),
    "laughs": (laughs(), r"line 4: the alias \*a0"),
    "endless alias": ("model: &a [*a]", r"alias \*a"),
    "merge": ("model: &m {a: 1}\nloss:\n  <<: *m", r"alias \*m"),
    "interpolation of itself": ("name: ${name}", "wrong kind"),
    "interpolation of nothing": ("data: {image_text: '${nope.x}'}", "wrong kind.*nope"),
    "interpolation of a secret function": ("name: ${os.system:ls}", "wrong kind"),
    "duplicate keys": (GOOD + "seed: 1\nseed: 2\n", "duplicate key seed"),
    "duplicate keys below": ("train: {steps: 1, steps: 2}", "duplicate key steps"),
    "integer of 100 bits": ("seed: 1267650600228229401496703205376", r"seed=\d+ must be .* 2\^63"),
    "integer of 1300 bits": ("optim: {lr: " + "9" * 400 + "}", "too large"),
    "infinite": ("optim: {lr: .inf}", "optim.lr=inf: a number must be finite"),
    "infinite exponent": ("optim: {lr: 1.0e+999}", "optim.lr=inf"),
    "not a number": ("optim: {lr: .nan}", "optim.lr=nan"),
    "infinite in the model": ("model: {logit_scale_max: .inf}", "model.logit_scale_max=inf"),
    "workers": ("data: {workers: 1000000}", r"data.workers=1000000 must be in \[0, 512\]"),
    "fewer than no workers": ("data: {workers: -1}", "data.workers=-1"),
    "base is a list": ("base: [a, b]", "base=.*not the name"),
    "base is a device": ("base: /dev/zero", r"/dev/zero: not a regular file \(the base of "),
    "base is a folder": ("base: .", r"not a regular file \(the base of .*yaml"),
    "base has a zero byte": ('base: "a\\0b"', "null"),
    "not a mapping": ("- a\n- b", "mapping"),
    "a text": ("just a text", "cannot read|mapping"),
    "model is a number": ("model: 3", "model"),
    "mean is a number": ("model: {image: {mean: 3}}", "wrong kind|mean"),
    "list as number": ("model: {embed_dim: [1]}", "embed_dim"),
    "loss is a list": ("loss: [1]", "Cannot merge"),
    "loss name is a list": ("loss: {name: [1]}", "wrong kind|loss"),
    "loss name leaves the folder": ("loss: {name: ../../tmp/x}", "there are"),
    "key with a dot": ("optim: {lr; 1.0e-3: 2}", "unknown key 'optim.lr; 1.0e-3'; .* 'optim.lr'"),
    "unknown key of the file": ("a.b: 2", "unknown key 'a.b'; the nearest is"),
    "control characters": ("name: a\x1b[31m", "cannot read"),
}  # fmt: skip


@pytest.mark.parametrize("what", ATTACKS)
def test_attacks_are_refused_with_the_file_s_name(tmp_path, what):
    text, words = ATTACKS[what]
    marker = tmp_path / "marker"
    path = tmp_path / "evil.yaml"
    base = "" if "base:" in text else "base: good.yaml\n"
    path.write_text(base + text.replace("{marker}", str(marker)))
    (tmp_path / "good.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match=f"(?s){words}") as caught:
        config.load(path)
    place = {"base is a device": "/dev/zero", "base has a zero byte": "a\0b"}.get(what, str(path))
    assert place in str(caught.value)
    assert not marker.exists()


def test_the_configuration_around_the_attacks_is_good(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    assert config.load(path).train.steps == 3


@pytest.mark.parametrize("content", [b"\xff\xfe\x00n", b"name: \x80", b"\0" * 100, b"name: \x1b"])
def test_bytes_that_are_no_text(tmp_path, content):
    (tmp_path / "evil.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"evil\.yaml"):
        config.load(tmp_path / "evil.yaml")


def test_files_that_never_end_are_not_read(tmp_path):
    large = tmp_path / "large.yaml"
    large.touch()
    os.truncate(large, plain_yaml.MAX_BYTES + 1)
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("large.yaml", "pipe.yaml", "absent.yaml", "."):
        with pytest.raises(ConfigError, match=r"cannot read configuration"):
            config.load(tmp_path / name)


@pytest.mark.parametrize(
    "override",
    ["name=!!python/name:os.system", "name=${name}", "model=3", "model.image=[1]", "seed=1e999",
     "seed=" + "9" * 5000, "a" * 5000 + "=1", "loss=" + "[" * 3000, "data.image_text=${x:y}",
     "=", "a..b=1", "[=1", "model.image.kwargs=7"],
)  # fmt: skip
def test_overrides_are_refused_in_words(tmp_path, override):
    (tmp_path / "good.yaml").write_text(GOOD)
    with pytest.raises(ConfigError):
        config.load(tmp_path / "good.yaml", [override])


def test_the_command_ends_with_exit_code_2_and_little_memory(tmp_path):
    """`train.py` on a billion laughs, in a process that may reserve 1 GB beyond its imports."""
    (tmp_path / "evil.yaml").write_text(laughs())
    evil = ["--config", tmp_path / "evil.yaml", "--dry-run"]
    limit = partial(limit_memory, 1 << 30)
    done = commands.finish(commands.Command(train.main, *evil, prepare=limit))
    assert done.returncode == 2, done.stderr
    assert "evil.yaml: line 3: the alias *a0" in done.stderr
    assert "Traceback" not in done.stderr
