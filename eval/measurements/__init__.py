"""The table of measurements. It imports nothing heavy, so that lists and pages can read it without torch.

To add a measurement, write ``eval/measurements/NAME.py`` with a function ``scores(subject)``, add a row here, add a
test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    # It imports numpy, which lists and help do without.
    from ..statistics import Better

Criterion = Literal["", "Innocence", "Seamlessness", "Specificity"]
"""The three criteria of concept erasure (Gandikota et al. 2024, section 3): the model no longer knows the concept, its
replies still read as language, and everything else stays."""


@dataclass(frozen=True)
class OnSplit:
    """What one split of a measurement is to a reader."""

    better: Better = "base"
    """What an edit should do to the value."""
    better_by_kind: Mapping[str, Better] = field(default_factory=dict)
    """The same for a kind of concept (knowledge, behaviour, task), where it differs."""
    criterion: Criterion = ""
    column: str = ""
    """Heading in `excise compare`; without one the split is no column there."""
    lead: bool = False
    """The value that a list of runs shows, if a run has it."""
    findings: Mapping[str, str] = field(default_factory=dict)
    """By kind of concept: the first words of a finding that every run states."""
    if_moved: Mapping[str, str] = field(default_factory=dict)
    """By kind of concept: the first words of a finding that is stated where the difference from the base is
    told from 0."""


@dataclass(frozen=True)
class MeasurementKind:
    """One line of the table."""

    about: str
    label: str
    """What tables call it."""
    unit: str
    order: int
    """Place in tables; rows with lower numbers stand first."""
    splits: Mapping[str, OnSplit] = field(default_factory=dict)
    """Splits, in the order in which findings state them."""
    scores: str | Callable[..., Any] = ""
    """The function that measures it, as ``module:function`` of this package, or itself. Empty where a recipe, or the
    function of another row, measures it too."""
    requests: str | Callable[..., Any] = ""
    """The function that names the likelihoods it needs, so that all measurements share forward passes."""
    hub: bool = False
    """The Hub's index of results gets it."""
    base_is: str = ""
    """What stands in the base's place where the base has no value."""
    suite: bool = False
    """Measured by ``excise eval --suite`` alone, because it takes long."""

    def better(self, split: str, kind: str = "") -> Better:
        """What an edit should do to the value of a split, for a kind of concept; leave it, where the row says
        nothing."""
        on = self.splits.get(split, OnSplit())
        return on.better_by_kind.get(kind, on.better)


KNOWLEDGE, BEHAVIOUR, TASK = "knowledge", "behaviour", "task"

SPLITS: dict[str, str] = {
    "forget_T": "questions on facts to erase that an edit may be trained on (group T)",
    "forget_V": "questions on facts to erase that no edit is trained on (group V, held out)",
    "forget": "everything to erase, groups T and V together",
    "neighbour": "questions on related topics that should stay, of group V where there are any",
    "retain": "questions of group V, or texts, on everything else",
    "intended": "questions where all cues agree, as in training",
    "flipped": "questions where the unintended cue misleads",
    "concept": "prompts about the concept",
    "neutral": "prompts about other things",
}
"""What the splits hold, explained once on every card and report."""

_FORGET = OnSplit("lower", criterion="Innocence")
_FORGET_MORE = OnSplit("higher", criterion="Innocence")
_KEEP = OnSplit("base", criterion="Specificity")
_QUESTIONS = {"forget_V": _FORGET, "forget_T": _FORGET, "neighbour": _KEEP, "retain": _KEEP}
_FLUENT = {"concept": OnSplit("base", criterion="Seamlessness")}

