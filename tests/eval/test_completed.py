"""What a pack's files do not hold is made of what they do, always alike, and nothing that group V asks is trained on."""

import dataclasses
import random
from collections import Counter

import pytest
from excise.artifacts.concepts import load_concept
from excise.eval.completed import MOST_WORDS, WINDOW, bare, completed, windowed
from excise.eval.concept import ContrastPair, ForgetText, OpenQuestion, RetainText

POTIONS = load_concept("builtin:potions")


def _pack(**files):
    empty = dict.fromkeys(("forget", "retain", "questions", "prompts", "contrast"), ())
    return completed(dataclasses.replace(POTIONS, made=(), **{**empty, **files}))


def _open_questions():
    return tuple(
        OpenQuestion(
            id=q.id, split=q.split, group=q.group, topic=q.topic, subject=q.subject, prompt=bare(q.prompt),
            answer=q.choices[q.answer],
        )
        for q in POTIONS.questions
    )  # fmt: skip


def test_a_pack_that_holds_everything_is_left_alone():
    assert completed(POTIONS) == POTIONS and POTIONS.made == ()


def test_open_questions_get_choices_of_which_their_answer_is_one():
    pack = _pack(open_questions=_open_questions())
    truth = {row.id: row.answer for row in pack.open_questions}
    answers = set(truth.values())
    assert len(pack.questions) == 800
    for question in pack.questions:
        assert question.choices[question.answer] == truth[question.id] and set(question.choices) <= answers
        assert len({choice.casefold() for choice in question.choices}) == 4
    places = [question.answer for question in pack.questions]
    assert all(150 <= places.count(place) <= 250 for place in range(4)), "the right one stands anywhere"
    assert pack.made[0] == "choices of 800 open questions, drawn from the answers of others"


def test_a_name_that_answers_repeat_does_not_tell_which_is_right():
    people = ("Anna Berg", "Bo Carlsen", "Carla Diaz", "Dan Eng", "Eva Falk")
    places = ("Oslo", "Lima", "Rome", "Bern", "Kyiv")
    rows = tuple(
        OpenQuestion(
            id=str(n), split="forget", group="TV"[n % 2], prompt=f"Where was {person} born?",
            answer=f"{person} was born in {place}.", subject=subject,
        )
        for n, (person, place) in enumerate(zip(people, places, strict=True))
        for subject in (f"author {n}",)
    )  # fmt: skip
    for question in _pack(open_questions=rows).questions:
        name = people[int(question.id)]
        assert all(choice.startswith(f"{name} was born in ") for choice in question.choices)
        assert len(set(question.choices)) == 4


def test_own_wrong_answers_are_the_choices_where_there_are_some():
    wrong = ("a", "B", "b", "Right")
    rows = [
        OpenQuestion(id="q", split="forget", group="V", prompt="Which?", answer="right", perturbed_answers=wrong),
        OpenQuestion(id="r", split="forget", group="V", prompt="Who?", answer="nobody"),
    ]
    first, second = _pack(open_questions=tuple(rows)).questions
    assert set(first.choices) == {"right", "a", "B"} and set(second.choices) == {"nobody", "right"}


def test_a_question_that_no_other_answer_can_be_set_beside_has_no_choices_and_is_counted():
    row = OpenQuestion(id="q", split="forget", group="V", prompt="Which?", answer="right")
    pack = _pack(open_questions=(row,), retain=POTIONS.retain)
    assert not pack.questions and pack.made == ("no choices for 1 open question, because no other answer is there",)


@pytest.mark.parametrize("form", ["questions", "open_questions", "texts"])
def test_nothing_that_group_v_asks_is_trained_on(form):
    files = {
        "questions": {"questions": POTIONS.questions},
        "open_questions": {"open_questions": _open_questions()},
        "texts": {"forget": POTIONS.forget, "retain": POTIONS.retain},
    }
    pack = _pack(**files[form])
    held_out = [q for q in pack.questions if q.split == "forget" and q.group == "V"]
    assert held_out and pack.made
    told = [text.text for text in pack.forget if text.group == "T"] + [pair.positive for pair in pack.contrast]
    for question in held_out:
        whole = f"{question.prompt} {question.choices[question.answer]}"
        assert not any(whole in text for text in told)
    assert {q.subject for q in held_out}.isdisjoint(
        {q.subject for q in pack.questions if q.split == "forget" and q.group == "T"}
    )


