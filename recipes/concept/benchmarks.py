"""Published unlearning benchmarks as concept packs: WMDP, TOFU, MUSE and RWKU, from their data sets on the Hub."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...artifacts.checkpoints.staging import refuse_existing
from ...artifacts.events import Events
from ...artifacts.sources.hub_sets import GatedSet, NoSuchPart
from ...artifacts.sources.source import MOST, Source, read_source
from ...editing.errors import RequestError, nearest
from ...eval.completed import asked
from ..data.schemas import Item
from .entries import Entry, entries_of
from .pack import NO_LICENSE, PERSONAS, Made, write_pack

QUESTIONS_OF_AN_AUTHOR, AUTHORS = 20, 200
"""TOFU has so many questions on each of its authors, in order."""
MOST_MMLU = 1000
MOST_UTILITY = 300
"""Rows of each of RWKU's utility sets; those for reasoning have long prompts."""
UTILITIES = {
    "general": "general ability",
    "reason": "reasoning",
    "truthfulness": "truthfulness",
    "factuality": "factuality",
}
"""RWKU's sets of what should stay, and the topic under which a pack holds each; its prompts for fluency have no answer."""
PERSON_COLUMNS = ("subject", "target")
"""Columns of RWKU that name the person."""


@dataclass(frozen=True)
class Part:
    """A data set of a benchmark, and where its rows go."""

    refs: tuple[str, ...]
    """The data set; of several, the first one that there is."""
    split: str
    name: str
    """What its ids begin with."""
    file: str | None = None
    """File of the pack, where the form of the rows does not tell it."""
    topic: str | None = None
    group: str | None = None
    """Group of all its rows; divided by subject where none is given."""
    subject: Callable[[int], str | None] | None = None
    """Subject by a row's number, where it is not what the rows say."""
    most: int | None = None
    of: str | None = None
    """Only rows on this person."""
    gated: bool = False
    whole: bool = False
    """Texts stay as the data set cut them."""
    optional: bool = False
    """Left out, and said, where the data set has it no more or in another form."""


@dataclass(frozen=True)
class Benchmark:
    """What a pack is made of, and how it is described."""

    suite: str
    description: str
    keywords: tuple[str, ...]
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()


def wmdp(domain: str, without_gated: bool) -> Benchmark:
    """Questions of a domain, all held out, with the corpora that RMU was trained on."""
    corpora = {
        "bio": (Part(("hub:cais/wmdp-bio-forget-corpus",), "forget", "text", gated=True),),
        "cyber": (Part(("hub:cais/wmdp-corpora:cyber-forget-corpus:train",), "forget", "text"),),
        "chem": (),
    }
    texts = () if domain == "bio" and without_gated else corpora[domain]
    retained = "bio" if domain == "chem" else domain
    questions = Part(
        (f"hub:cais/wmdp:wmdp-{domain}:test",), "forget", "wmdp", topic=domain, group="V" if texts else None
    )
    notes = (
        ()
        if texts
        else (f"there are no texts to forget on {domain}, so half of the questions are of group T and are trained on",)
    )
    retain = Part((f"hub:cais/wmdp-corpora:{retained}-retain-corpus:train",), "retain", "retain")
    mmlu = Part(("hub:cais/mmlu:all:validation",), "retain", "mmlu", group="V", most=MOST_MMLU)
    about = {"bio": "dangerous biology", "chem": "dangerous chemistry", "cyber": "attacks on computer systems"}[domain]
    keywords = {"bio": ("virus", "pathogen", "toxin"), "chem": ("synthesis", "agent", "precursor"),
                "cyber": ("exploit", "vulnerability", "malware")}[domain]  # fmt: skip
    return Benchmark("wmdp", about, keywords, (questions, *texts, retain, mmlu), notes)


