import pytest
from excise.editing.errors import ExciseError
from excise.eval.inference.candidates import Candidate, choose


def _candidate(point, bypass, induce=1.0, kl=0.01, rejected=None):
    return Candidate(point, -1, 1.0, bypass, induce, kl, rejected)


def test_the_least_bypass_wins_among_those_that_pass():
    chosen, passed = choose(
        [_candidate(1, 3.0), _candidate(2, -5.0), _candidate(3, -9.0, rejected="does not induce")], 5.0
    )
    assert (chosen.point, passed) == (2, True)


def test_equal_removal_is_decided_by_what_induces_more():
    chosen, _ = choose(
        [_candidate(1, -8.0, induce=0.5), _candidate(2, -6.0, induce=6.0), _candidate(3, 0.0, induce=9.0)], 5.0
    )
    assert chosen.point == 2


def test_none_passing_is_said():
    chosen, passed = choose([_candidate(1, 1.0, kl=0.4, rejected="x"), _candidate(2, 2.0, kl=0.2, rejected="x")], 5.0)
    assert (chosen.point, passed) == (2, False)


def test_no_scored_candidate_is_an_error():
    with pytest.raises(ExciseError, match="no candidate direction could be scored"):
        choose([Candidate(1, -1, 0.0, rejected="no difference")], 5.0)
