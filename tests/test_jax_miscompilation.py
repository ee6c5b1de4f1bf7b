"""The installed jax does not have the CPU faults for which some releases are excluded."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
EXCLUDED = {"0.10.2", "0.11.0", "0.11.1"}


@pytest.mark.parametrize(("dtype", "rows"), [("float64", 16_385), ("float32", 32_769)])
def test_small_matrix_products_under_vmap_and_jit(dtype, rows):
    """jax 0.10.2 returns wrong rows without a word, https://github.com/jax-ml/jax/issues/39103."""
    matrix = jnp.eye(3, dtype=dtype)
    x = np.zeros((rows, 3), dtype)
    x[:, 0] = np.arange(rows)
    squared = jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))
    squared = jax.jit(squared, compiler_options={"xla_backend_optimization_level": 3})
    np.testing.assert_allclose(squared(x), x[:, 0] ** 2, rtol=1e-6)


HIGH_RANK = """
import jax, jax.numpy as jnp, numpy as np
a, b = np.full((5, 2, 6), 2, np.float32), np.full((5, 2, 6, 5, 5, 5, 5, 5), 3, np.float32)
f = jax.jit(lambda a, b: jnp.log(jnp.sum(a[..., None, None, None, None, None] * b, axis=2)))
np.testing.assert_allclose(f(a, b), np.log(36), rtol=1e-6)
a, b = np.full((3, 1, 2, 2, 8, 8, 8), 2, np.float32), np.full((3, 1, 2, 2, 8, 8, 8), 3, np.float32)
np.testing.assert_allclose(jax.jit(lambda a, b: jnp.sum(a * b, axis=3))(a, b), 12, rtol=1e-6)
"""


def test_reductions_of_high_rank():
    """jaxlib 0.10.2 and 0.11.0 crash or hang, https://github.com/jax-ml/jax/issues/39257, 40412.

    In a process of its own, since the fault kills it.
    """
    run = subprocess.run(
        [sys.executable, "-c", HIGH_RANK],
        env={key: value for key, value in os.environ.items() if key != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


def test_faulty_releases_are_excluded():
    requirements = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]["dependencies"]
    (jax_requirement,) = [r for r in requirements if re.match(r"jax\b(?!-|\w)", r)]
    assert set(re.findall(r"!=\s*([0-9.]+)", jax_requirement)) >= EXCLUDED
    assert jax.__version__ not in EXCLUDED
