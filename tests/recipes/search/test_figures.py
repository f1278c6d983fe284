import itertools
import math
import random

import pytest
from excise.editing.errors import RequestError
from excise.recipes import RECIPES
from excise.recipes.common.search_space import read_dimension
from excise.recipes.orthogonalize.space import SPACE, settings_of
from excise.recipes.search.figures import dominated, figure, front, guard, objective
from excise.recipes.search.study import Done
from excise.recipes.search.trial import Rules, _cannot_win, _gains_nothing


def _naive_front(points):
    """By the definition, pair by pair."""
    kept = []
    for number, values in points.items():
        beaten = False
        for other in points.values():
            no_worse = all(a <= b for a, b in zip(other, values, strict=True))
            better = any(a < b for a, b in zip(other, values, strict=True))
            beaten |= no_worse and better
        if not beaten:
            kept.append(number)
    return kept


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_the_front_is_what_the_definition_says(objectives):
    rng = random.Random(0)
    for size in (0, 1, 2, 30):
        points = {number: [rng.choice([0.0, 0.1, 0.5, 1.0]) for _ in range(objectives)] for number in range(size)}
        assert front(points) == _naive_front(points)


def test_a_trial_is_beaten_only_beyond_the_margin_in_every_objective():
    assert dominated([1.0, 1.0], [[0.5, 0.5]], [0.1, 0.1])
    assert not dominated([1.0, 1.0], [[0.5, 0.95]], [0.1, 0.1])
    assert not dominated([1.0, math.inf], [[1.0, 0.0]], [0.0, 0.0])
    assert not dominated([1.0, 1.0], [], [0.0, 0.0])


def test_names_of_figures_stand_for_measurements_of_the_table():
    assert (figure("rest").measurement, figure("rest").split, figure("rest").change) == (
        "multiple_choice",
        "retain",
        True,
    )
    assert not figure("forget").change and figure("forget.change").change
    assert figure("cloze.forget_V").measurement == "cloze" and not figure("cloze.forget_V").generates
    assert figure("behaviour").generates and not figure("behaviour").stand_in.generates
    with pytest.raises(RequestError, match=r"no figure 'forgt' \(did you mean 'forget'\?\)"):
        figure("forgt")
    # A measurement that needs the harness or a suite is none that a trial could be asked.
    with pytest.raises(RequestError, match=r"no figure 'membership_loss\.forget'"):
        figure("membership_loss.forget")


def test_objectives_and_guards_are_read_strictly():
    assert objective("forget:min").way == "min" and guard("rest>=-0.02").limit == -0.02
    assert guard("rest>=-0.02").excess(-0.05) == pytest.approx(0.03) and guard("kl<=0.1").excess(0.05) < 0
    for wrong in ("forget", "forget:less", ":min"):
        with pytest.raises(RequestError):
            objective(wrong)
    for wrong in ("rest", "rest=1", "rest>=x", "rest>=1.2.3", "nothing>=1"):
        with pytest.raises(RequestError):
            guard(wrong)


def test_more_right_answers_are_fewer_of_the_bases_own_replies():
    more = objective("exact_answer.concept:max").stand_in()
    assert more is not None and more.way == "min" and more.figure.name == "behaviour.likelihood"
    assert objective("degenerate:min").stand_in() is None
    assert objective("behaviour:min").stand_in().way == "min"


def test_ranges_and_choices_of_a_file():
    assert read_dimension({"search": [0.1, 2.0], "log": True}, "f:1").log
    whole = read_dimension({"search": [4, 8]}, "f:1")
    assert (whole.low, whole.high, whole.choices) == (4, 8, ()) and isinstance(whole.low, int)
    assert read_dimension({"choices": [4, 8]}, "f:1").choices == (4, 8)
    assert read_dimension({"search": ["all", "mlp"]}, "f:1").choices == ("all", "mlp")
    wrong = [
        {"search": [2, 1]}, {"search": [0, 1], "log": True}, {"search": 3}, {"search": [1]}, {"choices": [[1], [2]]},
        {"search": [1, 2], "step": 1}, {"search": [1, 2], "log": "yes"}, {"search": [1, 2], "choices": [1, 2]},
    ]  # fmt: skip
    for value in wrong:
        with pytest.raises(RequestError, match=r"f:1"):
            read_dimension(value, "f:1")


