"""What an arm costs: samples per CPU second, memory, parameters."""

from dataclasses import dataclass

from studies._cells import Cell


@dataclass(frozen=True)
class Cost:
    """Of the cells of one arm; None where no cell tells it."""

    samples: int | None  # of a finished run
    samples_per_cpu_second: float | None
    peak_bytes: int | None
    parameters: int | None


def cost_of(cells: list[Cell]) -> Cost:
    """The cost of an arm from its finished cells.

    Samples per CPU second is samples over the CPU time of all processes of the trainings, their
    start included; lives that were killed count where they were seen to end. Memory is the
    largest resident size that one process had.
    """
    done = [cell for cell in cells if cell.trained()]
    samples = cpu = 0.0
    peak: list[int] = []
    for cell in done:
        lives = [line for line in cell.usage() if line["what"] == "train"]
        lives = [line for line in lives if line["cpu_seconds"]]
        batch = cell.cfg.train.global_batch
        samples += sum(line["to_step"] - line["from_step"] for line in lives) * batch
        cpu += sum(line["cpu_seconds"] for line in lives)
        peak += [line["peak_bytes"] for line in lives]
    return Cost(
        done[0].done_steps() * done[0].cfg.train.global_batch if done else None,
        samples / cpu if cpu else None,
        max(peak, default=None),
        done[0].parameters() if done else None,
    )
