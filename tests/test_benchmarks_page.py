"""The page of benchmark results says what the stored results say."""

from benchmarks import table


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
