"""Checkpoints that would run code or fill the memory when opened: at every entry, on real files."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import checkpoint, deepspeed_engine, optim
from engine.step import Stepper
from eval import zero_shot
from loaders.errors import DataError
from losses._gather import Gather
from models import export, plain_yaml, unpickling, weights
from models.formats import weight_files
from tests import commands, multiprocess
from tests.engine import run_folder, tiny
from tests.hostile.test_config import laughs

IDENTITY = {"train.global_batch": 12}


class Touch:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.open, (self.marker, os.O_CREAT)


def plain(marker: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Touch(marker)}, protocol=2))


def archive(marker: Path, path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, "extra": Touch(marker)}, path)


def legacy(marker: Path, path: Path) -> None:
    torch.save({"model": Touch(marker)}, path, _use_new_zipfile_serialization=False)


FORMS = [plain, archive, legacy]


@pytest.mark.parametrize("write", FORMS, ids=lambda f: f.__name__)
def test_the_attacks_are_real(write, tmp_path):
    """Without `weights_only` each of them runs."""
    write(tmp_path / "marker", tmp_path / "evil.pt")
    if write is plain:
        pickle.loads((tmp_path / "evil.pt").read_bytes())
    else:
        torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("write", FORMS, ids=lambda f: f.__name__)
def test_evaluation_and_export_refuse_and_say_how_to_convert(write, tmp_path, monkeypatch):
    """Also where the environment asks torch to trust all files."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "marker"
    folder = tmp_path / "open_clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text("{}")
    paths = [tmp_path / "evil.pt", tmp_path / "evil.pth", folder / "open_clip_pytorch_model.bin"]
    for path in paths:
        write(marker, path)
    for path in (*paths, folder):
        convert = r"asks for posix\.open.*weights_only=False"
        with pytest.raises(DataError, match=f"(evil|open_clip).*{convert}"):
            weights.load(path)
    with pytest.raises(DataError):
        weights.load_official_unicl(paths[0])
    with pytest.raises(DataError):
        export.export(paths[0], "pt", tmp_path / "out")
    assert not marker.exists()


def test_the_commands_end_with_exit_code_3_and_one_line(tmp_path):
    archive(tmp_path / "marker", tmp_path / "evil.pt")
    evil = ["--checkpoint", str(tmp_path / "evil.pt"), "--output", str(tmp_path / "out")]
    for main, *more in (
        (zero_shot.main, "--datasets", "emoji_twemoji", "--workers", "0"),
        (export.main, "--format", "pt"),
    ):
        done = commands.finish(commands.Command(main, *evil, *more))
        assert done.returncode == 3, done.stderr
        assert "evil.pt" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "marker").exists()


def test_files_of_a_run_folder_are_refused_in_words(tmp_path):
    """Not safetensors, another safetensors, and a configuration that is no plain YAML."""
    run = tmp_path / "run"
    run_folder.write(run)
    marker = tmp_path / "marker"
    config = (run / "config.yaml").read_text()
    file = run / "checkpoints" / "step_0000007" / "model.safetensors"
    good = file.read_bytes()
    code = f"a: !!python/object/apply:os.open [{marker}, 64]"
    # A few lines that are gigabytes once their aliases are merged, or printed in an error.
    merged = [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 60)]
    merged = "\n".join(["a0: &a0 {k: 1}", *merged])
    printed = laughs(60).replace("model:", "a:") + "\nmodel: {embed_dim: *a59}"
    large = config + "#" * plain_yaml.MAX_BYTES
    for attack in (code, "a: [", "\x1b", "[" * 10**5, merged, printed, large):
        (run / "config.yaml").write_text(attack)
        with pytest.raises(DataError, match=r"config\.yaml"):
            weights.load(run)
    (run / "config.yaml").write_text(config)
    archive(marker, file)
    with pytest.raises(DataError, match=r"model\.safetensors.*not a safetensors file"):
        weights.load(run)
    for spoiled in (good[:100], good[:-9], b"\xff" * 8 + good[8:], (10**12).to_bytes(8, "little")):
        file.write_bytes(spoiled)
        with pytest.raises(DataError, match=r"model\.safetensors.*not a safetensors file"):
            weights.load(run)
    save_file({"model.x": torch.ones(1)}, file)
    with pytest.raises(DataError, match=r"model\.safetensors.*does not fit"):
        weights.load(run)
    file.write_bytes(good)
    assert weights.load(run).step == 7
    assert not marker.exists()


