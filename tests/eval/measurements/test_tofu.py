"""TOFU's formulas: against naive ones in float64, and against the numbers that its authors' logs give."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
from excise.editing.errors import RequestError
from excise.eval.measurements.rouge import require_rouge, rouge_l
from excise.eval.measurements.tofu import (
    forget_quality,
    forget_truth_ratio,
    model_utility,
    probability,
    require_scipy,
    retain_truth_ratio,
    share_of_probability,
    truth_ratio,
)

DATA = Path("/work/shared/data/tofu")
LOGS = pytest.mark.skipif(not DATA.is_dir(), reason=f"the logs that TOFU's authors published are not in {DATA}")
SETS = ("retain", "real_authors", "world_facts")


def _log(name):
    return json.loads((DATA / f"phi_{name}.json").read_text())


def _ratios(log):
    pairs = zip(log["paraphrased_loss_per_token"], log["perturbed_loss_per_token"], strict=True)
    return [truth_ratio(paraphrased, perturbed) for paraphrased, perturbed in pairs]


def _mean(values):
    values = list(values)
    return sum(values) / len(values)


def _three(log, name):
    losses, perturbed = log[name]["answer_loss_per_token"], log[name]["perturbed_loss_per_token"]
    likely = (
        [share_of_probability(loss, others) for loss, others in zip(losses, perturbed, strict=True)]
        if name in ("real_authors", "world_facts")
        else map(probability, losses)
    )
    score = forget_truth_ratio if name == "forget" else retain_truth_ratio
    return {
        "probability": _mean(likely),
        "rouge_l_recall": _mean(log[name]["rouge_l_recall"]),
        "truth_ratio": _mean(map(score, _ratios(log[name]))),
    }


@LOGS
@pytest.mark.parametrize("name", ["full", "retain90"])
def test_the_authors_logs_give_the_authors_numbers(name):
    expected = json.loads((DATA / "expected.json").read_text())["model_utility"][f"phi_{name}"]
    log = _log(name)
    found = {part: _three(log, part) for part in (*SETS, "forget")}
    for part in (*SETS, "forget"):
        for key, value in expected[part].items():
            assert found[part][key] == pytest.approx(value, abs=1e-4), (part, key)
    nine = [value for part in SETS for value in found[part].values()]
    assert len(nine) == 9 and model_utility(nine) == pytest.approx(expected["model_utility"], abs=1e-4)


@LOGS
def test_forget_quality_tells_the_authors_two_models_apart_and_not_one_from_itself():
    expected = json.loads((DATA / "expected.json").read_text())["forget_quality"]["phi_full against phi_retain90"]
    full, retained = (_ratios(_log(name)["forget"]) for name in ("full", "retain90"))
    p, statistic = forget_quality(full, retained)
    assert statistic == pytest.approx(expected["statistic"], abs=1e-4)
    assert p == pytest.approx(expected["p_value"], rel=1e-4)
    assert forget_quality(retained, retained) == (1.0, 0.0)


@LOGS
@pytest.mark.parametrize("name", ["full", "retain90"])
def test_the_authors_replies_give_the_authors_rouge(name):
    checked = 0
    for part in (*SETS, "forget"):
        log = _log(name)[part]
        for reply, expected in zip(log["replies"], log["rouge_l_recall"], strict=False):
            assert rouge_l(reply["answer"], reply["reply"]).recall == pytest.approx(expected, abs=1e-3)
            checked += 1
    assert checked == 320


def test_formulas_are_those_of_a_naive_computation():
    rng = random.Random(0)
    for _ in range(50):
        loss, paraphrased = rng.uniform(0, 6), rng.uniform(0, 6)
        others = [rng.uniform(0, 6) for _ in range(rng.randint(1, 5))]
        naive = math.exp(-paraphrased) / math.prod(math.exp(-one) for one in others) ** (1 / len(others))
        ratio = truth_ratio(paraphrased, others)
        assert ratio == pytest.approx(naive, rel=1e-12)
        assert forget_truth_ratio(ratio) == pytest.approx(min(naive, 1 / naive))
        assert retain_truth_ratio(ratio) == pytest.approx(max(0, 1 - 1 / naive))
        total = math.exp(-loss) + sum(math.exp(-one) for one in others)
        assert share_of_probability(loss, others) == pytest.approx(math.exp(-loss) / total, rel=1e-12)
    nine = [rng.uniform(0.1, 1) for _ in range(9)]
    assert model_utility(nine) == pytest.approx(9 / sum(1 / one for one in nine))
    assert model_utility([0.0, *nine[1:]]) == 0


def test_extreme_losses_overflow_nothing():
    assert share_of_probability(5000.0, [1.0]) == 0 and share_of_probability(1.0, [5000.0]) == 1
    assert forget_truth_ratio(truth_ratio(0.0, [5000.0])) < 1e-300
    assert retain_truth_ratio(truth_ratio(5000.0, [0.0])) == 0


def test_the_statistic_is_the_largest_gap_between_the_two_distributions():
    rng = random.Random(1)
    first, second = ([rng.gauss(mean, 1) for _ in range(60)] for mean in (0, 0.4))
    naive = max(
        abs(sum(one <= x for one in first) / 60 - sum(one <= x for one in second) / 60) for x in (*first, *second)
    )
    assert forget_quality(first, second)[1] == pytest.approx(naive)


def test_rouge_compares_stems_only_where_asked():
    assert rouge_l("he runs daily", "he run daily").recall == 1
    assert rouge_l("he runs daily", "he run daily", stem=False).recall == pytest.approx(2 / 3)
    longer = rouge_l("the sky is blue", "I say that the sky is blue today")
    assert longer.recall == 1 and longer.f1 == pytest.approx(2 * 1 * 0.5 / 1.5)


@pytest.mark.parametrize(("module", "check"), [("rouge_score", require_rouge), ("scipy.stats", require_scipy)])
def test_a_library_that_is_not_installed_is_one_line(monkeypatch, module, check):
    check("the suite")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RequestError, match=r"^the suite needs .*excise\[suites\]'$"):
        check("the suite")
