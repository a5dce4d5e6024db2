"""Visual concepts of captions: the noun entities that spaCy finds, counted.

Table 1 of UniCL (arXiv 2204.03610) counts, for caption sets, the distinct noun entities that
occur more than 5 times. How an entity is cut out is taken from the same group's K-LITE
(microsoft/klite, load_wiki/build_dataset.py, with en_core_web_sm): of each noun chunk that is not
a pronoun, the lemma of the head with the lemmas of its compound children. Here the compounds stay
in the order of the text, and case is folded.
"""

import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TYPE_CHECKING

from data_prep.checks.verify_pool import end_with_parent
from loaders.errors import DataError
from loaders.progress import Progress

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc

MORE_THAN = 5  # occurrences of a concept, by the paper
_ZONE = 1000  # texts that a process takes at a time
_nlp = None  # the pipeline of a worker process


def load(model: str) -> "Language":
    """A spaCy pipeline by its name or folder. `DataError` if there is no such model."""
    import spacy  # takes seconds

    try:
        return spacy.load(model, exclude=["ner"])
    except OSError:
        raise DataError(
            f"--captions-model {model}: spaCy has no such model; python -m spacy download {model} "
            "fetches it (or name the folder of one)"
        ) from None


def noun_entities(doc: "Doc") -> list[str]:
    """Noun entities of a parsed text, in its order; one that occurs twice is there twice.

    Raises `DataError` if the pipeline made no parse, no parts of speech or no lemmas.
    """
    for layer, part in (("DEP", "parser"), ("POS", "tagger"), ("LEMMA", "lemmatizer")):
        if len(doc) and not doc.has_annotation(layer):
            raise DataError(
                f"--captions-model: the pipeline gives no {layer} (it needs a {part}); take a "
                "complete one, such as en_core_web_sm"
            )
    found = []
    for chunk in doc.noun_chunks:
        head = chunk.root
        if head.pos_ != "PRON":
            words = [child.lemma_ for child in head.children if child.dep_ == "compound"]
            found.append(" ".join([*words, head.lemma_]).casefold())
    return found


def count(
    texts: Iterable[str], model: str, processes: int = 1, total: int | None = None
) -> Counter:
    """Number of occurrences of each noun entity in `texts`.

    `processes`: 1 is this one. `total`: number of texts, for the time left. Memory grows with the
    distinct entities only. Raises `DataError` as `load` and `noun_entities`.
    """
    counts: Counter = Counter()
    texts = iter(texts)
    zones = iter(lambda: list(islice(texts, _ZONE)), [])
    with Progress(total=total, unit="text", desc="noun entities") as bar:
        for number, found in _count_zones(zones, model, processes):
            counts.update(found)
            bar.update(number)
    return counts


def _count_zones(
    zones: Iterator[list[str]], model: str, processes: int
) -> Iterator[tuple[int, Counter]]:
    """Number of texts and counts of each zone, in any order.

    Not by spaCy's own `n_process`: it sends every parsed text back to the parent, which then
    spends more time on it than two workers do.
    """
    if processes == 1:
        nlp = load(model)
        yield from ((len(zone), _count_zone(nlp, zone)) for zone in zones)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_worker, (model,)) as pool:
        pending = {pool.submit(_work, zone): len(zone) for zone in islice(zones, 2 * processes)}
        try:
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(future), future.result()
                    pending |= {pool.submit(_work, zone): len(zone) for zone in islice(zones, 1)}
        except BrokenProcessPool:
            raise DataError(
                "a process of --captions-model was killed (out of memory?); run the same command "
                "with fewer --workers"
            ) from None


def _start_worker(model: str) -> None:
    global _nlp
    end_with_parent()
    _nlp = load(model)


def _work(zone: list[str]) -> Counter:
    return _count_zone(_nlp, zone)


def _count_zone(nlp: "Language", zone: list[str]) -> Counter:
    counts: Counter = Counter()
    with nlp.memory_zone():  # else spaCy would keep every word that it has ever seen
        for doc in nlp.pipe(zone):
            counts.update(noun_entities(doc))
    return counts


def frequent(counts: Counter) -> dict[str, int]:
    """The concepts: entities that occur more than `MORE_THAN` times, the most frequent first."""
    return {entity: n for entity, n in counts.most_common() if n > MORE_THAN}


def vocabulary(names: Iterable[str]) -> int:
    """Number of distinct words in the names of concepts, as Table 1 of the paper counts them.

    Words are what white space separates, as they are written. So the names of ImageNet-1K that
    OpenAI published have the 1,233 words of Table 1, those of CIFAR-100 the 105.
    """
    return len(set(_words(names)))


def _words(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        yield from name.replace("_", " ").split()
