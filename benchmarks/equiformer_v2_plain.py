"""EquiformerV2 in the plain formulation, on the weights of a model of ours: a baseline of speed.

Wigner matrices of all components, block-diagonal in one square and made anew for each block;
changes between the order by degree and the order by m as products with permutation matrices;
features of both ends copied to edges and turned there; activations on a grid of 18 x 18 points,
the network of a feed-forward block at each of them; sums over neighbours by scattering.
"""

import jax
import jax.numpy as jnp
import numpy as np

from equizoo.graph import edge_vectors
from equizoo.layers.distance_basis import gaussian_smearing
from equizoo.layers.gating import smooth_leaky_relu
from equizoo.layers.harmonics import safe_norm
from equizoo.layers.so2 import frame_order
from equizoo.layers.sphere_grid import Grid, degrees_of, grid_matrices
from equizoo.tensor_products._so3 import rotations_to_pole, unit_vectors, wigner_matrices


class Plain:
    """``(vectors, graph) -> (node energies, forces)`` of a model with direct forces."""

    def __init__(self, model):
        self.model, config = model, model.config
        if config.envelope_p is not None or config.grid != Grid.FEJER or config.zero_isolated:
            raise ValueError("The plain formulation is that of a model as published.")
        self.config, l_max, m_max = config, config.l_max, config.m_max
        signed = np.concatenate([np.arange(-d, d + 1) for d in range(l_max + 1)])
        self.kept = np.flatnonzero(np.abs(signed) <= m_max)
        by_m = frame_order(l_max, m_max)
        self.to_m = np.float32(by_m[:, None] == self.kept[None])
        degree = degrees_of(l_max)[self.kept]
        self.scales = np.float32(np.sqrt(np.maximum((2 * degree + 1) / (2 * m_max + 1), 1)))
        points = config.grid_points
        self.to, self.back = (
            np.float32(matrix).reshape(points, points, -1)
            for matrix in grid_matrices(l_max, points)
        )

    def __call__(self, graph):
        model, config = self.model, self.config
        vectors = edge_vectors(graph, config.cutoff)
        basis = gaussian_smearing(safe_norm(vectors), config.cutoff, config.num_basis)
        x = self.edge_degree(model.edge_degree, vectors, basis, graph)
        x = x.at[:, 0].add(model.embedding[...][graph.species])
        for layer in model.layers:
            x = x + self.attention(layer.attention, layer.norm_1(x), vectors, basis, graph)
            x = x + self.feed_forward(layer.ffn, layer.norm_2(x))
        x = model.norm(x)
        energies = self.feed_forward(model.energy_head, x)[:, 0, 0]
        forces = self.attention(model.force_head, x, vectors, basis, graph)[:, 1:4, 0]
        return config.scale / config.avg_num_nodes * energies, config.force_scale * forces

    def wigner(self, vectors):
        """For each block by itself: without the barrier a compiler would make one of all."""
        rotations = rotations_to_pole(unit_vectors(-jax.lax.optimization_barrier(vectors)))
        l_max = self.config.l_max
        whole = jnp.zeros((len(vectors), (l_max + 1) ** 2, (l_max + 1) ** 2), vectors.dtype)
        for degree, matrix in enumerate(wigner_matrices(rotations, l_max)):
            place = slice(degree**2, (degree + 1) ** 2)
            whole = whole.at[:, place, place].set(matrix)
        return whole

    def sum_back(self, x, wigner, graph):
        inverse = jnp.swapaxes(wigner, 1, 2)[:, :, self.kept] * self.scales
        turned = jnp.einsum("eik,ekc->eic", inverse, x)
        return jax.ops.segment_sum(turned, graph.receivers, graph.num_nodes)

    def edge_degree(self, module, vectors, basis, graph):
        config = self.config
        axial = module.weights(basis, graph)
        axial = axial.reshape(graph.num_edges, config.l_max + 1, config.channels)
        rest = len(self.kept) - config.l_max - 1
        whole = jnp.pad(axial, ((0, 0), (0, rest), (0, 0)))
        by_degree = jnp.einsum("mk,emc->ekc", self.to_m, whole)
        summed = self.sum_back(by_degree, self.wigner(vectors), graph)
        return summed / config.avg_num_neighbors

    def convolution(self, module, x, weights=None):
        """Of components by degree, to such; the scalars apart."""
        edges, l_max = len(x), self.config.l_max
        x = jnp.einsum("mk,ekc->emc", self.to_m, x)
        axial, first = x[:, : l_max + 1].reshape(edges, -1), module.widths[0]
        axial = module.axial(axial if weights is None else axial * weights[:, :first])
        results = [axial[:, module.scalars :].reshape(edges, -1, module.channels_out)]
        start = l_max + 1
        for m, (width, kernel) in enumerate(zip(module.widths[1:], module.planar, strict=True), 1):
            count = l_max - m + 1
            plane = x[:, start : start + 2 * count].reshape(edges, 2, width)
            if weights is not None:
                plane = plane * weights[:, None, first : first + width]
            start, first = start + 2 * count, first + width
            u, v = jnp.split(plane @ kernel[...], 2, axis=2)
            plane = jnp.stack([u[:, 0] - v[:, 1], u[:, 1] + v[:, 0]], axis=1)
            results.append(plane.reshape(edges, 2 * count, module.channels_out))
        by_m = jnp.concatenate(results, axis=1)
        return axial[:, : module.scalars], jnp.einsum("mk,emc->ekc", self.to_m, by_m)

    def attention(self, module, x, vectors, basis, graph):
        config, wigner = self.config, self.wigner(vectors)
        ends = jnp.concatenate([x[graph.senders], x[graph.receivers]], axis=2)
        turned = jnp.einsum("eki,eic->ekc", wigner[:, self.kept], ends)
        scalars, hidden = self.convolution(module.conv_1, turned, module.weights(basis, graph))
        alphas, gates = jnp.split(scalars, [config.num_heads * config.alpha_channels], axis=1)
        to, back = (matrix[:, :, self.kept] * self.scales for matrix in (self.to, self.back))
        values = jax.nn.silu(jnp.einsum("bai,eic->ebac", to, hidden))
        hidden = jnp.einsum("bai,ebac->eic", back, values)
        hidden = hidden.at[:, 0].set(jax.nn.silu(gates))
        _, values = self.convolution(module.conv_2, hidden)
        by_head = alphas.reshape(graph.num_edges, -1, config.alpha_channels)
        alphas = smooth_leaky_relu(module.norm(by_head))
        logits = jnp.einsum("ehk,hk->eh", alphas, module.dot[...])
        top = jax.ops.segment_max(logits, graph.receivers, graph.num_nodes)
        powers = jnp.exp(logits - jax.lax.stop_gradient(top)[graph.receivers])
        total = jax.ops.segment_sum(powers, graph.receivers, graph.num_nodes)
        share = jnp.repeat(powers / total[graph.receivers], config.value_channels, axis=1)
        return module.linear(self.sum_back(values * share[:, None], wigner, graph))

    def feed_forward(self, module, x):
        scalars = jax.nn.silu(module.scalars(x[:, 0]))
        values = jnp.einsum("bai,nic->nbac", self.to, module.linear_1(x))
        for kernel in module.pointwise[:2]:
            values = jax.nn.silu(values @ kernel[...])
        values = values @ module.pointwise[2][...]
        x = jnp.einsum("bai,nbac->nic", self.back, values).at[:, 0].set(scalars)
        return module.linear_2(x)
