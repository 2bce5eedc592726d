"""Tests the doors' errors: the original's exception types and argument names."""

from __future__ import annotations

import inspect
import pickle

import pytest

import jitattn
from jitattn.compat._errors import CheckFailedError, DoorError, ExtensionError, check, errors_as

KINDS = [(CheckFailedError, AssertionError), (ExtensionError, RuntimeError)]


@pytest.mark.parametrize(("kind", "theirs"), KINDS)
def test_a_refusal_is_of_both_kinds(kind: type[DoorError], theirs: type[Exception]) -> None:
    @errors_as(kind, {"q": "query", "q_seqs": "q_seq_start", "see k": "look at key"})
    def function(q: int, *, k: int = 0) -> int:
        """Take two numbers."""
        if q == k:
            raise jitattn.InvalidInputError("q (q.x) and q_seqs: len_q and Lq are equal; see k")
        return q + k

    assert function(1, k=2) == 3
    assert function.__doc__ == "Take two numbers."
    assert list(inspect.signature(function).parameters) == ["q", "k"]
    with pytest.raises(theirs) as found:
        function(1, k=1)
    error = found.value
    assert isinstance(error, jitattn.InvalidInputError)
    text = "query (query.x) and q_seq_start: len_q and Lq are equal; look at key"
    assert str(error) == text
    assert type(error.__cause__) is jitattn.InvalidInputError
    assert type(pickle.loads(pickle.dumps(error))) is kind


def test_what_has_a_kind_keeps_it_and_others_pass() -> None:
    @errors_as(ExtensionError, {"q": "query"})
    def function(error: Exception | None) -> None:
        check(error is not None, "q is None")
        raise error or KeyError

    with pytest.raises(AssertionError, match="q is None"):
        function(None)
    for error in (jitattn.UnsupportedError("q"), jitattn.LaunchError("q"), KeyError("q")):
        with pytest.raises(type(error)) as found:
            function(error)
        assert found.value is error
    # Nothing is needed for what no kernel computes.
    assert issubclass(jitattn.UnsupportedError, RuntimeError)
