import pytest


def _row(stage, iteration, split, decoding, accuracy):
    return {
        "stage": stage,
        "iteration": iteration,
        "split": split,
        "decoding": decoding,
        "accuracy": accuracy,
        "low": accuracy - 0.021,
        "high": accuracy + 0.021,
        "n": 1319,
        "mean_turns": 2.31,
        "tool_error_rate": 0.093 if decoding == "greedy" else 0.2,
        "pass_at_8": 0.931 if decoding == "sampled" else None,
        "kl": None if stage == "sft" else 12.34,
    }


@pytest.fixture
def rows():
    """Test before dev, later iterations first: the order of a file is not that of a table."""
    return [
        _row(stage, iteration, split, decoding, 0.70 + 0.03 * iteration - 0.1 * sampled)
        for split in ("test", "dev")
        for stage, iteration in (("mdpo", 2), ("mdpo", 1), ("sft", 0))
        for sampled, decoding in enumerate(("greedy", "sampled"))
    ]


@pytest.fixture
def curves():
    """Two iterations, one long and one short, as metrics.jsonl has them."""

    def record(i):
        return {
            "step": i,
            "loss": None if i == 3 else 0.69 - 0.001 * i,
            "rewards/accuracies": 0.5,
            "rewards/margins": 0.01 * i,
            "logps/chosen": -100.0 - i,
            "logps/rejected": -110.0 - 2 * i,
        }

    return {"iteration 1": [record(i) for i in range(60)], "iteration 2": [{"step": 0}, record(1)]}