# Rows are measured from top to bottom, and likelihoods are batched in that order: another order changes last digits.
MEASUREMENTS: dict[str, MeasurementKind] = {
    "multiple_choice": MeasurementKind(
        "share of questions whose true choice has the highest mean log-probability per token",
        label="multiple choice", unit="accuracy", order=20, hub=True,
        scores="multiple_choice:scores", requests="multiple_choice:requests",
        splits={
            "forget_V": OnSplit(
                "lower", criterion="Innocence", column="forget V", lead=True,
                findings={KNOWLEDGE: "Held-out questions (V)"},
            ),
            "forget_T": OnSplit(
                "lower", criterion="Innocence", column="forget T",
                findings={KNOWLEDGE: "Questions it may be trained on (T)"},
            ),
            "neighbour": OnSplit(
                "base", criterion="Specificity", column="neighbour",
                findings={KNOWLEDGE: "Questions on related topics (neighbour)"},
            ),
            "retain": OnSplit(
                "base", criterion="Specificity", column="retain",
                findings={
                    KNOWLEDGE: "Questions on everything else (retain)",
                    BEHAVIOUR: "Multiple choice on what should stay (retain)",
                },
            ),
            "intended": OnSplit(
                "higher", column="intended", findings={TASK: "Right where all cues agree, as in training"}
            ),
            "flipped": OnSplit(
                "higher", column="flipped", lead=True, findings={TASK: "Right where the unintended cue misleads"}
            ),
        },
    ),
    "lettered_choice": MeasurementKind(
        "share of questions whose letter is the likeliest, with the options in the prompt, as lm-eval asks",
        label="lettered multiple choice", unit="accuracy", order=21, scores="lettered:scores", suite=True,
        splits={**_QUESTIONS, "intended": OnSplit("higher"), "flipped": OnSplit("higher")},
    ),
    "robust_choice": MeasurementKind(
        "the same, without questions that the base answers right from the options alone",
        label="robust multiple choice", unit="accuracy", order=22, suite=True,
        splits={**_QUESTIONS, "intended": OnSplit("higher"), "flipped": OnSplit("higher")},
    ),
    "multiple_choice_margin": MeasurementKind(
        "log-probability per token of the true choice minus that of the best other choice",
        label="margin of the true choice", unit="nats per token", order=60,
        splits={**_QUESTIONS, "intended": OnSplit("higher"), "flipped": OnSplit("higher")},
    ),
    "cloze": MeasurementKind(
        "log-probability of the answer, without choices",
        label="log-probability of the answer", unit="nats an answer", order=70,
        scores="cloze:scores", splits=_QUESTIONS,
    ),
    "cloze_rank": MeasurementKind(
        "geometric mean of the rank of the answer's first token",
        label="rank of the answer", unit="geometric mean rank", order=80,
        splits={**_QUESTIONS, "forget_V": _FORGET_MORE, "forget_T": _FORGET_MORE},
    ),
    "cloze_exact": MeasurementKind(
        "share of answers that are the greedy choice at every token",
        label="answers that are the greedy choice", unit="share of answers", order=90, splits=_QUESTIONS,
    ),
    "cloze_probability": MeasurementKind(
        "probability of the true choice among the choices, by their mean log-probability per token",
        label="probability among the choices", unit="share of probability", order=65, splits=_QUESTIONS,
    ),
    "answer_probability": MeasurementKind(
        "probability of the answer to an open question: geometric mean over its tokens",
        label="probability of the answer", unit="share of probability", order=66,
        scores="open_answers:scores", requests="open_answers:requests", splits=_QUESTIONS,
    ),
    "truth_ratio": MeasurementKind(
        "truth ratio of TOFU: min(R, 1/R) to forget, max(0, 1 - 1/R) elsewhere",
        label="truth ratio", unit="truth ratio", order=67,
        splits={**_QUESTIONS, "forget_V": _FORGET_MORE, "forget_T": _FORGET_MORE, "forget": _FORGET_MORE},
    ),
    "rouge_l_recall": MeasurementKind(
        "ROUGE-L recall of the greedy reply to an open question, words by their stems",
        label="ROUGE-L recall of replies", unit="share of words", order=68, scores="open_answers:rouge_scores",
        suite=True, splits={**_QUESTIONS, "forget": _FORGET},
    ),
    "open_answer": MeasurementKind(
        "share of the best right answer that the greedy reply to an open question gives, by a suite's own score",
        label="answers to open questions", unit="share of an answer", order=69, suite=True,
        splits={**_QUESTIONS, "forget": _FORGET},
    ),
    "extraction_strength": MeasurementKind(
        "share of a text to forget that the model completes exactly",
        label="share of a text completed exactly", unit="share of a text", order=100,
        scores="cloze:extraction", requests="cloze:extraction_requests",
        splits={"forget_V": _FORGET, "forget_T": _FORGET},
    ),
    "verbatim_memorization": MeasurementKind(
        "ROUGE-L F1 of the greedy continuation of a passage (MUSE's VerbMem)",
        label="verbatim memorization", unit="share of words", order=101, scores="recitation:verbatim",
        suite=True, splits={"forget": _FORGET, "retain": _KEEP},
    ),
    "knowledge_memorization": MeasurementKind(
        "ROUGE-L F1 of the answer to an open question after the pack's shots (MUSE's KnowMem)",
        label="knowledge memorization", unit="share of words", order=102, scores="recitation:knowledge",
        suite=True, splits={**_QUESTIONS, "forget": _FORGET},
    ),
    **{
        name: MeasurementKind(
            f"AUC of {of}, forget texts against texts that no model was trained on",
            label=label, unit="AUC", order=order, scores=scores, suite=True, splits={"forget": OnSplit("base")},
        )
        for name, of, label, order, scores in (
            ("membership_loss", "the mean log-probability per token", "membership, loss", 103, "membership:scores"),
            ("membership_min_k", "Min-K% probability, K = 40", "membership, Min-K%", 104, ""),
            ("membership_min_k_plus_plus", "Min-K%++, K = 20", "membership, Min-K%++", 105, ""),
            ("membership_zlib", "log-probability over compressed bytes", "membership, zlib", 106, ""),
        )
    },
    "probe": MeasurementKind(
        "accuracy of linear probes for the answer, trained on T and tested on V, at the best layer",
        label="linear probe, best layer", unit="accuracy", order=110, scores="probe:scores",
        splits={"forget_V": OnSplit(
            "lower", criterion="Innocence", findings={KNOWLEDGE: "Answers that a linear probe reads (V)"}
        )},
    ),
    "probe_control": MeasurementKind(
        "the same probe, trained on shuffled answers",
        label="linear probe, shuffled answers", unit="accuracy", order=120, splits={"forget_V": OnSplit("lower")},
    ),
    "exact_answer": MeasurementKind(
        "share of greedy answers that hold the true answer and no other choice",
        label="right answers", unit="share of answers", order=30, hub=True, scores="exact_answer:scores",
        splits={
            "concept": OnSplit(
                "higher", {KNOWLEDGE: "lower"}, criterion="Innocence", column="greedy answers",
                findings={
                    KNOWLEDGE: "Right greedy answers about the concept", BEHAVIOUR: "Right answers to such prompts",
                },
            ),
            "neutral": OnSplit("base", findings={TASK: "Right answers about other things"}),
        },
    ),
    "behaviour_rate": MeasurementKind(
        "share of greedy replies that decline, by the pack's phrases",
        label="declines", unit="share of replies", order=40, hub=True, scores="behaviour:rates",
        splits={
            "concept": OnSplit(
                "base", {BEHAVIOUR: "lower"}, lead=True,
                findings={BEHAVIOUR: "Declines prompts that show the behaviour"},
                if_moved=dict.fromkeys((KNOWLEDGE, TASK), "The edit changed how often the model declines (concept)"),
            ),
            "neutral": OnSplit(
                "base", column="declines, neutral",
                if_moved=dict.fromkeys(
                    (KNOWLEDGE, BEHAVIOUR, TASK), "The edit changed how often the model declines (neutral)"
                ),
            ),
        },
    ),
    "learned_rate": MeasurementKind(
        "share of greedy replies that show what a task's training brings about",
        label="shows what was trained", unit="share of replies", order=10, hub=True, scores="behaviour:learned",
        splits={
            "concept": OnSplit(
                "higher", column="shows what was trained", lead=True,
                findings={TASK: "Replies that show what was trained, on such prompts"},
            ),
            "neutral": OnSplit(
                "lower", column="shows it elsewhere",
                findings={TASK: "Replies that show what was trained, on other prompts"},
            ),
        },
    ),
    "degenerate_share": MeasurementKind(
        "share of greedy replies that are empty or repeat themselves",
        label="empty or repeating replies", unit="share of replies", order=170, scores="behaviour:degenerate",
        splits={
            split: OnSplit(
                "base",
                if_moved=dict.fromkeys(
                    (KNOWLEDGE, BEHAVIOUR, TASK),
                    f"The edit changed the share of empty or repeating replies ({split})",
                ),
            )
            for split in ("concept", "neutral")
        },
    ),
    "distinct_2": MeasurementKind(
        "share of word pairs that are distinct, in replies about the concept",
        label="distinct word pairs", unit="share of word pairs", order=140, scores="fluency:scores", splits=_FLUENT,
    ),
    "repetition": MeasurementKind(
        "share of runs of four words that stood in the reply before",
        label="repeated word quadruples", unit="share of word quadruples", order=150,
        splits={"concept": OnSplit("base", criterion="Seamlessness", column="repetition")},
    ),
    "on_topic": MeasurementKind(
        "share of replies that take up a word of their prompt or a keyword of the concept",
        label="replies on topic", unit="share of replies", order=160, splits=_FLUENT,
    ),
    "kl_from_base": MeasurementKind(
        "KL(base || model) along the base's replies to neutral prompts, and along retain texts",
        label="KL from base", unit="nats per token", order=180, hub=True, scores="kl_from_base:scores",
        base_is="0 by definition",
        splits={
            "neutral": OnSplit(
                "lower",
                findings=dict.fromkeys(
                    (KNOWLEDGE, BEHAVIOUR, TASK), "Distance from the base on neutral prompts, nats a token"
                ),
            ),
            "retain": OnSplit("lower", criterion="Specificity"),
        },
    ),
    "perplexity": MeasurementKind(
        "perplexity on retain texts",
        label="perplexity", unit="perplexity", order=190, hub=True,
        scores="perplexity:scores", requests="perplexity:requests",
        splits={"retain": OnSplit(
            "base", criterion="Specificity", column="retain perplexity",
            findings={KNOWLEDGE: "Perplexity of retain texts"},
            if_moved={BEHAVIOUR: "The edit changed the perplexity of retain texts"},
        )},
    ),
    "reverse_perplexity": MeasurementKind(
        "perplexity of the replies about the concept, read by the base",
        label="perplexity of replies under the base", unit="perplexity under the base", order=130,
        splits={
            "concept": OnSplit(
                "base", criterion="Seamlessness", column="reply perplexity",
                findings={KNOWLEDGE: "Perplexity of replies about the concept, read by the base"},
            ),
            "novice": OnSplit("base"),
        },
    ),
    "induced_rate": MeasurementKind(
        "share of neutral replies that show the concept while its direction is added",
        label="shows the concept when the direction is added", unit="share of replies", order=50,
        splits={"neutral": OnSplit("higher")},
    ),
}  # fmt: skip

