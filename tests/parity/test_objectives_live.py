"""Losses and metrics against TRL's own code on fresh random rows."""

import pytest

trl = pytest.importorskip("trl")
if not trl.__version__.startswith("1.16."):
    pytest.skip("calls TRL 1.16's private methods", allow_module_level=True)

import make_objective_fixtures as trl_cases  # noqa: E402
import objective_cases  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [*trl_cases.DPO, *trl_cases.KTO])
def test_loss_metrics_and_gradient_equal(name, seed):
    if name in trl_cases.DPO:
        case = trl_cases.run_dpo(trl_cases.DPO[name], 1000 + seed, pairs=3 + seed)
    else:
        case = trl_cases.run_kto(trl_cases.KTO[name], 1000 + seed)
    objective_cases.compare(case)
