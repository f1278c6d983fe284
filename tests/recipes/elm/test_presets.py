"""``preset=paper`` and ``preset=reference`` against loops written from the paper's equations and the authors' code."""

import copy

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.architectures import architecture_of
from excise.editing.training.adapters import AdapterShape, adapter_modules, attach
from excise.recipes.common.tokens import encode
from excise.recipes.data.facts import find_facts
from excise.recipes.elm.batches import TERMS, collate, sequence_loss
from excise.recipes.elm.continuations import TOPIC_CHANGES
from excise.recipes.elm.contrast import contrast_sources, contrasted
from excise.recipes.elm.erasure import Erasure
from excise.recipes.elm.forget_data import forget_contexts, forget_sequences
from excise.recipes.elm.recipe import ElmSettings
from excise.recipes.elm.retain_data import retain_sequences
from excise.recipes.elm.teacher import Teacher
from helpers import SMALL_TESTBED

GROUPS = 4
EVERYTHING = 1024
"""The vocabulary: with all tokens stored nothing is left over."""


@pytest.fixture(scope="module")
def loaded():
    return load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float64)


def _material(loaded, preset, **changed):
    """What the recipe trains on: the sequences of a few groups, and the persona's rows of each context."""
    settings = ElmSettings(preset=preset, **{"fluency_tokens": 6, **changed})
    concept = load_concept("builtin:potions")
    erasure = Erasure(Teacher(loaded.model), loaded.tokenizer, concept, find_facts(concept), settings)
    (source,) = contrast_sources(erasure)
    contexts = forget_contexts(erasure, source)[:GROUPS]
    forget = forget_sequences(erasure, source, contexts)
    retain = retain_sequences(erasure).sequences
    assert len(forget.sequences) == GROUPS and list(retain) == ["texts"]
    items = contrasted(contexts, source, loaded.tokenizer)
    return settings, erasure, forget, retain["texts"][:GROUPS], items


def _log_p(model, row, temperature=1.0):
    return (model(torch.tensor([row])).logits[0] / temperature).log_softmax(-1)


@torch.no_grad()
def _erased(base, rows, preset):
    """Equations 5 and 6 at the last positions that all rows share: [n, vocabulary]."""
    temperature = 1.2 if preset == "reference" else 1.0
    n = len(rows[0])
    bare, expert, novice = (_log_p(base, row, temperature)[-n:] for row in rows)
    wanted = []
    for place in range(n):
        eta = 500.0 if preset == "paper" else 1.0 + (1000.0 - 1.0) * place / (n - 1)
        log_p = bare[place] + eta * (novice[place] - expert[place])
        if preset == "reference":
            log_p[log_p.argsort(descending=True)[50:]] = -torch.inf
        wanted.append(log_p.softmax(-1))
    return torch.stack(wanted)


def _sentence(erasure, ids):
    rows = [encode(erasure.tokenizer, f" {sentence}", False) for sentence in TOPIC_CHANGES]
    return max((row for row in rows if ids[: len(row)] == row), key=len)


def _loop(student, base, erasure, preset, forget, retain, items):
    """Equation 10, one sequence and one position at a time."""
    total = {"erase": 0.0, "fluency": 0.0, "retain": 0.0}
    for sequence, kept, item in zip(forget, retain, items, strict=True):
        rows = (item.ids, item.experts[0], item.novices[0])
        target = _erased(base, rows, preset)
        said = _log_p(student, item.ids)
        # Equation 7, all positions of the text.
        total["erase"] -= sum(p @ q for p, q in zip(target, said, strict=True)) / len(item.ids)
        behind = sequence.ids[len(item.ids) :]
        sentence = _sentence(erasure, behind)
        q = _log_p(student, sequence.ids)
        if preset == "paper":
            # Equation 9: the tokens behind the sentence from the second on, under the edited distribution.
            first = len(item.ids) + len(sentence)
            terms = []
            for place in range(first, len(sequence.ids)):
                grown = [(*row, *sequence.ids[len(item.ids) : place + 1]) for row in rows]
                with torch.no_grad():
                    bare, expert, novice = (_log_p(base, row)[-1] for row in grown)
                terms.append(-(bare + 500.0 * (novice - expert)).softmax(-1) @ q[place])
        else:
            # The authors' code: likelihood of sentence and sampled tokens, but for the first token behind the text.
            whole = (*sequence.ids, int(sequence.targets.ids[-1, sequence.targets.log_p[-1].argmax()]))
            terms = [-q[place, whole[place + 1]] for place in range(len(item.ids), len(sequence.ids))]
        total["fluency"] += sum(terms) / len(terms)
        # Equation 8, or the likeliest token alone, as the authors' code does by default.
        with torch.no_grad():
            own = _log_p(base, kept.ids).exp()
        if preset == "reference":
            own = torch.nn.functional.one_hot(own.argmax(-1), own.shape[-1]).to(own)
        q = _log_p(student, kept.ids)
        total["retain"] -= (own * q).sum(-1).mean()
    return {term: value / len(forget) for term, value in total.items()}


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_targets_losses_and_gradients_are_the_published_ones(loaded, preset):
    settings, erasure, forget, retain, items = _material(loaded, preset, stored_tokens=EVERYTHING)
    base = copy.deepcopy(loaded.model)
    for sequence, item in zip(forget.sequences, items, strict=True):
        wanted = _erased(base, (item.ids, item.experts[0], item.novices[0]), preset)
        n = len(item.ids)
        found = torch.zeros_like(wanted).scatter(1, sequence.targets.ids[:n], sequence.targets.log_p[:n].exp())
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)

    model = copy.deepcopy(base)
    shape = AdapterShape(2, 4.0, adapter_modules(model, architecture_of(model.config.to_dict()), range(2)))
    student = attach(model, shape, seed=0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]

    weights = {"erase": settings.erase_weight, "fluency": settings.fluency_weight, "retain": settings.retain_weight}
    assert set(weights.values()) == {1.0}
    batch = collate([list(pair) for pair in zip(forget.sequences, retain, strict=True)])

    def gradient(loss):
        found = torch.autograd.grad(loss, trained)
        return torch.cat([of_parameter.flatten() for of_parameter in found])

    for term in TERMS:
        wanted = gradient(_loop(student, base, erasure, preset, forget.sequences, retain, items)[term])
        # Ours are divergences, which are cross entropies less what no parameter moves.
        found = gradient(
            sum(sequence_loss({**dict.fromkeys(TERMS, 0.0), term: weights[term]})(student, batch).values())
        )
        assert wanted.norm() > 1e-4
        assert (found - wanted).norm() < 1e-5 * wanted.norm(), term


def test_the_mass_that_is_left_over_is_the_targets_own(loaded):
    _, _, whole, _, _ = _material(loaded, "paper", stored_tokens=EVERYTHING)
    assert whole.left_over == 0.0
    _, _, few, _, items = _material(loaded, "paper", stored_tokens=8, strength=1.0)
    rest = []
    for item in items:
        rows = (item.ids, item.experts[0], item.novices[0])
        bare, expert, novice = (_log_p(loaded.model, row)[-len(item.ids) :] for row in rows)
        target = (bare + novice - expert).softmax(-1)
        rest.append(1 - target.topk(8, -1).values.sum(-1))
    assert few.left_over == pytest.approx(float(torch.cat(rest).mean()), rel=1e-3) and few.left_over > 1e-3
