"""Rows of commands that run at the same time: none is lost."""

import multiprocessing

from eval import rows

PROCESSES, SETS = 4, 15
FIELDS = ("checkpoint_hash", "prompt_digest")


def write(folder, process):
    for number in range(SETS):
        row = dict.fromkeys(FIELDS, "x") | {"run": "tiny", "task": "knn"}
        rows.write_rows(folder, [row | {"dataset": f"{process}_{number}", "value": number}])


def test_array_tasks_of_one_run_keep_each_others_rows(tmp_path):
    context = multiprocessing.get_context("fork")
    tasks = [context.Process(target=write, args=(tmp_path, k)) for k in range(PROCESSES)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
        assert task.exitcode == 0
    found = rows.read_rows(tmp_path / "tiny_knn.jsonl")
    expected = {f"{k}_{number}" for k in range(PROCESSES) for number in range(SETS)}
    assert {row["dataset"] for row in found} == expected
    assert len(found) == len(expected)
