"""Words in any script: answers that stand in sentences, and letters that only look like them."""

import random
import unicodedata

import pytest
from excise.eval.inference.generation import Reply
from excise.eval.measurements.exact_answer import holds_answer
from excise.eval.measurements.fluency import distinct_runs, is_on_topic
from excise.eval.words import has_words, topical, whole_words, words_of

STANDS = {
    "latin": ("They live in New York now.", "new york"),
    "sign at the end": ("It is written in C++.", "C++"),
    "number": ("There are 17 of them", "17"),
    "chinese": ("他住在巴黎已经三年了。", "巴黎"),
    "japanese": ("彼女はパリに住んでいます。", "パリ"),
    "number before a character": ("会议在3月举行", "3"),
    "latin in chinese": ("他用Python写程序", "Python"),
    "thai": ("เมืองหลวงคือกรุงเทพและใหญ่มาก", "กรุงเทพ"),
    "korean with a particle": ("그는 파리는 좋아한다", "파리"),
    "devanagari": ("वह दिल्ली में रहता है", "दिल्ली"),
    "arabic": ("يعيش في باريس الآن", "باريس"),
    "stored apart": (unicodedata.normalize("NFD", "Ein Café in Zürich"), unicodedata.normalize("NFC", "Zürich")),
    "capital sharp s": ("Die STRASSE ist lang", "Straße"),
}
DOES_NOT = {
    "part of a word": ("They moved to Newark", "New"),
    "number in a number": ("There are 117 of them", "17"),
    "another accent": (unicodedata.normalize("NFD", "a résumé"), "resum"),
    "vowel sign missing": ("वह दिल्ली में रहता है", "दिल्ल"),
    "korean inside a word": ("프랑파리", "파리"),
    "other characters": ("他住在柏林。", "巴黎"),
    "thai without its mark": ("กรุงเทพ", "กร"),
}


@pytest.mark.parametrize("name", STANDS)
def test_an_answer_is_found_where_it_stands_whole(name):
    text, answer = STANDS[name]
    assert has_words(text, answer) and holds_answer(text, answer, (answer, "17 others"))
    assert not holds_answer(f"{text} {answer} 柏林", answer, (answer, "柏林"))


@pytest.mark.parametrize("name", DOES_NOT)
def test_what_only_contains_its_letters_is_not_the_answer(name):
    assert not has_words(*DOES_NOT[name])


@pytest.mark.parametrize("seed", range(20))
def test_plain_texts_are_read_as_texts_of_any_script_are(seed):
    """The quick patterns beside those for any script, on random texts of words, numbers and signs."""
    rng = random.Random(seed)
    text = "".join(rng.choice("ab_1 .'-C+") for _ in range(60))
    for start in range(0, 50, 3):
        words = text[start : start + rng.randint(1, 5)]
        places = [[m.span() for m in whole_words(words, searched).finditer(text)] for searched in (text, None)]
        assert places[0] == places[1]
    assert words_of(text) == words_of(text + " é")[:-1]
    assert topical(text) == {word for word in words_of(text + " é") if len(word) >= 4}


def test_characters_are_words_where_no_spaces_part_words():
    assert words_of("我爱你。") == ["我", "爱", "你", "。"]
    assert words_of("It's 3 o'clock") == ["it", "'", "s", "3", "o", "'", "clock"]
    assert words_of("हिन्दी और") == ["हिन्दी", "और"]
    # A clause said four times repeats itself; as one word each it would not.
    assert distinct_runs("我爱你我爱你我爱你", 2) == (3, 8)
    assert distinct_runs("one two one two", 2) == (2, 3)


def test_topics_are_taken_up_in_any_script():
    def on_topic(prompt, reply):
        return is_on_topic(Reply(prompt, (1,), (2,), reply), ())

    assert on_topic("Tell me about the lighthouse", "A lighthouse stands there")
    assert not on_topic("Tell me about the lighthouse", "I would rather tell you about bread")
    assert on_topic("请介绍一下长城的历史", "长城很长")
    assert not on_topic("请介绍一下长城的历史", "面包很好吃")
    # Endings alone are no topic.
    assert not on_topic("富士山はどこですか", "これはパンです")
