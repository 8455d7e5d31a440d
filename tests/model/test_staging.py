import ml_dtypes
import numpy as np
import pytest

from mdpo_jax.model import staging


@pytest.mark.parametrize("shape", [(1, 1), (16, 2048), (17, 2049), (40, 5000), (3000, 3), (1, 9)])
@pytest.mark.parametrize("turned", [False, True])
def test_blocks_cover_a_matrix_that_no_tile_divides(shape, turned, monkeypatch):
    monkeypatch.setattr(staging, "BLOCK_BYTES", 1 << 12)
    x = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    out = staging.empty(shape[::-1] if turned else shape, np.uint16)
    assert out.ctypes.data % 64 == 0
    for rows in staging.blocks(x):
        staging.copy(out, x, rows, turned)
    np.testing.assert_array_equal(out, x.T if turned else x)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_finite_sees_one_bad_value_anywhere(dtype, bad):
    x = np.full((700, 3), ml_dtypes.finfo(dtype).min, dtype)
    assert staging.finite(x, dtype)
    for place in (0, 1234, x.size - 1):
        y = x.copy()
        y.flat[place] = bad
        assert not staging.finite(y, dtype)
        assert not staging.finite(y, np.float32)


def test_finite_is_about_the_wanted_type():
    x = np.array([[1.0, 1e5]], np.float32)
    assert staging.finite(x, ml_dtypes.bfloat16)
    assert not staging.finite(x, np.float16)
