"""Linear maps of equivariant features, with and without weights per species."""

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from equizoo.graph import Graph, from_species_blocks, to_species_blocks


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float = 1.0) -> nnx.Param:
    """A parameter drawn from a normal distribution, in float32."""
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32))


class EquivariantLinear(nnx.Module):
    r"""``y_{l m d} = \sum_{p c} W^l_{p c d} x^{(p)}_{l m c} / sqrt(F)``, commuting with O(3).

    Blocks ``p`` of one irrep in the input (the paths of a product) are mixed together; ``F`` is
    their number times the channels, so unit variance is kept.
    """

    def __init__(
        self,
        irreps_in: e3nn.Irreps,
        irreps_out: e3nn.Irreps,
        channels_in: int,
        channels_out: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.irreps_in, self.irreps_out = str(irreps_in), str(irreps_out)
        self.channels_in, self.channels_out = channels_in, channels_out
        kernels = {}
        for _, ir in irreps_out:
            blocks = sum(1 for _, ir_in in irreps_in if ir_in == ir)
            if not blocks:
                raise ValueError(f"Irrep {ir} of '{irreps_out}' is not among '{irreps_in}'.")
            kernels[str(ir)] = normal_param(rngs, (blocks * channels_in, channels_out))
        self.kernels = nnx.Dict(kernels)

    def __call__(self, x: Float[Array, "n dim_in c"]) -> Float[Array, "n dim_out d"]:
        irreps_in, irreps_out = e3nn.Irreps(self.irreps_in), e3nn.Irreps(self.irreps_out)
        results = []
        for _, ir in irreps_out:
            blocks = [
                x[:, place]
                for (_, ir_in), place in zip(irreps_in, irreps_in.slices(), strict=True)
                if ir_in == ir
            ]
            stacked = jnp.concatenate(blocks, axis=2)
            kernel = self.kernels[str(ir)][...].astype(x.dtype)
            results.append(stacked @ (kernel / float(np.sqrt(kernel.shape[0]))))
        return jnp.concatenate(results, axis=1)


class SpeciesLinear(nnx.Module):
    r"""``y_{l m d} = \sum_c W^l_{z c d} x_{l m c} / sqrt(C n_z)``: a linear map per species ``z``.

    ``n_z`` (the number of species) is in the normalisation as if species were a one-hot factor.
    Irreps of the input that are not in the output are left out, and the reverse gives zero.

    Reference: the self-connection of MACE, https://arxiv.org/abs/2206.07697, eq. 11.
    """

    def __init__(
        self,
        irreps_in: e3nn.Irreps,
        irreps_out: e3nn.Irreps,
        channels: int,
        num_species: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.irreps_in, self.irreps_out = str(irreps_in), str(irreps_out)
        self.num_species = num_species
        shared = [ir for _, ir in irreps_out if any(ir == other for _, other in irreps_in)]
        self.kernels = nnx.Dict(
            {str(ir): normal_param(rngs, (num_species, channels, channels)) for ir in shared}
        )

    def __call__(
        self, x: Float[Array, "nodes dim_in c"], graph: Graph
    ) -> Float[Array, "nodes dim_out c"]:
        irreps_in, irreps_out = e3nn.Irreps(self.irreps_in), e3nn.Irreps(self.irreps_out)
        blocks = to_species_blocks(x, graph)
        norm = float(np.sqrt(x.shape[2] * self.num_species))
        results = []
        for _, ir in irreps_out:
            if str(ir) not in self.kernels:
                results.append(jnp.zeros((*blocks.shape[:2], ir.dim, x.shape[2]), x.dtype))
                continue
            place = irreps_in.slices()[[i for _, i in irreps_in].index(ir)]
            kernel = self.kernels[str(ir)][...].astype(x.dtype)[graph.block_species] / norm
            results.append(jnp.einsum("bnmc,bcd->bnmd", blocks[:, :, place], kernel))
        return from_species_blocks(jnp.concatenate(results, axis=2), graph)


def shared_irreps(irreps_in: e3nn.Irreps, irreps_out: e3nn.Irreps) -> e3nn.Irreps:
    """Those entries of ``irreps_out`` that ``irreps_in`` has too."""
    known = {ir for _, ir in irreps_in}
    return e3nn.Irreps([(1, ir) for _, ir in irreps_out if ir in known])


def into_irreps(
    x: Float[Array, "n dim_in c"], irreps_in: e3nn.Irreps, irreps_out: e3nn.Irreps
) -> Float[Array, "n dim_out c"]:
    """The blocks of ``x`` in the order of ``irreps_out``, zeros where it has none; others go."""
    places = {ir: place for (_, ir), place in zip(irreps_in, irreps_in.slices(), strict=True)}
    blocks = [
        x[:, places[ir]] if ir in places else jnp.zeros((x.shape[0], ir.dim, x.shape[2]), x.dtype)
        for _, ir in irreps_out
    ]
    return jnp.concatenate(blocks, axis=1)
