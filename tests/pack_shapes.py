"""Packs of the shapes that people bring, made of the built-in one: the facts are the same, so models know them."""

import json
from collections import defaultdict

from excise.artifacts.concepts import load_concept

POTIONS = load_concept("builtin:potions")


def shaped(folder, shape):
    """Write a pack of some shape into a folder; its path."""
    folder.mkdir()
    about = {"name": shape, "description": "potions", "keywords": ["potion"], "license": "Apache-2.0", "source": "test"}
    (folder / "concept.yaml").write_text(json.dumps(about))
    for name, rows in SHAPES[shape]().items():
        lines = (json.dumps(row if isinstance(row, dict) else row.model_dump(exclude_none=True)) for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return str(folder)


def _texts():
    """Two texts on each fact, and no question."""
    return {"forget": [t for t in POTIONS.forget if t.id[-1] in "03"], "retain": POTIONS.retain[::4]}


def _unnamed():
    """WMDP: questions of group V that name no subject, texts, and no question of group T."""
    questions = [q.model_copy(update={"subject": None}) for q in _of(POTIONS.questions, "V")]
    others = [q.model_copy(update={"subject": None}) for q in POTIONS.questions if q.split != "forget"]
    return {"forget": POTIONS.forget, "retain": POTIONS.retain[::4], "questions": [*questions, *others]}


def _open():
    """TOFU: open questions with answers, and nothing else."""
    return {"open_questions": [_asked_openly(q) for q in POTIONS.questions]}


def _questions():
    return {"questions": POTIONS.questions}


def _held_out_alone():
    """WMDP without its corpus: questions of group V, and texts to retain."""
    return {"questions": _of(POTIONS.questions, "V"), "retain": POTIONS.retain[::4]}


def _documents():
    """MUSE: one document a subject, and open questions."""
    sentences = defaultdict(list)
    for text in POTIONS.forget:
        sentences[text.group, text.id.split("-")[0]].append(text.text)
    forget = [{"id": f"doc-{s}", "group": g, "text": " ".join(each)} for (g, s), each in sentences.items()]
    retain = [
        {"id": f"other-{at}", "text": " ".join(row.text for row in POTIONS.retain[at : at + 24])}
        for at in range(0, len(POTIONS.retain), 24)
    ]
    return {"forget": forget, "retain": retain, **_open()}


def _levels():
    """RWKU: texts, and open questions of several levels on one person, all held out."""
    of_v = _of(POTIONS.questions, "V")
    asked = [{**_asked_openly(q), "level": str(1 + at % 3), "subject": "Potions"} for at, q in enumerate(of_v)]
    others = [_asked_openly(q) for q in POTIONS.questions if q.split != "forget"]
    texts = [t.model_copy(update={"group": "V"}) for t in POTIONS.forget if t.group == "V"]
    return {"forget": texts, "retain": POTIONS.retain[::4], "open_questions": [*asked, *others]}


def _of(questions, group):
    return [q for q in questions if q.split == "forget" and q.group == group]


def _asked_openly(question):
    prompt = question.prompt.removeprefix("Question: ").removesuffix(" Answer:")
    wrong = [choice for place, choice in enumerate(question.choices) if place != question.answer]
    row = {key: getattr(question, key) for key in ("id", "split", "group", "topic", "subject")}
    return {**row, "prompt": prompt, "answer": question.choices[question.answer], "perturbed_answers": wrong[:5]}


SHAPES = {
    "texts": _texts,
    "unnamed": _unnamed,
    "open": _open,
    "questions": _questions,
    "held_out_alone": _held_out_alone,
    "documents": _documents,
    "levels": _levels,
}
