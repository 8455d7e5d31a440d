"""M-DPO and M-KTO through a small model against TRL's, frozen by make_trl_model_fixtures.py.

Needs no torch, no trl: the models are the checkpoints of the fixtures beside.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import trl_model_cases as cases

from mdpo_jax.model.hf_config import from_hf
from mdpo_jax.model.weights import read_params

HERE = Path(__file__).parent
FROZEN = sorted((HERE / "fixtures_trl").glob("*.npz"))


@pytest.fixture(scope="module")
def model():
    """Checkpoint -> (config, params)."""
    read = {}

    def get(name):
        if name not in read:
            folder = HERE / "fixtures" / name
            config = from_hf(json.loads((folder / "config.json").read_text()))
            read[name] = config, read_params(folder, config)
        return read[name]

    return get


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.stem)
def test_loss_metrics_sums_and_gradients_equal(path, model, by_name):
    case = dict(np.load(path))
    found = cases.differences(
        case, model(str(case["policy"])), model(str(case["reference"])), by_name
    )
    cases.check(found, case)


def test_the_cases_cover_every_loss_and_more_than_one_row():
    seen = [dict(np.load(path)) for path in FROZEN]
    assert {str(c["loss_type"]) for c in seen} == {"sigmoid", "ipo", "hinge", "robust", "kto"}
    assert all(c["lengths"].sum() > cases.LAYOUT.rows * cases.LAYOUT.row_length for c in seen)
