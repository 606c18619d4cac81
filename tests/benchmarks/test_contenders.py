"""Who takes part where training steps are compared."""

from benchmarks.contenders import RULES, samples


def test_a_rule_that_learns_from_some_images_needs_enough_of_them():
    assert samples("ssa, sample 4", 8)
    assert not samples("ssa, sample 4", 4)  # of which one would be left
    assert all(samples(rule, 4) for rule in RULES if "sample" not in rule)
