import itertools
import random

import pytest

from mdpo_jax.data import synthetic
from mdpo_jax.environment.interpreter import PythonInterpreter

SUITE = synthetic.Suite(steps=(0.3, 0.4, 0.3))


def test_splits_are_disjoint():
    keys = {
        split: {c.key for c in itertools.islice(SUITE.chains(split, 0), 400)}
        for split in ("sft", "train", "dev", "test")
    }
    for a, b in itertools.combinations(keys.values(), 2):
        assert not a & b


def test_problems_are_repeatable_and_continue_after_skip():
    whole = synthetic.problems(SUITE, "train", 30, seed=5)
    assert synthetic.problems(SUITE, "train", 30, seed=5) == whole
    assert [p.id for p in synthetic.problems(SUITE, "train", 10, 5, skip=20)] == [
        p.id for p in whole[20:]
    ]
    assert synthetic.problems(SUITE, "train", 30, seed=6) != whole


def test_values_stay_within_the_bounds():
    for chain in itertools.islice(SUITE.chains("dev", 1), 300):
        assert all(0 <= v <= SUITE.largest_value for v in chain.values)


def test_demonstrations_are_right_by_the_real_tool():
    """Every block of a demonstration, run by the interpreter, prints what its observation says."""
    demos = synthetic.demonstrations(synthetic.Suite(noise=0.0, mental_scale=0.0), 40, 2)
    with PythonInterpreter(preload=("math",), timeout=10) as tool:
        for index, messages in enumerate(demos):
            session = tool.start(f"d#{index}")
            for said, seen in itertools.pairwise(messages[1:]):
                if said["role"] == "assistant":
                    text = session.run(said["content"]).result().text
                    assert seen["content"] == f"```output\n{text}\n```"
            session.close()


def test_noise_and_forgotten_imports_occur():
    texts = [m["content"] for d in synthetic.demonstrations(synthetic.Suite(), 300, 0) for m in d]
    assert any("Warning: " in t for t in texts)
    assert any(synthetic.NO_MATH in t for t in texts)


@pytest.mark.parametrize("operation", synthetic.OPERATIONS, ids=lambda o: o.name)
def test_each_operation_is_said_with_its_operand(operation):
    chain = synthetic.Chain(50, ((operation.name, 7),))
    words = synthetic.question(chain, random.Random(0))
    assert ("7" in words) == (operation.operands is not None)


def test_a_suite_that_has_no_more_chains_says_so():
    small = synthetic.Suite(steps=(1.0,), largest_start=9, largest_value=9)
    with pytest.raises(ValueError, match=r"largest_start=9 .* distinct dev problems"):
        synthetic.problems(small, "dev", 5000, 0)
