"""Denoising of corrupted structures as an auxiliary task (DeNS), with the published settings.

Reference: Liao et al. 2024, https://arxiv.org/abs/2403.09549, and its published implementation.
"""

import dataclasses
import enum

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from equizoo.data.corruption import Corruption, log_spaced


class Decay(enum.StrEnum):
    """How the weight changes over a run: not at all, or in a line down to zero at its end."""

    CONSTANT = "constant"
    LINEAR = "linear"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoising:
    """An auxiliary task: some atoms of some batches are displaced, and the model is asked by how
    much, given their forces before.

    In such a batch, energies and the forces of the other atoms remain targets, those of before too:
    structures out of equilibrium are what their forces say, so that noise is defined by them.
    The model must have a ``force_input``. Validation and use are not affected.
    """

    corruption: Corruption
    weight: float  # of the errors of the noise, which is in units of its largest deviation
    decay: Decay = Decay.CONSTANT

    def __post_init__(self):
        if not self.weight > 0:
            raise ValueError(f"weight is {self.weight}, expected a positive number.")

    def weight_at(self, step: Int[Array, ""], total_steps: int) -> Float[Array, ""]:
        """The weight in a step of a run."""
        weight = jnp.asarray(self.weight, jnp.float32)
        if self.decay == Decay.CONSTANT:
            return weight
        return weight * jnp.maximum(1 - step.astype(jnp.float32) / total_steps, 0)


# Table 8 and section 4 of the paper; weights as there, of targets over their standard deviation,
# beside 2 or 4 of energies and 100 of forces (LossWeights with Errors.NORMS). Of the 30 epochs on
# OC20 2M, file names of the implementation say 0.15 Å, its settings 0.1 Å.
PUBLISHED: dict[str, Denoising] = {
    "oc20_2m": Denoising(
        corruption=Corruption(probability=0.5, fraction=0.5, noise=(0.1,)), weight=10.0
    ),
    "oc20_all_md": Denoising(
        corruption=Corruption(probability=0.125, fraction=0.25, noise=(0.1,), spared="md"),
        weight=15.0,
    ),
    "oc22": Denoising(
        corruption=Corruption(probability=0.5, fraction=0.5, noise=(0.15,)), weight=25.0
    ),
    "md17": Denoising(
        corruption=Corruption(probability=0.25, fraction=0.25, noise=(0.05,)),
        weight=5.0,
        decay=Decay.LINEAR,
    ),
    "multi_scale": Denoising(
        corruption=Corruption(probability=0.5, fraction=0.5, noise=log_spaced(0.01, 0.5, 50)),
        weight=10.0,
    ),
}
