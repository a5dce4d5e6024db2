"""What the missing cells of a study will take, as far as finished cells of their arms tell."""

from studies._cells import Cell


def seconds(cells: list[Cell], every: list[Cell], took: dict[str, list[float]]) -> float | None:
    """Time that cells will take: as others of their arm took, else as all took on average."""
    known = _known(every) | {arm: sum(v) / len(v) for arm, v in took.items()}
    if not known:
        return None
    average = sum(known.values()) / len(known)
    return sum(known.get(cell.arm, average) for cell in cells)


def listing(missing: list[Cell], every: list[Cell]) -> list[str]:
    """A line for each missing cell: what it lacks, steps, samples, and minutes where known."""
    known = _known(every)
    lines, samples, total = [], 0, 0.0
    for cell in missing:
        line = f"  {cell.name:<28}"
        if cell.trained():
            lines.append(line + " " + "; ".join(_names(pair) for pair in cell.lacking()))
            continue
        steps = cell.steps()
        if steps is None:
            lines.append(f"{line} {cell.cfg.train.epochs:g} epochs of its data")
            continue
        left = steps - cell.done_steps()
        count = left * cell.cfg.train.global_batch
        samples += count
        line += f" {left} steps, {count} samples"
        if cell.done_steps():
            line += f" (after step {cell.done_steps()})"
        if cell.arm in known:
            part = known[cell.arm] * left / steps
            total += part
            line += f", {part / 60:.1f} min of training"
        lines.append(line)
    unknown = sorted({cell.arm for cell in missing if not cell.trained()} - known.keys())
    last = f"  in all {samples} samples, {total / 60:.1f} min of training"
    if unknown:
        last += f" and that of {', '.join(unknown)}, of which no cell is finished"
    return [*lines, last] if missing else []


def _names(pair) -> str:
    return f"{pair[0].task} on {' '.join(pair[1])}"


def _known(every: list[Cell]) -> dict[str, float]:
    """Seconds of a training by arm, of those that have a finished cell."""
    known: dict[str, float] = {}
    for cell in every:
        if cell.arm not in known and (seconds := cell.training_seconds()):
            known[cell.arm] = seconds
    return known
