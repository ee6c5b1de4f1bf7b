"""Optimisers of atomic positions for many structures at once, each with a memory of its own.

They are pure functions on a padded batch. Sums and largest values are per structure, so a
structure takes the same steps whatever else is in its batch.
"""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from equizoo.graph import Graph, sum_graphs


class Memory(NamedTuple):
    """What an optimiser knows, in arrays whose first axis is that of nodes or of graphs."""

    nodes: Any
    graphs: Any

    def regrouped(self, nodes: Int[Array, " nodes"], graphs: Int[Array, " graphs"]) -> "Memory":
        """The memory of another batch: rows of these indices, zeros where they are out of range."""

        def rows(index):
            return lambda x: x.at[index].get(mode="fill", fill_value=0)

        return Memory(
            jax.tree.map(rows(nodes), self.nodes), jax.tree.map(rows(graphs), self.graphs)
        )


class PositionOptimizer(abc.ABC):
    """A rule for the next step. A memory of zeros is that of a structure that begins."""

    @abc.abstractmethod
    def start(self, nodes: int, graphs: int, dtype: Any) -> Memory:
        """Zeros, in the shapes of a batch."""

    @abc.abstractmethod
    def step(
        self,
        memory: Memory,
        forces: Float[Array, "nodes 3"],  # [eV/Å] zero on atoms that are fixed
        graph: Graph,
    ) -> tuple[Float[Array, "nodes 3"], Memory]:  # [Å]
        """Where every atom goes from where it is, and the memory after that."""


@dataclasses.dataclass(frozen=True)
class LBFGS(PositionOptimizer):
    r"""Steps :math:`H F` with an inverse Hessian from the last ``memory`` steps.

    The inverse Hessian begins as :math:`1/\alpha`. A step whose longest displacement of an atom is
    ``max_step`` or more is scaled down to it. No line search: one evaluation to a step. The same
    steps as ``ase.optimize.LBFGS`` with the same numbers.

    Reference: Nocedal 1980, https://doi.org/10.1090/S0025-5718-1980-0572855-7; Liu & Nocedal 1989.
    """

    memory: int = 100  # steps
    alpha: float = 70.0  # [eV/Å^2] curvature that is assumed at first
    max_step: float = 0.2  # [Å]

    def __post_init__(self):
        if self.memory < 1 or not self.alpha > 0 or not self.max_step > 0:
            raise ValueError(f"{self}: memory, alpha and max_step must be positive.")

    def start(self, nodes, graphs, dtype):
        history = jnp.zeros((nodes, self.memory, 3), dtype)
        last = jnp.zeros((nodes, 3), dtype)
        return Memory(
            (history, history, last, last),
            (jnp.zeros((graphs, self.memory), dtype), jnp.zeros(graphs, bool)),
        )

    def step(self, memory, forces, graph):
        steps, changes, last_step, last_forces = memory.nodes
        inverse_curvatures, started = memory.graphs
        change = last_forces - forces  # of the gradient
        curvature = _dot(last_step, change, graph)
        usable = started & (curvature != 0)
        newest = jnp.where(usable, 1 / jnp.where(usable, curvature, 1), 0)
        steps = _pushed(steps, last_step)
        changes = _pushed(changes, change)
        inverse_curvatures = _pushed(inverse_curvatures, newest)
        step = self._newton(steps, changes, inverse_curvatures, forces, graph)
        longest = _largest_norm(step, graph)
        tiny = jnp.finfo(step.dtype).tiny
        scale = jnp.where(longest >= self.max_step, self.max_step / jnp.maximum(longest, tiny), 1)
        step = step * _to_nodes(scale, graph)[:, None]
        return step, Memory(
            (steps, changes, step, forces), (inverse_curvatures, jnp.ones_like(started))
        )

    def _newton(self, steps, changes, inverse_curvatures, forces, graph):
        """The two-loop recursion; entries without curvature, of steps not made, do nothing."""
        known = jnp.any(inverse_curvatures != 0, axis=0)
        oldest = jnp.where(jnp.any(known), jnp.argmax(known), self.memory)

        def entry(x, i):
            return jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)

        def backward(k, carry):
            q, weights = carry
            i = self.memory - 1 - k
            weight = entry(inverse_curvatures, i) * _dot(entry(steps, i), q, graph)
            q = q - _to_nodes(weight, graph)[:, None] * entry(changes, i)
            return q, jax.lax.dynamic_update_index_in_dim(weights, weight, i, 1)

        def forward(i, z):
            weight = entry(inverse_curvatures, i) * _dot(entry(changes, i), z, graph)
            weight = entry(weights, i) - weight
            return z + _to_nodes(weight, graph)[:, None] * entry(steps, i)

        carry = forces, jnp.zeros_like(inverse_curvatures)
        q, weights = jax.lax.fori_loop(0, self.memory - oldest, backward, carry)
        return jax.lax.fori_loop(oldest, self.memory, forward, q / self.alpha)


