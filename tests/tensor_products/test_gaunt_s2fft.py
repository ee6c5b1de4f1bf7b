"""The Gaunt product by s2fft: its samplings against the grid, kernels, precision, refusals."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from against_grid import (
    CONTENTS,
    POWERS,
    UNCOUPLED,
    arguments,
    assert_equals_grid,
    assert_gaunt_coefficients,
    assert_power_equals_grid,
)
from s2fft.sampling import s2_samples

from equizoo.config import from_dict, to_dict
from equizoo.tensor_products._base import TensorProduct, natural_irreps
from equizoo.tensor_products._transforms import BoundTransformed
from equizoo.tensor_products.analysis import coefficients
from equizoo.tensor_products.gaunt_grid import GauntGrid
from equizoo.tensor_products.gaunt_s2fft import SAMPLINGS, GauntS2FFT, Spherical, kernels

samplings = pytest.mark.parametrize("sampling", SAMPLINGS)


@pytest.mark.parametrize("irreps", CONTENTS, ids=str)
def test_equals_the_grid(irreps):
    assert_equals_grid(GauntS2FFT(), irreps)


@pytest.mark.parametrize("sampling", SAMPLINGS[1:])
def test_every_sampling_equals_the_grid(sampling):
    assert_equals_grid(GauntS2FFT(sampling), CONTENTS[2])


@pytest.mark.parametrize("power", POWERS, ids=str)
def test_power_equals_the_grid(power):
    assert_power_equals_grid(GauntS2FFT(), *power)


@pytest.mark.parametrize("sampling", SAMPLINGS[1:])
def test_power_of_every_sampling_equals_the_grid(sampling):
    assert_power_equals_grid(GauntS2FFT(sampling), "0e+1o+2e", "0e+1o+5o", 3)


@pytest.mark.parametrize("irreps", [CONTENTS[1], CONTENTS[5], CONTENTS[6], UNCOUPLED], ids=str)
def test_coefficients_in_closed_form(irreps):
    assert_gaunt_coefficients(GauntS2FFT().bind(*irreps))


@pytest.mark.parametrize("sampling", SAMPLINGS[1:])
def test_derivatives_of_every_sampling(sampling):
    """Reverse over reverse, forward, vmap: the laws do it for the default."""
    irreps = ("0e+1o+2e", "0e+1o", "0e+1o+2e")
    bound, grid = GauntS2FFT(sampling).bind(*irreps), GauntGrid().bind(*irreps)
    args = arguments(grid, 3)

    def derivatives(product):
        def along(*args):
            gradients = jax.grad(lambda *args: jnp.sum(jnp.sin(product(*args))), (0, 1, 2))(*args)
            return sum(jnp.sum(jnp.cos(gradient)) for gradient in gradients)

        stacked = [jnp.stack([a, 2 * a]) for a in args]
        forward = jax.jvp(product, args, args)[1]
        return jax.vmap(jax.grad(along, (0, 1, 2)))(*stacked), forward

    found = jax.tree.leaves(jax.jit(lambda: derivatives(bound))())
    expected = jax.tree.leaves(jax.jit(lambda: derivatives(grid))())
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10 * max(1, np.abs(b).max()))


@samplings
@pytest.mark.parametrize("band", [1, 4, 13])
def test_kernels_are_legendre_functions(band, sampling):
    latitudes = s2_samples.thetas(band, sampling)
    degree, order = np.indices((band, band))
    expected = scipy.special.sph_harm_y(degree, order, latitudes[:, None, None], 0).real
    expected = np.where(order <= degree, expected, 0)
    np.testing.assert_allclose(kernels(band, sampling)[0], expected, atol=2e-14)


@samplings
def test_a_smaller_band_is_not_exact(sampling):
    irreps = natural_irreps(2), natural_irreps(2), natural_irreps(2)

    class Smaller(Spherical):
        def __init__(self, degrees):
            super().__init__(degrees, sampling)
            self.band -= 1

    assert coefficients(GauntS2FFT(sampling).bind(*irreps)).residual < 1e-12
    assert coefficients(BoundTransformed(*irreps, Smaller)).residual > 1e-3


@pytest.mark.parametrize("sampling", ["healpix", "MW", "lebedev"])
def test_inexact_and_unknown_samplings_are_refused(sampling):
    with pytest.raises(ValueError, match=rf"sampling is '{sampling}', expected one of gl, dh, mw"):
        GauntS2FFT(sampling)


def test_the_sampling_is_written_and_read():
    written = to_dict(GauntS2FFT("mw"))
    assert written == {"name": "gaunt_s2fft", "sampling": "mw"}
    assert from_dict(TensorProduct, written) == GauntS2FFT("mw")
    with pytest.raises(ValueError, match="healpix"):
        from_dict(TensorProduct, {"name": "gaunt_s2fft", "sampling": "healpix"})


def test_quiet_without_x64():
    """s2fft warns where it would compute in float32; its kernels here are float64."""
    code = "from equizoo.tensor_products.gaunt_s2fft import GauntS2FFT, kernels; import jax\n"
    code += "print(kernels(3, 'gl')[1].dtype, jax.config.read('jax_enable_x64'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.stdout.strip(), run.stderr) == ("float64 False", "")