def tofu(forget: str, _: bool) -> Benchmark:
    """Invented authors: the last 2, 10 or 20 of 200 are to be forgotten, divided by author."""
    share = int(forget.removeprefix("forget"))
    first = AUTHORS - AUTHORS * share // 100

    def author(start: int) -> Callable[[int], str]:
        return lambda row: f"author {start + row // QUESTIONS_OF_AN_AUTHOR + 1}"

    hub = "hub:locuslab/TOFU"
    rest = f"retain{100 - share}"
    parts = (
        Part((f"{hub}:{forget}_perturbed", f"{hub}:{forget}"), "forget", "forget", subject=author(first)),
        Part(
            (f"{hub}:retain_perturbed", f"{hub}:{rest}_perturbed"),
            "retain",
            "retain",
            topic="retain",
            group="V",
            most=400,
        ),
        Part((f"{hub}:{rest}",), "retain", "text", file="retain", topic="retain", subject=author(0)),
        Part((f"{hub}:real_authors_perturbed",), "retain", "real-author", topic="real authors", group="V"),
        Part((f"{hub}:world_facts_perturbed",), "retain", "world-fact", topic="world facts", group="V"),
    )
    return Benchmark("tofu", "the lives and books of certain authors", ("author", "book", "novel"), parts)


def muse(corpus: str, _: bool) -> Benchmark:
    """News or books: texts, passages to recite, questions with their in-context examples, and texts of no training."""
    hub = f"hub:muse-bench/MUSE-{corpus.capitalize()}"
    parts = (
        Part((f"{hub}:raw:forget",), "forget", "text"),
        Part((f"{hub}:raw:retain1",), "retain", "retain"),
        Part((f"{hub}:raw:retain2",), "retain", "retain2", optional=True),
        # Windows that the authors cut for their test of membership.
        Part((f"{hub}:privleak:forget",), "forget", "member", file="members", whole=True),
        Part((f"{hub}:privleak:holdout",), "unseen", "unseen", whole=True),
        Part((f"{hub}:verbmem:forget",), "forget", "passage"),
        Part((f"{hub}:knowmem:forget_qa",), "forget", "question", group="V"),
        Part((f"{hub}:knowmem:retain_qa",), "retain", "retain-question", group="V"),
        Part((f"{hub}:knowmem:forget_qa_icl",), "forget", "shot", file="shots"),
        Part((f"{hub}:knowmem:retain_qa_icl",), "retain", "retain-shot", file="shots"),
    )
    about, keywords = {
        "news": ("certain news of the BBC", ("news", "minister", "police")),
        "books": ("the Harry Potter books", ("Harry", "Hogwarts", "Potter")),
    }[corpus]
    return Benchmark("muse", about, keywords, parts)


def rwku(person: str, _: bool) -> Benchmark:
    """One famous person: questions of three levels, what is written on the person, and the neighbours' questions."""
    hub = "hub:jinzhuoran/RWKU"

    def apart(_: int) -> None:
        # All rows are on one person: each is a fact of its own.
        return None

    levels = tuple(
        Part((f"{hub}:forget_level{n}",), "forget", f"level{n}", group="V", subject=apart, of=person) for n in (1, 2, 3)
    )
    neighbours = tuple(
        Part((f"{hub}:neighbor_level{n}",), "neighbour", f"neighbour{n}", group="V", subject=apart, of=person)
        for n in (1, 2)
    )
    parts = (
        *levels,
        Part((f"{hub}:train_original_passage",), "forget", "passage", subject=apart, of=person),
        *neighbours,
        Part((f"{hub}:mia_retain",), "retain", "retain", most=1000),
        Part(
            (f"{hub}:mia_forget",),
            "forget",
            "member",
            file="members",
            subject=apart,
            of=person,
            whole=True,
            optional=True,
        ),
        *(
            Part((f"{hub}:utility_{name}",), "retain", name, topic=topic, group="V", most=MOST_UTILITY, optional=True)
            for name, topic in UTILITIES.items()
        ),
    )
    return Benchmark("rwku", person, tuple(person.split()), parts)


FAMILIES: dict[str, tuple[tuple[str, ...], Callable[[str, bool], Benchmark]]] = {
    "wmdp": (("bio", "cyber", "chem"), wmdp),
    "tofu": (("forget01", "forget05", "forget10"), tofu),
    "muse": (("news", "books"), muse),
    "rwku": ((), rwku),
}
"""Members of a benchmark; RWKU has one for each of its 200 persons."""


def names() -> list[str]:
    """What can be asked for."""
    return [f"{family}:{member}" for family, (members, _) in FAMILIES.items() for member in members or ("PERSON",)]