@dataclasses.dataclass(frozen=True)
class FIRE(PositionOptimizer):
    """Damped dynamics that stops when it goes uphill; slower than L-BFGS, and hard to upset.

    The same steps as ``ase.optimize.FIRE`` with the same numbers: ``max_step`` bounds the length
    of the step of all atoms of a structure together.

    Reference: Bitzek et al. 2006, https://doi.org/10.1103/PhysRevLett.97.170201.
    """

    time_step: float = 0.1  # ASE's unit of time, with all masses one
    max_time_step: float = 1.0
    max_step: float = 0.2  # [Å]
    patience: int = 5  # downhill steps before the time step grows
    growth: float = 1.1
    shrinkage: float = 0.5
    mixing: float = 0.1
    mixing_decay: float = 0.99

    def start(self, nodes, graphs, dtype):
        zeros = jnp.zeros(graphs, dtype)
        # time step and mixing are kept as they are less their first values, so that zeros begin
        return Memory(
            jnp.zeros((nodes, 3), dtype), (zeros, zeros, jnp.zeros(graphs, jnp.int32), zeros > 0)
        )

    def step(self, memory, forces, graph):
        velocity = memory.nodes
        time_step, mixing, downhill, started = memory.graphs
        time_step, mixing = time_step + self.time_step, mixing + self.mixing
        power = _dot(forces, velocity, graph)
        lengths = jnp.sqrt(_dot(forces, forces, graph)), jnp.sqrt(_dot(velocity, velocity, graph))
        ratio = jnp.where(lengths[0] > 0, lengths[1] / jnp.where(lengths[0] > 0, lengths[0], 1), 0)
        goes_down = started & (power > 0)
        mixed = (
            _to_nodes(1 - mixing, graph)[:, None] * velocity
            + _to_nodes(mixing * ratio, graph)[:, None] * forces
        )
        velocity = jnp.where(_to_nodes(goes_down, graph)[:, None], mixed, 0)
        faster = goes_down & (downhill > self.patience)
        stops = started & ~goes_down
        grown = jnp.minimum(time_step * self.growth, self.max_time_step)
        time_step = jnp.where(
            faster, grown, jnp.where(stops, time_step * self.shrinkage, time_step)
        )
        mixing = jnp.where(
            faster, mixing * self.mixing_decay, jnp.where(stops, self.mixing, mixing)
        )
        downhill = jnp.where(goes_down, downhill + 1, 0)
        velocity = velocity + _to_nodes(time_step, graph)[:, None] * forces
        step = _to_nodes(time_step, graph)[:, None] * velocity
        length = jnp.sqrt(_dot(step, step, graph))
        tiny = jnp.finfo(step.dtype).tiny
        scale = jnp.where(length > self.max_step, self.max_step / jnp.maximum(length, tiny), 1)
        return step * _to_nodes(scale, graph)[:, None], Memory(
            velocity,
            (
                time_step - self.time_step,
                mixing - self.mixing,
                downhill,
                jnp.ones_like(started),
            ),
        )


def largest_force(
    forces: Float[Array, "nodes 3"],  # [eV/Å]
    graph: Graph,
) -> Float[Array, " graphs"]:  # [eV/Å]
    """The length of the largest force on an atom of each structure."""
    return _largest_norm(forces, graph)


def all_finite(forces: Float[Array, "nodes 3"], graph: Graph) -> Bool[Array, " graphs"]:
    """Whether all forces of a structure are finite; a sum over a batch would spread what is not."""
    bad = jnp.where(graph.node_mask, jnp.any(~jnp.isfinite(forces), axis=1), False)
    worst = jax.ops.segment_max(
        bad.astype(jnp.int32), graph.node_graph, graph.num_graphs, indices_are_sorted=True
    )
    return worst < 1


def _dot(
    a: Float[Array, "nodes 3"], b: Float[Array, "nodes 3"], graph: Graph
) -> Float[Array, " graphs"]:
    return sum_graphs(jnp.sum(a * b, axis=1), graph)


def _largest_norm(x: Float[Array, "nodes 3"], graph: Graph) -> Float[Array, " graphs"]:
    lengths = jnp.where(graph.node_mask, jnp.sqrt(jnp.sum(x**2, axis=1)), 0)
    largest = jax.ops.segment_max(
        lengths, graph.node_graph, graph.num_graphs, indices_are_sorted=True
    )
    return jnp.maximum(largest, 0)  # graphs without nodes


def _to_nodes(
    x: Float[Array, " graphs"] | Bool[Array, " graphs"], graph: Graph
) -> Float[Array, " nodes"] | Bool[Array, " nodes"]:
    return x[graph.node_graph]


def _pushed(
    history: Float[Array, "rows memory *rest"], newest: Float[Array, "rows *rest"]
) -> Float[Array, "rows memory *rest"]:
    return jnp.concatenate([history[:, 1:], newest[:, None]], axis=1)
