"""Token ids of texts, under tokenizers that put tokens in front, behind, both or neither."""

import pytest
import torch
from excise.eval.concept import Question
from excise.eval.inference.encoding import encode
from excise.eval.inference.generation import encode_prompt
from excise.eval.inference.likelihood import Request, encode_request, log_likelihoods
from excise.eval.inference.multiple_choice_set import MultipleChoiceSet
from helpers import SMALL_TESTBED, make_pico
from oracle import language
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEMPLATES = {"none": "$A", "begin": "<s> $A", "end": "$A </s>", "both": "<s> $A </s>", "two ends": "$A </s> </s>"}


def _tokenizer(template):
    tokenizer = AutoTokenizer.from_pretrained(SMALL_TESTBED)
    begin, end = tokenizer.bos_token or tokenizer.eos_token, tokenizer.eos_token
    single = TEMPLATES[template].replace("<s>", begin).replace("</s>", end)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {begin, end}]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_stands_behind_a_text_is_left_out_and_what_stands_before_it_is_kept(template):
    tokenizer = _tokenizer(template)
    plain = tokenizer("The capital of", add_special_tokens=False)["input_ids"]
    whole, ids = tokenizer("The capital of")["input_ids"], encode(tokenizer, "The capital of")
    front = TEMPLATES[template].split().index("$A")
    assert len(whole) == len(plain) + len(TEMPLATES[template].split()) - 1
    assert ids == whole[: front + len(plain)] and ids[front:] == plain
    assert encode_prompt(tokenizer, "The capital of", chat=False) == ids
    assert encode(tokenizer, "") == whole[:front]
    # No end token is scored as part of a choice, and the choice follows its prompt directly.
    scored = encode_request(tokenizer, Request("The capital of", " France"))
    assert scored.ids == (*ids, *scored.ids[scored.start :]) and tokenizer.eos_token_id not in scored.ids[front:]


TEXTS = (
    "",
    " ",
    "a",
    " a\n\nb",
    "What's </s> it?",
    "</s>",
    "<s>hi</s>",
    "日本語 ünï 🙂",
    "<|endoftext|>x",
    "The capital of",
)


class _Otherwise(PreTrainedTokenizerFast):
    """What a class does with a text before it hands it on is not left out."""

    def _encode_plus(self, text, *args, **options):
        return super()._encode_plus(f"{text}!", *args, **options)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_text_is_encoded_as_by_a_call_of_its_tokenizer(template):
    tokenizer, behind = _tokenizer(template), len(TEMPLATES[template].split("$A")[1].split())
    texts = [text.replace("<s>", tokenizer.bos_token or "").replace("</s>", tokenizer.eos_token) for text in TEXTS]
    for special in (True, False):
        called = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
        wanted = [ids[: len(ids) - behind * special] for ids in called]
        # A call with padding or a limit leaves these behind, and so may the file.
        tokenizer.backend_tokenizer.enable_padding(length=40)
        tokenizer.backend_tokenizer.enable_truncation(2)
        assert [encode(tokenizer, text, special=special) for text in texts] == wanted
    tokenizer.split_special_tokens = True
    split = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [encode(tokenizer, text, special=False) for text in texts] == split != called
    own = _Otherwise(tokenizer_object=tokenizer.backend_tokenizer)
    assert encode(own, "a", special=False) == own("a", add_special_tokens=False)["input_ids"] != wanted[2]


@pytest.mark.parametrize("choices", [("one two three", "four"), ("a", "b c d e f g")])
def test_questions_longer_than_the_context_are_scored_as_by_the_definition(choices):
    model, tokenizer = make_pico("gpt2"), AutoTokenizer.from_pretrained(SMALL_TESTBED)
    model.config.max_position_embeddings = context = 24
    size = model.config.vocab_size
    questions = [
        Question(id="long", prompt="and so it goes on " * 9, choices=choices, answer=0, group="V", split="forget"),
        Question(id="short", prompt="It is", choices=choices, answer=1, group="V", split="forget"),
    ]

    class Narrow:
        """The tokenizer, with ids that the small vocabulary has."""

        def __call__(self, text, add_special_tokens=True):
            ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
            return {"input_ids": [3 + token % (size - 3) for token in ids]}

    narrow = Narrow()
    asked = MultipleChoiceSet(narrow, questions)
    parts = [encode_request(narrow, Request(q.prompt, f" {choice}")) for q in questions for choice in q.choices]
    # As much of the end as the context holds, with the choice's last token, which is not read.
    cuts = [max(0, len(part.ids) - context - 1) for part in parts]
    expected = [
        language.log_likelihood(model, part.ids[cut:], part.start - cut) for part, cut in zip(parts, cuts, strict=True)
    ]
    assert max(len(part.ids) for part in parts) > context + 1
    assert asked.log_probabilities(model) == pytest.approx(expected, abs=1e-4)
    per_token = [value / (len(part.ids) - part.start) for value, part in zip(expected, parts, strict=True)]
    assert asked.hits(model) == (float(per_token[0] > per_token[1]), float(per_token[3] > per_token[2]))
    requests = [Request(questions[0].prompt, f" {choice}") for choice in choices]
    found = log_likelihoods(model, narrow, requests)
    assert [found[request].log_probability for request in requests] == pytest.approx(expected[:2], abs=1e-4)
    # Whole, they cannot be read at all.
    with torch.no_grad(), pytest.raises(IndexError):
        model(input_ids=torch.tensor([parts[0].ids]))
