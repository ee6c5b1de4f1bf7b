"""The training loss, and the error sums that validation prints."""

from collections.abc import Callable
from typing import NamedTuple, cast

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from equizoo.graph import Graph, Labels, sum_graphs
from equizoo.layers.harmonics import safe_norm
from equizoo.train.config import Errors, LossWeights
from equizoo.zoo._base import Prediction

Penalty = Callable[[Float[Array, "n ..."]], Float[Array, "n ..."]]


class Counts(NamedTuple):
    """How many structures, atoms, structures have labels: what means are formed over."""

    energy: Int[Array, ""]
    forces: Int[Array, ""]  # or noise
    stress: Int[Array, ""]


def label_counts(labels: Labels) -> Counts:
    """Of one batch."""
    forces, noise = labels.forces_mask, labels.noise_mask
    return Counts(
        energy=jnp.sum(labels.energy_mask),
        forces=jnp.sum(forces if noise is None else forces | noise),
        stress=jnp.sum(labels.stress_mask),
    )


def loss(
    prediction: Prediction,
    graph: Graph,
    labels: Labels,
    weights: LossWeights,
    noise_weight: Float[Array, ""] | float = 0.0,
    counts: Counts | None = None,
) -> Float[Array, ""]:
    r"""Weighted mean errors over the labels present in the batch.

    .. math:: w_E \langle (\Delta E / n)^2 \rangle + w_F \langle \Delta F_\alpha^2 \rangle
        + w_S \langle \Delta \sigma_{\alpha\beta}^2 \rangle

    With ``huber_delta`` the square becomes Huber's function (times two) of the same argument; with
    ``Errors.NORMS`` it is

    .. math:: w_E \langle |\Delta E| \rangle + w_F \langle |\Delta F| \rangle
        + w_S \langle |\Delta \sigma| \rangle .

    Atoms that were displaced have an error of their noise, times ``noise_weight``, in the place of
    that of their force: the mean is over both kinds of atoms together. With the ``counts`` of a
    larger batch, the part that these labels have in its loss. Raises ``ValueError`` when stress has
    a weight and the model predicts none.
    """
    if prediction.stress is None and weights.stress > 0:
        raise ValueError(
            f"The weight of the stress is {weights.stress}, but a model with direct forces "
            "predicts no stress; set it to 0, or let the forces be the gradient of the energy."
        )
    counts = label_counts(labels) if counts is None else counts
    parts = [
        weight * _mean(penalties, mask, getattr(counts, quantity))
        for quantity, (penalties, mask) in _penalties(prediction, graph, labels, weights).items()
        if (weight := getattr(weights, quantity)) > 0
    ]
    noise_mask = labels.noise_mask
    if prediction.noise is not None and labels.noise is not None and noise_mask is not None:
        penalties = _penalty(weights)(prediction.noise - labels.noise)
        parts.append(noise_weight * _mean(penalties, noise_mask, counts.forces))
    return cast(Array, sum(parts))  # no bare 0: LossWeights has a positive one


class LossSums(NamedTuple):
    """For each quantity in the loss the sum of what is averaged there, and over how many."""

    energy: Float[Array, "2"]
    forces: Float[Array, "2"]
    stress: Float[Array, "2"]


def loss_sums(
    prediction: Prediction, graph: Graph, labels: Labels, weights: LossWeights
) -> LossSums:
    """The sums of a batch, from which the loss over a data set is formed."""

    def summed(penalties, mask):
        kept, count = _masked(penalties, mask)
        return jnp.stack([jnp.sum(kept), count])

    terms = _penalties(prediction, graph, labels, weights)
    return LossSums(**{quantity: summed(*term) for quantity, term in terms.items()})


def _penalties(
    prediction: Prediction, graph: Graph, labels: Labels, weights: LossWeights
) -> dict[str, tuple[Float[Array, "n ..."], Bool[Array, " n"]]]:
    """What the loss is a mean of, by quantity, and where there is a label."""
    penalty = _penalty(weights)
    energies = prediction.energy - labels.energy
    if weights.errors == Errors.SQUARES:
        energies = energies / _num_atoms(graph, labels.energy.dtype)
    return {
        "energy": (penalty(energies[:, None]), labels.energy_mask),
        "forces": (penalty(prediction.forces - labels.forces), labels.forces_mask),
        "stress": (penalty(_stress_errors(prediction, labels)), labels.stress_mask),
    }


class ErrorSums(NamedTuple):
    """What :class:`equizoo.eval.metrics.MeanErrors` needs of a batch, for each quantity.

    The number of components that have a label, and the sums of their absolute and squared errors.
    """

    energy: Float[Array, "3"]
    energy_per_atom: Float[Array, "3"]
    forces: Float[Array, "3"]
    stress: Float[Array, "3"]


def error_sums(prediction: Prediction, graph: Graph, labels: Labels) -> ErrorSums:
    """The sums of a batch, from which means over a data set are formed."""
    energy = prediction.energy - labels.energy
    atoms = _num_atoms(graph, labels.energy.dtype)
    predicted = labels.stress_mask if prediction.stress is not None else labels.stress_mask & False
    return ErrorSums(
        energy=_sums(energy, labels.energy_mask),
        energy_per_atom=_sums(energy / atoms, labels.energy_mask),
        forces=_sums(prediction.forces - labels.forces, labels.forces_mask),
        stress=_sums(_stress_errors(prediction, labels), predicted),
    )


def _stress_errors(prediction: Prediction, labels: Labels) -> Float[Array, "graphs 3 3"]:
    if prediction.stress is None:
        return jnp.zeros_like(labels.stress)
    return prediction.stress - labels.stress


def _num_atoms(graph: Graph, dtype) -> Float[Array, " graphs"]:
    return jnp.maximum(sum_graphs(jnp.ones(graph.num_nodes, dtype), graph), 1)


def _masked(
    x: Float[Array, "n ..."], mask: Bool[Array, " n"]
) -> tuple[Float[Array, "n ..."], Float[Array, ""]]:
    """Zero where there is no label, and how many components there are elsewhere."""
    components = x.size // x.shape[0]
    expanded = mask.reshape(mask.shape + (1,) * (x.ndim - 1))
    return jnp.where(expanded, x, 0), (components * jnp.sum(mask)).astype(x.dtype)


def _mean(
    x: Float[Array, "n ..."], mask: Bool[Array, " n"], count: Int[Array, ""]
) -> Float[Array, ""]:
    """The sum where there is a label, over the components of ``count`` labels."""
    x, _ = _masked(x, mask)
    return jnp.sum(x) / jnp.maximum(x.size // x.shape[0] * count, 1).astype(x.dtype)


def _sums(errors: Float[Array, "n ..."], mask: Bool[Array, " n"]) -> Float[Array, "3"]:
    errors, count = _masked(errors, mask)
    return jnp.stack([count, jnp.sum(jnp.abs(errors)), jnp.sum(errors**2)])


def _penalty(weights: LossWeights) -> Penalty:
    """Errors to what is averaged."""
    if weights.errors == Errors.NORMS:
        return lambda x: safe_norm(x.reshape(x.shape[0], -1))
    delta = weights.huber_delta
    if delta is None:
        return jnp.square
    return lambda x: jnp.where(jnp.abs(x) <= delta, x**2, delta * (2 * jnp.abs(x) - delta))
