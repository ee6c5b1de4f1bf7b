"""Forces as an input: what tells a structure with displaced atoms from others.

Reference: Liao et al. 2024 (DeNS), https://arxiv.org/abs/2403.09549, section 3.2.
"""

import dataclasses

import e3nn_jax as e3nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from equizoo.graph import Graph
from equizoo.layers.harmonics import safe_norm, spherical_harmonics


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForceInput:
    """A model takes forces of corrupted structures as input, and has a head for their noise."""

    scale: float = 1.0  # [eV/Å] forces are encoded in units of this

    def __post_init__(self):
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale} eV/Å, expected a positive force.")

    def encoded(
        self, irreps: e3nn.Irreps, graph: Graph, dtype: jnp.dtype
    ) -> Float[Array, "nodes components"]:
        r"""Harmonics of each atom's force, zero for none: an odd degree needs odd ``irreps``.

        .. math:: f_{l m} = \frac{|F|}{\sqrt 3 \, F_0} Y_{l m}(F / |F|)

        so that degree 1 is the force itself, over ``scale``.
        """
        if graph.given_forces is None:
            return jnp.zeros((graph.num_nodes, irreps.dim), dtype)
        lengths = safe_norm(graph.given_forces) / (float(np.sqrt(3)) * self.scale)
        return lengths[:, None] * spherical_harmonics(irreps, graph.given_forces)
