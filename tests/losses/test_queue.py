"""The queue against a list from which the oldest rows fall out."""

import copy
import math

import pytest
import torch

from losses import _queue
from losses._queue import Queue, largest


def step(queue, rows):
    queue.keep(rows)
    queue.write()


def test_equals_a_list_that_forgets_its_oldest():
    torch.manual_seed(0)
    queue, remembered = Queue(10, 3), []
    assert not queue.filled().any()
    # Less than it holds, a wrap around, none, as many as it holds, more, and more than twice.
    for count in (4, 4, 7, 0, 10, 13, 25, 3):
        rows = torch.randn(count, 3)
        step(queue, rows)
        remembered = (remembered + rows.tolist())[-10:]
        held = queue.rows[queue.filled()]
        assert sorted(held.tolist()) == sorted(torch.tensor(remembered).tolist())
    assert queue.written.tolist() == [66]


def test_a_row_is_overwritten_by_the_one_that_comes_size_later():
    queue = Queue(4, 1)
    step(queue, torch.tensor([[0.0], [1.0], [2.0]]))
    assert queue.rows[:, 0].tolist() == [0, 1, 2, 0]
    assert queue.filled().tolist() == [True, True, True, False]
    step(queue, torch.tensor([[3.0], [4.0]]))
    assert queue.rows[:, 0].tolist() == [4, 1, 2, 3]
    step(queue, torch.arange(5.0, 12)[:, None])  # 8 to 11 stay, in the places of 0 to 3
    assert queue.rows[:, 0].tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("tile", [1, 4, 100])
def test_the_nearest_row_is_found_among_those_that_were_written(tile, monkeypatch):
    monkeypatch.setattr(_queue, "TILE", tile)
    monkeypatch.setattr(_queue, "QUERIES", 4)
    torch.manual_seed(2)
    queue, queries = Queue(11, 3), torch.randn(6, 3)
    assert queue.nearest(queries).tolist() == [[0.0] * 3] * 6
    for count in (1, 5, 9):
        step(queue, torch.randn(count, 3) - 2)  # most products are negative: a 0 would win
        held = queue.rows[queue.filled()]
        expected = [max(held.tolist(), key=lambda row, q=q: q @ torch.tensor(row)) for q in queries]
        assert queue.nearest(queries).tolist() == expected
    assert queue.nearest(queries[:0]).shape == (0, 3)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200, 256])
def test_the_largest_number_and_its_place_are_those_of_max(columns):
    torch.manual_seed(columns)
    products = torch.randn(30, columns)
    products[:, columns // 2 + 1 :] = -math.inf  # as of rows that hold nothing
    for ours, theirs in zip(largest(products), products.max(1), strict=True):
        assert torch.equal(ours, theirs)


def test_all_there_is_lies_in_buffers():
    torch.manual_seed(1)
    first, second = Queue(5, 2), Queue(5, 2)
    step(first, torch.randn(7, 2))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(3):
        rows = torch.randn(2, 2)
        step(first, rows)
        step(second, rows)
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.filled(), second.filled())


def test_rows_are_written_in_float32_and_without_gradient():
    queue = Queue(4, 2)
    step(queue, torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True) / 3)
    assert queue.rows.dtype == torch.float32
    assert not queue.rows.requires_grad


def test_a_step_without_rows_is_an_error():
    queue = Queue(4, 2)
    step(queue, torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="before its loss kept rows"):
        queue.write()


def test_nothing_waits_for_the_device():
    """Tensors without data: reading a value from them raises."""
    with torch.device("meta"):
        queue = Queue(4, 2)
        for _ in range(3):
            step(queue, torch.zeros(3, 2))
            queue.filled()
            queue.nearest(torch.zeros(2, 2))
