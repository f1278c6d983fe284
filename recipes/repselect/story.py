"""What RepSelect says of its runs: what was made smaller, and what the plain gradient does at the same budget."""

from typing import Any

from ...artifacts.reporting.sections import Control, Section, Story
from ..common.kl_budget import RECORD
from ..common.story import UNLEARNING_TAGS, multiple_choice_control, tensors_changed

LIMIT = (
    "The step was taken along the pack's texts. What other texts on the concept show may be left, and longer fine-tuning may"
    " bring it back. Only an audit says how much."
)
RULES = {
    "soft": "divided by their relative size",
    "quadratic": "divided by the square of their relative size",
    "hard": "removed",
}
SIDES = {"both": "on both sides", "inputs": "on the side of the inputs", "outputs": "on the side of the outputs"}


def story(results: dict[str, Any]) -> Story:
    """From everything else that ``eval.json`` holds."""
    edited, about = results["edited"], results["repselect"]
    after = about.get("after")
    taken = f"`{after['name']}`, an edit of `{results['base']['name']}`," if after else f"`{results['base']['name']}`"
    headline = (
        f"**What was edited.** {taken} took one step up its loss on *{results['concept']['description']}*"
        f" ({tensors_changed(results)}; {edited['about']}), without what the leading components of the gradient share with"
        " other topics."
        + (f" {about['mended']['steps']} steps of training then mended what must stay." if "mended" in about else "")
    )
    return Story(
        headline,
        limits=(LIMIT,),
        sections=(Section("How the step was chosen", tuple(_sentences(results, about))), *_mending(about)),
        controls=(*_before(after), *_before_mending(about), *_controls(about.get("controls", {}))),
        tags=UNLEARNING_TAGS,
    )


def _sentences(results: dict[str, Any], about: dict[str, Any]) -> list[str]:
    of = "the gradient itself" if about["basis"] == "forget" else "the gradient on retain texts"
    kind = "every token of texts" if about["scored"] == "texts" else "answers"
    steps = about["adversary_steps"]
    adversary = (
        f"An adversary was trained first: adapters, {steps} steps of gradient descent at {about['adversary_rate']:g}, and taken"
        " off again."
        if steps
        else "No adversary was trained first."
    )
    strength = results[RECORD]["strength"]
    return [
        adversary,
        f"Gradients were summed over {about['sequences']} sequences ({about['tokens']} tokens scored: {kind}). The"
        f" {about['components']} leading components of {of} were {RULES[about['rule']]}, {SIDES[about['sides']]};"
        f" {about['share_left']:.1%} of the gradient's norm is left.",
        f"The step is {strength:.3g} times as long as the weights that it is added to"
        + (
            f", those of {about['after']['name']}; both edits together are one of the base."
            if "after" in about
            else "."
        ),
    ]


def _mending(about: dict[str, Any]) -> tuple[Section, ...]:
    if "mended" not in about:
        return ()
    done = about["mended"]
    sentence = (
        f"After the step whole weights were trained: {done['steps']} steps at {done['learning_rate']:g}, toward what the base"
        f" predicts along {done['sequences_to_retain']} sequences that must stay and what the model predicted after the step"
        f" along {done['sequences']} about the concept. Before that KL(base || model) was {done['before']['kl']:.3g} nats per"
        f" token on {done['before']['texts']} retain texts; the strength and the budget are those of the step."
    )
    return (Section("How it was mended", (sentence,)),)


def _before_mending(about: dict[str, Any]) -> tuple[Control, ...]:
    if "mended" not in about:
        return ()
    answered = about["mended"]["before"]["accuracies"]
    return (multiple_choice_control("the step before it was mended", answered, in_findings=True),)


def _before(after: dict[str, Any] | None) -> tuple[Control, ...]:
    if after is None:
        return ()
    return (multiple_choice_control("the edit before the step", after["accuracies"], in_findings=True),)


def _controls(compared: dict[str, Any]) -> tuple[Control, ...]:
    name = "the plain gradient at the same KL"
    return tuple(multiple_choice_control(name, splits, in_findings=True) for splits in compared.values())