def test_a_profile_peaks_at_its_centre_and_ends_at_its_reach():
    values = {"depth": 0.5, "position": -1, "peak": 1.2, "centre": 0.5, "reach": 0.5, "edge": 0.25, "embedding": 0.0}
    values |= {"variant": "plain", "mlp": 0.5, "per_layer": False}
    settings = settings_of(values, 9)
    assert not settings["per_layer"] and settings_of(values | {"per_layer": True}, 9)["per_layer"]
    assert settings["strength"][4] == 1.2 and settings["strength"][0] == settings["strength"][8] == 0.3
    assert settings["point"] == 4 and max(settings["strength"]) == 1.2
    assert settings["mlp_strength"] == pytest.approx([strength / 2 for strength in settings["strength"]], abs=1e-4)
    assert set(settings_of(values | {"mlp": -0.5}, 9)["mlp_strength"]) == {0.0}
    narrow = settings_of(values | {"reach": 0.1}, 9)["strength"]
    assert [value > 0 for value in narrow] == [False] * 4 + [True] + [False] * 4
    for corner in itertools.product(*((one.choices or (one.low, one.high)) for one in SPACE.values())):
        made = settings_of(dict(zip(SPACE, corner, strict=True)), 4)
        assert len(made["strength"]) == 4 and 0 <= made["point"] <= 4 and all(map(math.isfinite, made["strength"]))


def test_every_recipe_has_a_ready_space():
    assert [name for name, row in RECIPES.items() if not row.space] == []


def _done(number, values, few=None, every=None, state="complete", feasible=True):
    figures = {"few": few or {}, "all": every or {}}
    return Done(number, state, values, {}, {}, figures, feasible, "", 0, 0.0)


RULES = Rules((objective("behaviour:min"), objective("kl.replies:min")), ())


def test_a_trial_that_could_not_win_by_any_reply_makes_none():
    before = [_done(0, (0.0, 1e-3))]
    # No share of replies is less than 0, and its divergence is known to be larger.
    assert _cannot_win({"kl.replies": 2e-3}, RULES, before)
    assert not _cannot_win({"kl.replies": 5e-4}, RULES, before)
    # Another that replies badly says nothing of one with a larger divergence.
    assert not _cannot_win({"kl.replies": 2e-3}, RULES, [_done(0, (0.5, 1e-3))])
    assert not _cannot_win({"kl.replies": 2e-3}, RULES, [_done(0, (0.0, 1e-3), feasible=False)])
    # Whatever its own replies would have been, it would not have been on the front.
    for share in (0.0, 0.3, 1.0):
        assert 1 not in front({0: [0.0, 1e-3], 1: [share, 2e-3]})


def test_divergences_are_compared_by_their_ratio():
    kl, rest = objective("kl:min"), objective("rest:max")
    assert (
        kl.signed(2e-3) - kl.signed(1e-3) == pytest.approx(kl.signed(2e-1) - kl.signed(1e-1)) and kl.signed(0.0) < -20
    )
    assert rest.signed(0.5) == -0.5 and rest.bound == math.inf
    assert objective("behaviour:min").bound == 0.0 and objective("exact_answer.concept:max").bound == 1.0


def test_an_edit_that_does_nothing_is_left_and_one_that_does_something_is_not():
    class Base:
        def of_base(self, one, size):
            return -0.07 if one.name == "behaviour.likelihood" else 0.0

    def known(likelihood, kl):
        return {"behaviour.likelihood": likelihood, "kl.replies": kl}

    before = [_done(number, (0.0, 1e-3), every=known(-0.1 * number, 1e-3)) for number in range(8)]
    assert _gains_nothing(Base(), "all", known(-0.071, 1e-5), RULES, before)
    assert not _gains_nothing(Base(), "all", known(-0.2, 1e-2), RULES, before)
    # Too few trials to know what noise is.
    assert not _gains_nothing(Base(), "all", known(-0.071, 1e-5), RULES, before[:2])