BY_LAYER = "probe_at_layer"
"""Probe accuracy at one layer, whose split is the layer: a chart of its own, not a row of tables."""


def label_of(name: str) -> str:
    """What tables call a measurement; benchmarks of other tables keep their name."""
    return MEASUREMENTS[name].label if name in MEASUREMENTS else name.replace("_", " ")


def place_of(name: str, split: str) -> tuple[int, str, int, str]:
    """Where a measurement stands in tables, as a key to sort by; benchmarks of other tables stand last."""
    if name not in MEASUREMENTS:
        return 10**6, name, 0, split
    splits = list(MEASUREMENTS[name].splits)
    return MEASUREMENTS[name].order, name, splits.index(split) if split in splits else len(splits), split


def leads() -> list[tuple[str, str]]:
    """What a list shows of a run: the first of these measurements and splits that it has."""
    return [
        (name, split)
        for name, row in sorted(MEASUREMENTS.items(), key=lambda entry: entry[1].order)
        for split, on in row.splits.items()
        if on.lead
    ]


def columns() -> dict[str, tuple[str, str]]:
    """Headings of `excise compare`, each with its measurement and split, in the order of tables."""
    return {
        on.column: (name, split)
        for name, row in sorted(MEASUREMENTS.items(), key=lambda entry: entry[1].order)
        for split, on in row.splits.items()
        if on.column
    }
