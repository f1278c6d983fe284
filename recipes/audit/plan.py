"""What an audit would do, for a dry run."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ...artifacts.checkpoints.read import open_checkpoint
from ...editing.edits.fake_quantization import expert_weights
from ...editing.training.adapters import AdapterShape, adapter_modules
from ...eval.inference.likelihood import tokens_of_batch
from ...eval.inference.multiple_choice_set import MultipleChoiceSet
from ..common.examples import Example
from ..common.measured_memory import choosing_bytes
from ..common.memory_plan import TEMPLATE_TOKENS, MemoryPlan, RunMemory, StageMemory, fit_step
from ..common.memory_sizes import STATE_BYTES, Gradients, Rows
from ..common.whole_weights import need_of, products_in
from . import locked_control, removal_control, suppressed_control
from .attack_data import LONGEST_RETAIN, AttackData
from .attackers import attackers_of, groups_of
from .attacks.prompts import shots, texts_as_hints
from .attacks.table import ATTACKS, SOFT_TOKENS, Attack
from .behaviour_results import notes_on
from .behaviours.formats import LENGTHS
from .floor import floor_gaps
from .formats import FORMATS, FormatQuestions
from .request import AuditJob, format_questions, other_questions, questions_at_looks
from .side_by_side import gradients_of_attackers

PREFIXES = {"few_shot": shots, "hints": texts_as_hints}
"""What attacks put in front of questions."""
EVERY_CHOICE = {"phrasings", "sampling"}
"""Attacks that read every choice of a question at once."""
STORED = 2
"""Bytes of a number in a checkpoint, about."""
CHANGES_WEIGHTS = {name for name, row in ATTACKS.items() if str(row.function).startswith("weights:")}


def describe(job: AuditJob) -> dict[str, Any]:
    """What an audit would do."""
    budget, seed = job.budget, job.settings.seed
    training = [ATTACKS[name] for name in job.attacks if ATTACKS[name].trains]
    return {
        "recipe": "audit",
        "out": str(job.out),
        "models": {name: source.name for name, source in job.sources.items()},
        "floor": job.reference,
        "questions": len(job.behaviour.asked if job.behaviour else job.questions),
        "attacks": list(job.attacks),
        # Of six models at most: base, edited, reference, and the suppressed, the password-locked and the removal control.
        "attackers_that_train": sum(_count(job, row) for row in training)
        * (4 + bool(job.locked_attacks) + bool(job.removed_attacks)),
        "controls": [name for name, attacks in _controls(job).items() if attacks],
        "steps_each": budget.steps,
        "search": [asdict(setup) for row in training if row.searched for setup in budget.setups_of(row, seed).values()],
        **_asked(job),
    }


def _controls(job: AuditJob) -> dict[str, tuple[str, ...]]:
    return {"suppressed": job.suppressed_attacks, "locked": job.locked_attacks, "removed": job.removed_attacks}


def _asked(job: AuditJob) -> dict[str, Any]:
    """What models are asked, what cannot be, and what is to be said of it."""
    if items := job.behaviour:
        return {
            "asked_at_each_look": {"held-out prompts": len(items.asked), "other prompts": len(items.others)},
            "reply_tokens": [] if items.by_choice else list(LENGTHS),
            "gaps": list(job.gaps),
            "notes": [*job.notes, *notes_on(job)],
        }
    return {
        "asked_at_each_look": {
            "group V": len(job.questions),
            "everything else": len(questions_at_looks(job.concept, job.budget.others)),
        },
        "formats": {"asked": list(FORMATS), "questions": len(format_questions(job, job.questions))},
        "gaps": [*job.gaps, *floor_gaps(job)],
        "notes": list(job.notes),
    }


def _count(job: AuditJob, attack: Attack) -> int:
    """Attackers of an attack on one model."""
    return job.budget.seeds_of(attack) * len(job.budget.setups_of(attack, job.settings.seed))


def memory(job: AuditJob) -> MemoryPlan:
    """What an audit would hold in memory, at the attacks that take most."""
    source = job.sources["base"]
    needs = RunMemory(source, open_checkpoint(source.folder), job.device, job.dtype, job.concept)
    asked = _asking(job, needs)
    stages, rows = [asked], {name: ATTACKS[name] for name in job.attacks}
    experts = sum(weight.numel() for weight in expert_weights(needs.sizes.model).values())
    if experts and CHANGES_WEIGHTS & set(rows):
        # Other weights are read again from the checkpoint; experts stand there one by one, so they are copied.
        changed = asked.weights + experts * job.dtype.itemsize
        stages.append(replace(asked, name="ask with changed weights", weights=changed))
    for method in dict.fromkeys(row.method for row in rows.values() if row.trains):
        attackers = _attackers(job, needs, method)
        # They are asked as they train, with their states beside the model.
        stages.append(replace(attackers, work=max(attackers.work, asked.work)))
    if job.suppressed_attacks and not job.behaviour:
        stages.append(_suppressing(job, needs, asked))
    if job.locked_attacks:
        stages.append(_locking(job, needs, asked))
    if job.removed_attacks:
        stages.append(_removing(job, needs, asked))
    if job.device.type == "cpu":
        stages.append(_comparing(needs))
    return needs.plan(stages)


def _comparing(needs: RunMemory) -> StageMemory:
    """Base and edited model, tensor by tensor, once no model is there: both as stored and in fp32, and their difference."""
    return StageMemory("compare the weights", 0, work=(2 * STORED + 3 * 4) * needs.sizes.largest())


def _suppressing(job: AuditJob, needs: RunMemory, asked: StageMemory) -> StageMemory:
    """The control that learns to answer wrongly, with an update of the last layer."""
    sizes = needs.sizes
    modules = adapter_modules(sizes.model, sizes.row, [sizes.depth - 1])
    gradients = Gradients(AdapterShape(suppressed_control.RANK, suppressed_control.ALPHA, modules), attackers=1)
    rows = Rows(suppressed_control.BATCH, _longest(job, needs, [ATTACKS[name] for name in job.suppressed_attacks]))
    step = sizes.step(rows, gradients) + sizes.head(job.device)
    trained = STATE_BYTES * sizes.adapter(gradients.shape or AdapterShape(0, 0, ()))
    return StageMemory("train the suppressed control", needs.weights, trained, max(step, asked.work))


def _locking(job: AuditJob, needs: RunMemory, asked: StageMemory) -> StageMemory:
    """The control that learns to answer rightly after a password alone, with an update of all layers."""
    sizes = needs.sizes
    modules = adapter_modules(sizes.model, sizes.row, range(sizes.depth))
    shape = AdapterShape(locked_control.RANK, locked_control.ALPHA, modules)
    # Some sequences stand behind others.
    longest = 2 * _longest(job, needs, [ATTACKS[name] for name in job.locked_attacks])
    if needs.tokenizes():
        data = _attack_data(job, needs)
        facts = _mean((*data.examples["T"], *data.examples["V"]))
        others = _mean(data.examples["others"] or data.examples["retain"])
        # Of nine sequences six are facts and three others; one more text of others stands in front of a fact.
        longest = max(longest, (6 * facts + 4 * others) // 9)
    step = sizes.step(Rows(locked_control.BATCH, longest), Gradients(shape, attackers=1)) + sizes.head(job.device)
    return StageMemory(
        "train the locked control", needs.weights, STATE_BYTES * sizes.adapter(shape), max(step, asked.work)
    )


def _removing(job: AuditJob, needs: RunMemory, asked: StageMemory) -> StageMemory:
    """The control that learns the concept in one update of all layers, and everything else in another."""
    sizes = needs.sizes
    modules = adapter_modules(sizes.model, sizes.row, range(sizes.depth))
    # Of both together, no more than of one whose rank is theirs.
    shape = AdapterShape(2 * removal_control.RANK, removal_control.ALPHA, modules)
    longest = _longest(job, needs, [ATTACKS[name] for name in job.removed_attacks])
    if needs.tokenizes():
        data = _attack_data(job, needs)
        halves = (data.of_questions(job.questions), removal_control.other_sequences(data))
        longest = max(longest, sum(map(_mean, halves)) // 2)
    # Both kinds of sequences are read before either is gone back through.
    step = sizes.step(Rows(2 * removal_control.BATCH, longest), Gradients(shape, attackers=1)) + sizes.head(job.device)
    return StageMemory(
        "train the removal control", needs.weights, STATE_BYTES * sizes.adapter(shape), max(step, asked.work)
    )


def _asking(job: AuditJob, needs: RunMemory) -> StageMemory:
    """The questions in all forms in which they are asked of a model that is not trained."""
    if job.behaviour or not needs.tokenizes():
        return needs.measuring("ask the questions")
    data = _attack_data(job, needs)
    several = FormatQuestions(format_questions(job, job.questions), needs.tokenizer)
    requests = [request for each in several.requests for some in each for request in some]
    budget = tokens_of_batch(needs.sizes.vocabulary, job.device)
    longest = needs.longest((question.prompt for question in several.questions), needs.context) + several.new_tokens
    work = [needs.scoring(requests), needs.replies(longest, len(several.questions))]
    asked = (*job.questions, *questions_at_looks(job.concept, job.budget.others), *other_questions(job.concept))
    sets = [MultipleChoiceSet(needs.tokenizer, tuple(dict.fromkeys(asked)))]
    sets += [
        MultipleChoiceSet(needs.tokenizer, job.questions, PREFIXES[name](data))
        for name in job.attacks
        if name in PREFIXES
    ]
    if any(str(ATTACKS[name].function).startswith("reading:") for name in job.attacks):
        sets.append(MultipleChoiceSet(needs.tokenizer, data.training_questions))
    work += [choosing_bytes(needs.sizes, one, budget) for one in sets]
    if EVERY_CHOICE & set(job.attacks):
        work.append(choosing_bytes(needs.sizes, sets[0], budget, every=True))
    return StageMemory("ask the questions", needs.weights, work=max(work))


def _attackers(job: AuditJob, needs: RunMemory, method: str) -> StageMemory:
    """Attackers of one method, as many as train side by side."""
    sizes, budget, concept = needs.sizes, job.budget, job.concept
    attacks = {name: ATTACKS[name] for name in job.attacks if ATTACKS[name].method == method}
    attackers = attackers_of(attacks, budget, job.settings.seed)
    groups = groups_of(attackers, whole=method == "all_weights", in_one_row=job.device.type == "cpu")
    largest = max(groups, key=lambda group: sum(one.setup.batch for one in group))
    count, rank = len(largest), -(-sum(one.setup.rank for one in largest) // len(largest))
    if job.behaviour:
        # Models write what is read here: a prompt in their template, and a reply.
        prompts = [prompt.prompt for prompt in concept.prompts]
        prompts += [text for pair in concept.contrast for text in (pair.positive, pair.negative)]
        longest = needs.longest(prompts, LONGEST_RETAIN) + TEMPLATE_TOKENS + LENGTHS[0]
    else:
        longest = _longest(job, needs, list(attacks.values()))
    rows, head = Rows(sum(one.setup.batch for one in largest), longest), sizes.head(job.device)
    name = f"attack: {method}"
    if method == "all_weights":
        whole = need_of(needs.weights // sizes.dtype.itemsize, job.optimizer)
        modules = gradients_of_attackers(sizes, 1).shape
        gradients = Gradients(modules, whole=True, products=products_in(job.dtype, job.device))
        # Gradients of the modules are made as activations go.
        made = 4 * sum(weight.numel() for weight in sizes.linear_weights())
        return StageMemory(name, 0, trained=whole, work=max(0, sizes.step(rows, gradients) - made) + head)
    if method != "low_rank":
        rows = Rows(rows.count, longest + SOFT_TOKENS)
        step = fit_step(sizes, Gradients(), rows, needs.room - needs.weights - head, unit=count)
        return StageMemory(name + step.in_words(), needs.weights, work=step.size + head)
    gradients = gradients_of_attackers(sizes, count, rank)
    assert gradients.shape is not None
    trained = STATE_BYTES * sizes.adapter(gradients.shape) * count
    step = fit_step(sizes, gradients, rows, needs.room - needs.weights - trained - head, unit=count)
    return StageMemory(name + step.in_words(), needs.weights, trained, step.size + head)


def _mean(examples: Sequence[Example]) -> int:
    """Tokens of a sequence, rounded up."""
    return -(-sum(len(one.ids) for one in examples) // max(1, len(examples)))


def _longest(job: AuditJob, needs: RunMemory, attacks: Sequence[Attack]) -> int:
    """Tokens of a row of attacks on knowledge."""
    if needs.tokenizes():
        return _mean_length(job, needs, attacks)
    return longest_row(job, needs)


def longest_row(job: AuditJob, needs: RunMemory) -> int:
    """Tokens of the longest text or question of a pack, at most what attackers read of one."""
    return needs.longest((*job.concept.texts(), *(q.prompt for q in job.concept.questions)), LONGEST_RETAIN)


def _attack_data(job: AuditJob, needs: RunMemory) -> AttackData:
    return AttackData(job.concept, job.facts, job.questions, needs.tokenizer, job.settings.seed)


def _mean_length(job: AuditJob, needs: RunMemory, attacks: Sequence[Attack]) -> int:
    """Tokens of a row of the largest step of some attacks that train side by side, padding included.

    The shortest sequence of each attacker stands beside those of the others, then the next.
    """
    data = _attack_data(job, needs)
    batch, count = job.budget.batch, job.budget.steps * job.budget.batch
    seeds = {(row.data, number) for row in attacks for number in range(job.budget.seeds_of(row))}
    orders = [data.reading_order(source, count, f"{job.settings.seed}-{number}") for source, number in sorted(seeds)]
    largest = 0
    for start in range(0, count, batch):
        read = [sorted(len(one.ids) for one in order[start : start + batch]) for order in orders]
        largest = max(largest, sum(map(max, zip(*read, strict=True))))
    return -(-largest // batch)