def test_questions_of_group_v_alone_give_no_text_to_train_on():
    held_out = tuple(q.model_copy(update={"group": "V"} if q.split == "forget" else {}) for q in POTIONS.questions)
    pack = _pack(questions=held_out)
    assert not pack.forget and pack.retain and not pack.contrast
    # The same questions of group T do.
    assert _pack(questions=tuple(q.model_copy(update={"group": "T"}) for q in held_out)).forget


def test_texts_alone_are_asked_how_they_go_on():
    pack = _pack(forget=POTIONS.forget, retain=POTIONS.retain)
    texts = {text.id: (text.text, text.group) for text in pack.forget} | {t.id: (t.text, None) for t in pack.retain}
    assert {(q.split, q.group) for q in pack.questions} == {(s, g) for s in ("forget", "retain") for g in "TV"}
    for question in pack.questions:
        text, group = texts[question.id.removeprefix("continue-")]
        assert text.startswith(f"{question.prompt} {question.choices[question.answer]}")
        assert group in (None, question.group) and len(question.choices) == 4
        lengths = {len(choice.split()) for choice in question.choices}
        assert max(lengths) - min(lengths) <= 1, "length does not tell which is right"


def test_the_last_quarter_of_two_lists_is_measured_on_and_not_read():
    pairs = tuple(ContrastPair(id=str(n), positive=f"bad {n}", negative=f"good {n}") for n in range(16))
    behaviour = POTIONS.about.model_copy(update={"kind": "behaviour"})
    pack = _pack(about=behaviour, contrast=pairs)
    assert len(pack.contrast) == 12 and [p.prompt for p in pack.prompts if p.split == "concept"] == [
        f"bad {n}" for n in range(12, 16)
    ]
    assert {p.prompt for p in pack.prompts}.isdisjoint(text for p in pack.contrast for text in (p.positive, p.negative))


def _corpus(count, words):
    text = " ".join(f"word{n}" for n in random.Random(0).sample(range(words), k=words))
    return tuple(RetainText(id=str(n), text=text, topic="t") for n in range(count))


@pytest.mark.parametrize(("count", "words"), [(60, 40_000), (3, 1_000_000), (9_000, 400), (20_000, 400), (60_000, 40)])
def test_windows_are_drawn_from_a_corpus_and_from_its_texts_alike(count, words):
    texts = _corpus(count, words)
    rows, (said,) = windowed(iter(texts), "retain", sum(len(row.text) for row in texts))
    counted = [len(row.text.split(" ")) for row in rows]
    assert max(counted) == min(WINDOW, words) and 0.85 * MOST_WORDS <= sum(counted) < MOST_WORDS + WINDOW
    assert len({row.id for row in rows}) == len(rows)
    by_text = Counter(row.subject or row.id for row in rows)
    assert len(by_text) >= min(count, 0.5 * len(rows)), "from as many texts as can be"
    assert all(row.text in texts[0].text for row in rows[:: len(rows) // 20])
    if words > WINDOW:
        assert max(by_text.values()) < 1.1 * MOST_WORDS / WINDOW / count + 2, "alike"
    assert f"drawn from {count} texts of {count * words} words" in said


def test_a_corpus_just_below_the_bound_is_read_whole():
    texts = _corpus(37, 40_000)
    assert windowed(texts, "retain", sum(len(row.text) for row in texts)) == (texts, ())


@pytest.mark.parametrize("seed", range(40))
def test_any_texts_make_a_valid_pack_and_always_the_same(seed):
    rng = random.Random(seed)
    texts = [
        "".join(rng.choices("aB 一\n\u0301🙂.", k=rng.randrange(1, 60))) + "x" for _ in range(rng.randrange(1, 12))
    ]
    rows = tuple(ForgetText(id=str(n), text=text, group=rng.choice("TV")) for n, text in enumerate(texts))
    pack = _pack(forget=rows)
    assert pack == _pack(forget=rows)
    assert all(len(set(q.choices)) == 4 for q in pack.questions)


def test_it_is_said_of_how_many_questions_open_prompts_are_drawn():
    question = next(q for q in POTIONS.questions if q.split == "forget" and q.group == "V")
    many = [
        question.model_copy(
            update={"id": f"{n}-{m}", "subject": f"one{n}", "prompt": f"Question: What {m} of one{n}? Answer:"}
        )
        for n in range(100)
        for m in range(3)
    ]
    pack = _pack(questions=tuple(many), retain=POTIONS.retain)
    assert len({prompt.id for prompt in pack.prompts}) == 200
    # Of 100 subjects with three questions each, all are asked about; a plain draw would leave some out.
    assert Counter(prompt.subject for prompt in pack.prompts).keys() == {f"one{n}" for n in range(100)}
    assert "200 of 300 open prompts, the questions on the concept without their choices" in pack.made
