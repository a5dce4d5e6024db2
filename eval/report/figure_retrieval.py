"""Retrieval by examples: queries, their best answers, and where the right one came."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from eval.report import palette
from eval.report.figures import LINE, Sheet, fitted, wrapped

BEST = 4  # answers shown of each query
TICK, CROSS = "✓", "✗"
# Inches.
SIDE, GAP, TEXT = 0.57, 0.06, 1.12
# Of a row whose right answer is first, and of one that shows it behind the best.
CAPTION_ROWS = (SIDE + 2 * LINE, SIDE + 2.8 * LINE)
IMAGE_ROWS = ((BEST + 0.4) * 1.15 * LINE, (BEST + 1.7) * 1.15 * LINE)


@dataclass
class Answer:
    """A candidate: an image or a caption, how similar it is, and whether it is a right answer."""

    content: object
    similarity: float
    right: bool


@dataclass
class Query:
    """A query, its BEST best answers, and of all right answers the most similar one with its rank
    (1 = found first; ties count against it)."""

    content: object
    best: list[Answer]
    truth: Answer
    rank: int


@dataclass
class Direction:
    """All queries of one kind: how often the right answer came first, and how often not among the
    BEST first; and examples of both."""

    queries: int
    candidates: int
    first: int
    missed: int
    successes: list[Query]
    failures: list[Query]


def retrieval(by_text: Direction, by_image: Direction, title: str) -> Figure:
    """Both directions one below the other: caption to images, image to captions."""
    title = wrapped(title, 56, 2)
    head = (3.4 + title.count("\n")) * LINE
    rows = [
        len(d.successes) * first + len(d.failures) * behind + 6.5 * LINE
        for d, (first, behind) in ((by_text, CAPTION_ROWS), (by_image, IMAGE_ROWS))
    ]
    sheet = Sheet(palette.WIDTH, head + sum(rows))
    sheet.text(0, 0, title, fontsize=palette.HEAD, weight="bold")
    key = f"Of each answer: rank, {TICK} right or {CROSS} wrong, similarity to the query"
    sheet.text(0, head - 2 * LINE, key, color=palette.DARK)
    sheet.top += head
    _direction(sheet, by_text, ("caption", "image"), _caption_row, CAPTION_ROWS)
    _direction(sheet, by_image, ("image", "caption"), _image_row, IMAGE_ROWS)
    return sheet.figure


def _direction(
    sheet: Sheet, found: Direction, kinds: tuple[str, str], row: Callable, sizes: tuple
) -> None:
    """Head, successes and failures of one direction; `kinds`: what a query and an answer
    are; `sizes`: inches of a row."""
    query, answer = kinds
    text = (
        f"{query.capitalize()} → {answer}s: {found.queries} {query}s, {found.candidates} {answer}s"
    )
    sheet.text(0, 0, text, fontsize=palette.HEAD, weight="bold")
    sheet.top += 1.6 * LINE
    behind = f"Right {answer} (shown last) behind the {BEST} best"
    for heading, count, examples, size in (
        (f"Right {answer} first", found.first, found.successes, sizes[0]),
        (behind, found.missed, found.failures, sizes[1]),
    ):
        share = f"{count} of {found.queries} ({100 * count / found.queries:.0f} %)"
        some = f", {len(examples)} of them:" if len(examples) < count else ""
        sheet.text(0, 0, f"{heading}: {share}{some}", color=palette.DARK)
        sheet.top += 1.6 * LINE
        for example in examples:
            row(sheet, example)
            sheet.top += size
        sheet.top += 0.4 * LINE


def _image(sheet: Sheet, x: float, image, color: str | None = None) -> None:
    """An image of SIDE x SIDE in the present row, framed in `color`."""
    axis = sheet.axes(x, 0, SIDE, SIDE)
    axis.imshow(image)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set(visible=True, color=color or "#bbb", linewidth=2 if color else 0.8)


def _verdict(answer: Answer) -> tuple[str, str]:
    """Sign and similarity of an answer, and their colour."""
    color = palette.RIGHT if answer.right else palette.WRONG
    return f"{TICK if answer.right else CROSS} {answer.similarity:.2f}", color


def _caption_row(sheet: Sheet, query: Query) -> None:
    """The caption, its best images in order, and the right image where it is not among them."""
    sheet.text(0, 0, fitted(query.content, TEXT, 6))
    x = TEXT + GAP
    for rank, answer in enumerate(query.best, 1):
        text, color = _verdict(answer)
        _image(sheet, x, answer.content, color)
        sheet.text(x, SIDE + 0.03, f"{rank}: {text}", color=color)
        x += SIDE + GAP
    if query.rank > len(query.best):
        x += 2 * GAP
        text, color = _verdict(query.truth)
        _image(sheet, x, query.truth.content, color)
        sheet.text(x, SIDE + 0.03, f"{query.rank}:\n{text}", color=color)


def _image_row(sheet: Sheet, query: Query) -> None:
    """The image, its best captions in order, and the right caption where it is not among them."""
    _image(sheet, 0, query.content)
    answers = list(enumerate(query.best, 1))
    if query.rank > len(query.best):
        answers.append((query.rank, query.truth))
    left = SIDE + 2 * GAP
    for line, (rank, answer) in enumerate(answers):
        text, color = _verdict(answer)
        below = line * 1.15 * LINE
        sheet.text(left + 0.32, below, f"{rank}:", color=color, ha="right")
        sheet.text(left + 0.38, below, text, color=color)
        caption = fitted(answer.content, sheet.width - left - 0.9)
        sheet.text(left + 0.9, below, caption, color=palette.DARK)