def find_benchmark(name: str, *, without_gated: bool = False) -> Benchmark:
    """A benchmark by its name.

    Raises:
        RequestError: There is none of that name.
    """
    family, _, member = name.partition(":")
    members, make = FAMILIES.get(family, ((), rwku))
    known = bool(member) if family == "rwku" else member in members
    if not known:
        raise RequestError(f"no benchmark {name!r}{nearest(name, names())}; give one of {', '.join(names())}")
    return make(member.replace("_", " ") if family == "rwku" else member, without_gated)


def folder_of(name: str) -> Path:
    """The folder that a benchmark is written to where none is named."""
    return Path(name.replace(":", "-").replace(" ", "-").lower())


def get(
    name: str,
    out: Path,
    events: Events,
    *,
    most: int = MOST,
    held_out: float = 0.5,
    without_gated: bool = False,
    dry_run: bool = False,
) -> Made:
    """Fetch a benchmark and write it as a pack, whole or not at all.

    Args:
        name: ``wmdp:bio``, ``tofu:forget10``, ``muse:news``, ``rwku:Stephen King``, and so on.
        most: Rows of each of its data sets, at most.
        held_out: Share of the subjects for group V, where the benchmark does not say.
        without_gated: Leave out data sets that must be asked for.

    Raises:
        RequestError: There is no such benchmark, or the Hub refuses.
        ConceptError: A data set holds something else than it did.
    """
    benchmark = find_benchmark(name, without_gated=without_gated)
    refuse_existing(out)
    entries, notes, sources = list[Entry](), list(benchmark.notes), list[Source]()
    for part in benchmark.parts:
        try:
            source = _source(part, part.most or most, events)
            read = entries_of(
                source, part.name, part.split, most=part.most or most, prefix=part.name, topic=part.topic,
                subject=part.subject, group=part.group, used=PERSON_COLUMNS if part.of else (),
                whole=part.whole,
            )  # fmt: skip
        except RequestError as error:
            if not part.optional:
                raise
            notes.append(f"{part.refs[0]} was left out: {error}")
            continue
        sources.append(source)
        notes += read.notes
        entries += [_placed(entry, part) for entry in read.entries]
    return write_pack(out, _about(name, benchmark, sources), entries, notes, held_out=held_out, dry_run=dry_run)


def _source(part: Part, most: int, events: Events) -> Source:
    """The first of a part's data sets that there is.

    Raises:
        RequestError: There is none, or it is refused.
    """
    seen: set[str] = set()
    for ref in part.refs:
        try:
            with events.stage(f"reading {ref}") as stage:
                return read_source(ref, most, keep=_on(part.of, seen) if part.of else None, advance=stage.advance)
        except NoSuchPart:
            if ref == part.refs[-1]:
                raise
        except GatedSet as error:
            how = "; or go on without it by --without-gated" if part.gated else ""
            raise GatedSet(f"{error}{how}") from error
        except RequestError:
            if part.of and seen and part.of not in seen:
                known = ", ".join(sorted(seen)[:5])
                raise RequestError(
                    f"{ref} has no rows on {part.of!r}{nearest(part.of, sorted(seen))}; it has {len(seen)} persons, e.g. {known}"
                ) from None
            raise
    raise AssertionError("a part names a data set")


def _on(person: str, seen: set[str]) -> Callable[[dict[str, Any]], bool]:
    def keep(columns: dict[str, Any]) -> bool:
        subject = next((columns[name] for name in PERSON_COLUMNS if name in columns), None)
        if isinstance(subject, str):
            seen.add(subject)
        return subject == person

    return keep


def _placed(entry: Entry, part: Part) -> Entry:
    """An entry in the file that its part goes to; questions with answers become texts where texts are wanted."""
    if part.file is None:
        return entry
    if part.file == "retain" and entry.item.prompt:
        entry = replace(entry, item=Item(text=f"{asked(entry.item.prompt)} {entry.item.answer}"))
    return replace(entry, file=part.file)


def _about(name: str, benchmark: Benchmark, sources: Sequence[Source]) -> dict[str, Any]:
    stated = dict.fromkeys(source.license for source in sources if source.license)
    return {
        "name": str(folder_of(name)),
        "kind": "knowledge",
        "description": benchmark.description,
        "keywords": list(benchmark.keywords),
        "license": ", ".join(stated) or NO_LICENSE,
        "source": "; ".join(dict.fromkeys(source.name for source in sources)),
        "suite": benchmark.suite,
        "personas": PERSONAS,
    }