def test_bombs_are_refused_before_they_fill_the_memory(tmp_path):
    """A compressed archive, and a view that repeats one number a trillion times."""
    torch.save({"model": {"w": torch.zeros(10**6)}}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as source:
        parts = [(name, source.read(name)) for name in source.namelist()]
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in parts:
            target.writestr(name, data)
    assert len(weight_files.read(tmp_path / "good.pt")[0]["w"]) == 10**6
    with pytest.raises(DataError, match=r"bomb\.pt: .*is compressed"):
        weight_files.read(tmp_path / "bomb.pt")
    torch.save({"model": {"w": torch.zeros(1).expand(10**12)}}, tmp_path / "view.pt")
    with pytest.raises(DataError, match=r"view\.pt: 'w' claims the shape \(1000000000000,\)"):
        weight_files.read(tmp_path / "view.pt")


def test_the_switch_for_libraries_holds_inside_and_is_put_back(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, marker = tmp_path / "evil.pt", tmp_path / "marker"
    archive(marker, path)
    before = dict(os.environ)
    for _ in range(2):
        with (
            pytest.raises(DataError, match=r"step_7.*run code.*posix.open.*earlier checkpoint"),
            unpickling.plain_data_only(tmp_path / "step_7"),
        ):
            torch.load(path, weights_only=False)
    assert dict(os.environ) == before
    assert not marker.exists()
    torch.save({"a": Touch}, path)
    with unpickling.plain_data_only(tmp_path, [Touch]):
        assert torch.load(path, weights_only=False) == {"a": Touch}


def build_engine(stage: int):
    """A tiny engine after one step."""
    module = tiny.build()
    optimizer = optim.build(module.model, module.method, tiny.OPTIM)
    settings = {
        "train_batch_size": 12, "train_micro_batch_size_per_gpu": 12, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage}, "steps_per_print": 10**9,
    }  # fmt: skip
    engine = deepspeed_engine.initialise(module, optimizer, settings, torch.device("cpu"))
    Stepper(engine, Gather(), seed=3)(0, [tiny.make_batch(0, 12)])
    return engine


def attack_every_file(rank: int, world_size: int, folder: str, stage: int) -> list[str]:
    """Save, then replace one file after the other by a malicious one, and continue each time.

    As the same run, as one of another number of ranks (converted first), and from a converted
    checkpoint. Returns what happened.
    """
    run, marker, seen = Path(folder) / "run", Path(folder) / "marker", []
    engine = build_engine(stage)
    saved = checkpoint.save(engine, run, 1, IDENTITY, keep_last=2)
    facts = (saved / "run.json").read_text()
    other = facts.replace('"world_size": 1', '"world_size": 2')
    files = sorted(saved.glob("*.pt"))
    assert other != facts
    assert files

    def try_all(paths: list[Path]) -> None:
        for path in paths:
            good = path.read_bytes()
            torch.save({**torch.load(path, weights_only=False), "args": Touch(marker)}, path)
            try:
                checkpoint.load(engine, saved, IDENTITY)
                seen.append(f"{path.name}: loaded")
            except DataError as error:
                seen.append("refused" if "asks for posix.open" in str(error) else str(error))
            if marker.exists():
                seen.append(f"{path.name}: ran")
                marker.unlink()
            path.write_bytes(good)

    try_all(files)
    (saved / "run.json").write_text(other)
    try_all(files)
    assert checkpoint.load(engine, saved, IDENTITY) == 1  # converts
    try_all(sorted(saved.with_name(f"{saved.name}.universal").rglob("optimizer_state.pt")))
    (saved / "run.json").write_text(facts)
    assert checkpoint.load(engine, saved, IDENTITY) == 1
    weights_after = dict(deepspeed_engine.full_state(engine))
    good = load_file(saved / "model.safetensors")
    assert all(torch.equal(good[name], value) for name, value in weights_after.items())
    return seen


@pytest.mark.parametrize("stage", [1, 3])
def test_continuing_refuses_malicious_files_and_reads_its_own(tmp_path, stage):
    """DeepSpeed's load_checkpoint and converter call torch.load without `weights_only`."""
    [seen] = multiprocess.run(attack_every_file, 1, str(tmp_path), stage)
    assert set(seen) == {"refused"}, seen
    assert len(seen) >= 4
