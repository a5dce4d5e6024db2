"""Order of the test files, so that two workers end at the same time."""

# The longest first, by their time on two cores. `pytest -n 2 --dist loadfile` deals the first four
# out in turns: one worker gets both files of tests/slurm, which share one cluster.
LONGEST = (
    "tests/kill/test_kill.py",
    "tests/slurm/test_training.py",
    "tests/data_prep/test_quickstart.py",
    "tests/slurm/test_chain.py",
    "tests/data_prep/test_img2ds_kill.py",
    "tests/engine/test_train.py",
    "tests/eval/test_two_processes.py",
    "tests/engine/test_watchers.py",
    "tests/eval/test_in_training.py",
    "tests/eval/test_finetune.py",
    "tests/engine/test_step.py",
    "tests/engine/test_universal.py",
    "tests/eval/test_end_to_end.py",
)


def pytest_collection_modifyitems(items):
    """Sort the tests by their file's place in LONGEST; the others keep their order behind."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(places)))
