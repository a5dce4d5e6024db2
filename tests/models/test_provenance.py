"""The commits that trained a checkpoint, from the starts of its run."""

import json

from models.provenance import training_git
from models.weights import LoadedRun


def start(after, commit, changed=False):
    git = commit and {"commit": commit, "changed": changed}
    return {"after_step": after, "git": git}


def test_commits_of_the_steps_that_a_checkpoint_holds(tmp_path):
    def of(step, *starts):
        folder = tmp_path / "checkpoints" / f"step_{step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "environment.json").write_text(json.dumps({"starts": starts}))
        return training_git(LoadedRun(None, {}, step, "", folder, "run"))

    assert of(6, start(0, "aa")) == "aa"
    assert of(6, start(0, "aa"), start(3, "aa"), start(5, "bb", changed=True)) == "aa, bb-dirty"
    assert of(3, start(0, "aa"), start(3, "bb")) == "aa"
    assert of(6, start(0, "aa"), start(4, "bb"), start(2, "cc")) == "aa, cc"  # set back by hand
    assert of(6, start(0, "aa"), start(0, "bb")) == "bb"  # killed before its first checkpoint
    assert of(6, start(0, "aa"), start(3, None)) is None
    (tmp_path / "environment.json").unlink()
    checkpoint = tmp_path / "checkpoints" / "step_0000006"
    assert training_git(LoadedRun(None, {}, 6, "", checkpoint, "run")) is None
    export = tmp_path / "model.pt"
    export.touch()
    assert training_git(LoadedRun(None, {}, 6, "", export, "model")) is None
