"""The training loss, and the error sums that validation prints."""

from typing import NamedTuple, cast

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from equizoo.graph import Graph, Labels, sum_graphs
from equizoo.train.config import LossWeights
from equizoo.zoo._base import Prediction


def loss(
    prediction: Prediction, graph: Graph, labels: Labels, weights: LossWeights
) -> Float[Array, ""]:
    r"""Weighted mean errors over the labels present in the batch.

    .. math:: w_E \langle (\Delta E / n)^2 \rangle + w_F \langle \Delta F_\alpha^2 \rangle
        + w_S \langle \Delta \sigma_{\alpha\beta}^2 \rangle

    With ``huber_delta`` the square becomes Huber's function (times two) of the same argument.
    """
    penalty = _penalty(weights.huber_delta)
    atoms = _num_atoms(graph, labels.energy.dtype)
    terms = (
        (weights.energy, (prediction.energy - labels.energy) / atoms, labels.energy_mask),
        (weights.forces, prediction.forces - labels.forces, labels.forces_mask),
        (weights.stress, prediction.stress - labels.stress, labels.stress_mask),
    )
    parts = [w * _masked_mean(penalty(x), mask) for w, x, mask in terms if w > 0]
    return cast(Array, sum(parts))  # no bare 0: LossWeights has a positive one


class ErrorSums(NamedTuple):
    """Sums over the labels of a batch, from which means over a data set are formed."""

    energy_squares: Float[Array, ""]  # [eV^2]
    energy_per_atom_squares: Float[Array, ""]  # [eV^2]
    forces_squares: Float[Array, ""]  # [(eV/Å)^2]
    stress_squares: Float[Array, ""]  # [(eV/Å^3)^2]
    energies: Float[Array, ""]
    force_components: Float[Array, ""]
    stress_components: Float[Array, ""]


def error_sums(prediction: Prediction, graph: Graph, labels: Labels) -> ErrorSums:
    """Squared errors of a batch and the numbers of labels behind them."""
    energy = jnp.where(labels.energy_mask, prediction.energy - labels.energy, 0)
    forces = jnp.where(labels.forces_mask[:, None], prediction.forces - labels.forces, 0)
    stress = jnp.where(labels.stress_mask[:, None, None], prediction.stress - labels.stress, 0)
    count = labels.energy.dtype
    return ErrorSums(
        energy_squares=jnp.sum(energy**2),
        energy_per_atom_squares=jnp.sum((energy / _num_atoms(graph, count)) ** 2),
        forces_squares=jnp.sum(forces**2),
        stress_squares=jnp.sum(stress**2),
        energies=jnp.sum(labels.energy_mask).astype(count),
        force_components=3 * jnp.sum(labels.forces_mask).astype(count),
        stress_components=9 * jnp.sum(labels.stress_mask).astype(count),
    )


def _num_atoms(graph: Graph, dtype) -> Float[Array, " graphs"]:
    return jnp.maximum(sum_graphs(jnp.ones(graph.num_nodes, dtype), graph), 1)


def _masked_mean(x: Float[Array, "n ..."], mask: Bool[Array, " n"]) -> Float[Array, ""]:
    x = jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, 0)
    components = x.size // x.shape[0]
    return jnp.sum(x) / jnp.maximum(components * jnp.sum(mask), 1).astype(x.dtype)


def _penalty(delta: float | None):
    if delta is None:
        return jnp.square
    return lambda x: jnp.where(jnp.abs(x) <= delta, x**2, delta * (2 * jnp.abs(x) - delta))
