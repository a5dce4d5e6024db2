"""The page of benchmark results says what the stored results say."""

import json

from benchmarks import gpu, table


def test_the_page_is_made_of_the_stored_results():
    assert table.PAGE.read_text(encoding="utf-8") == table.write(), "run python -m benchmarks.table"


def test_a_missed_target_stands_out():
    machine = {"cores": 2, "cpu": "some", "torch": "2"}
    shared = {"machine": machine, "date": "today", "target": "<= 1"}
    rows = [{**shared, "name": "a", "value": 0.51239, "met": True, "B": 8}]
    rows += [{**shared, "name": "|b|", "value": 1.5, "met": False}]
    lines = table._section("x", rows).splitlines()
    assert "| a (B 8) | 0.5124 | <= 1 |" in lines
    assert "| \\|b\\| | **1.5** | <= 1, missed |" in lines


def test_gpu_rows_have_a_section_of_their_own_with_the_name_of_the_card(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    facts = {"gpu": "NVIDIA H100", "torch": "2.11", "commit": "abc", "date": "today"}
    rows = [
        {"name": "time", "value": 0.5, "B": 8, "target": "<= 0.7", "met": True, **facts},
        {"name": "ours: no time left", "B": 16, **facts},
        {"name": "ours", "value": 2.0, "utilisation": 0.25, **facts, "gpu": "NVIDIA A100"},
    ]
    (tmp_path / "gpu_loss.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = table.write()
    before, after = page.split("# On one GPU")
    assert "gpu_loss" not in before
    h100, a100 = (
        after.index("NVIDIA H100, torch 2.11, commit abc, today."),
        after.index("NVIDIA A100"),
    )
    assert h100 < after.index("| time (B 8) | 0.5 | <= 0.7 |") < a100
    assert h100 < after.index("| ours: no time left (B 16) |  |  |") < a100
    assert a100 < after.index("| ours (utilisation 0.25) | 2 |  |")
    assert "Not run yet: `python -m benchmarks.gpu_step`." in after


def test_gpu_jobs_keep_to_the_budget_and_rows_are_written_one_by_one(tmp_path):
    path, seen = tmp_path / "gpu_x.jsonl", []
    path.write_text(json.dumps({"name": "old", "section": "a"}) + "\n"
                    + json.dumps({"name": "kept", "section": "b"}) + "\n")  # fmt: skip

    def rows():
        yield {"name": "first", "value": 1.0}
        seen.append([json.loads(line)["name"] for line in path.read_text().splitlines()])
        yield {"name": "second", "value": 2.0}

    def memory():
        yield {"name": "half", "value": 1.0}
        raise gpu.torch.cuda.OutOfMemoryError

    jobs = [gpu.Job("x", rows, 1, {"B": 8}), gpu.Job("y", memory, 1), gpu.Job("z", rows, 60)]
    gpu.write(path, gpu.execute({"a": lambda: jobs}, budget=30), {"a"})
    assert seen == [["kept", "first"]]
    stored = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["name"] for row in stored] == [
        "kept", "first", "second", "half", "y: out of memory", "z: no time left",
    ]  # fmt: skip
    assert stored[1] == {"name": "first", "value": 1.0, "section": "a", "B": 8}
