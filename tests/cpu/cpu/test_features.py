"""Tests masks and score modifications on the CPU path."""

from __future__ import annotations

from hypothesis import given, settings

from tests.support.features import FeatureCase, check_features, feature_cases


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(feature_cases(most_rows=129))
def test_random_features(case: FeatureCase) -> None:
    check_features(case, "cpu")
