"""Step two of converting a TDN checkpoint: a dump to our configuration and weights.

Reference: names and layout of divelab/AIRS, OpenMol/TDN.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from equizoo.tensor_products.cp_decomposed import CPDecomposed, Given, Normalization
from equizoo.tensor_products.shared_weights import SharedWeights
from equizoo.zoo._base import Forces
from equizoo.zoo._convert import tdn_dump
from equizoo.zoo._convert.dump import Dump, read_folder
from equizoo.zoo.tdn import Isolated, Output, TDNConfig

# [Hartree] of the atoms that PubChemQCR's energies are measured against, by atomic number
_ATOMS = {
    1: -0.5002727762, 4: -14.6684425428, 5: -24.6543539532, 6: -37.8462799513,
    7: -54.5844893657, 8: -75.0606214015, 9: -99.7155354215, 14: -289.3723539998,
    15: -341.2580898032, 16: -398.1049925382, 17: -460.1362417086, 21: -760.5813501324,
    22: -849.3013849537, 23: -943.8255794204, 24: -1044.2810289455, 25: -1150.8680174849,
    26: -1263.5207828239, 27: -1382.5485719268, 28: -1508.0542451335, 29: -1640.1731641565,
    31: -1924.5926070018, 32: -2076.6914561594, 33: -2235.5683127287, 34: -2401.2347730327,
    35: -2573.8397377628,
}  # fmt: skip
_HARTREE = 27.2114  # [eV] as the original rounds it
_REFERENCES = {z: _HARTREE * energy for z, energy in _ATOMS.items()}  # [eV]


class Run(NamedTuple):
    """What a checkpoint does not say of the run that it is of; defaults are those of PubChemQCR-S.

    ``forces`` are those that were trained. ``reference_energies`` [eV], by atomic number, are what
    its energies are measured against; the model is for these elements.
    """

    cutoff: float = 4.5  # [Å]
    avg_num_nodes: float = 36.6
    avg_num_neighbors: float = 18.6
    output: Output = Output.PER_ATOM
    forces: Forces = Forces.DIRECT
    reference_energies: Mapping[int, float] = _REFERENCES


class Converted(NamedTuple):
    """The same model in our terms."""

    config: TDNConfig
    arrays: dict[str, np.ndarray]  # by the names of our parameters
    reference_energies: dict[int, float]  # [eV] by atomic number
    source: Mapping[str, str]


def read_dump(folder: str | Path) -> Dump:
    """The dump in a folder; ``ValueError`` where it is not one."""
    return read_folder(folder, tdn_dump)


def convert(dump: Dump, run: Run | None = None) -> Converted:
    """The model of a dump.

    Its product is the tensor that the factors stand for, evaluated as a matrix for each edge: equal
    to rounding, with the defect that the factors have. Raises ``ValueError`` for arrays that are
    unknown or missing, and elements that the checkpoint has no row for.
    """
    run = Run() if run is None else run
    arrays = dict(dump.arrays)
    if missing := [name for name in (*tdn_dump.FACTORS, *_SHAPES) if name not in arrays]:
        raise ValueError(f"{dump.where} lacks {', '.join(missing)}.")
    factors = [arrays.pop(name) for name in tdn_dump.FACTORS]
    rows = arrays["atom_embed.atom_type_lin.weight"].shape[1]
    numbers = sorted(run.reference_energies)
    if beyond := [z for z in numbers if z >= rows]:
        raise ValueError(f"{dump.where} has rows for elements below {rows}, none for {beyond}.")
    config = _config(arrays, factors, numbers, run)
    converted: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if config.conservative and name.startswith("force_"):
            continue
        if name == "atom_embed.atom_type_lin.weight":
            array = array[:, numbers]
        for ours, change in rename(name, dump.where):
            converted[ours] = np.ascontiguousarray(change(np.asarray(array)))
    energies = {z: run.reference_energies[z] for z in numbers}
    return Converted(config, converted, energies, dump.source)


_SHAPES = ("norm.affine_weight", "edge_embed.rad.net.0.weight", "atom_embed.atom_type_lin.weight")


def _config(
    arrays: Mapping[str, np.ndarray], factors: list[np.ndarray], numbers: list[int], run: Run
) -> TDNConfig:
    degrees, _, channels = arrays["norm.affine_weight"].shape
    blocks = {name.split(".")[1] for name in arrays if name.startswith("blocks.")}
    (heads,) = {array.shape[0] for name, array in arrays.items() if name.endswith("alpha_dot")}
    widths = [arrays[f"edge_embed.rad.net.{k}.weight"].shape for k in (0, 3)]
    first, second, result = (tuple(map(tuple, part.T.tolist())) for part in factors)
    return TDNConfig(
        atomic_numbers=tuple(numbers),
        cutoff=run.cutoff,
        avg_num_neighbors=run.avg_num_neighbors,
        channels=channels,
        l_max=degrees - 1,
        num_layers=len(blocks),
        num_heads=heads,
        num_basis=widths[0][1],
        radial_widths=tuple(out for out, _ in widths),
        forces=run.forces,
        envelope_p=None,
        isolated=Isolated.DELETED,
        avg_num_nodes=run.avg_num_nodes,
        output=run.output,
        tensor_product=SharedWeights(
            CPDecomposed(Given(first, second, result), Normalization.WIGNER)
        ),
    )


Change = Callable[[np.ndarray], np.ndarray]


def _flat(array: np.ndarray) -> np.ndarray:
    return array.ravel()


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _transposed(array: np.ndarray) -> np.ndarray:
    """Ours are [in, out], theirs [out, in]."""
    return array.T


def _kernel(array: np.ndarray) -> np.ndarray:
    """Of a linear map that degrees share."""
    return array.T[None]


def _half(which: int, change: Change) -> Change:
    """Values first, then gates."""
    return lambda array: change(np.split(array, 2, axis=1 if len(array) == 1 else 0)[which])


def _linear(theirs: str, ours: str) -> list[tuple[str, str, Change]]:
    return [
        (rf"{theirs}\.linear\.weight", f"{ours}.kernels", _kernel),
        (rf"{theirs}\.bias", f"{ours}.bias", _flat),
    ]


def _of_scalars(theirs: str, ours: str) -> list[tuple[str, str, Change]]:
    return [
        (rf"{theirs}\.linear\.weight", f"{ours}.kernel", _transposed),
        (rf"{theirs}\.bias", f"{ours}.bias", _flat),
    ]


def _gate(theirs: str, ours: str) -> list[tuple[str, str, Change]]:
    return [
        (rf"{theirs}\.linear\.weight", f"{ours}.values.kernels", _half(0, _kernel)),
        (rf"{theirs}\.bias", f"{ours}.values.bias", _half(0, _flat)),
        (rf"{theirs}\.linear\.weight", f"{ours}.gates.kernel", _half(1, _transposed)),
        (rf"{theirs}\.bias", f"{ours}.gates.bias", _half(1, _flat)),
    ]


_RADIAL: list[tuple[str, str, Change]] = [
    (r"rad\.net\.([036])\.weight", "radial.network.maps.{}.kernel", _transposed),
    (r"rad\.net\.([036])\.bias", "radial.network.maps.{}.bias", _same),
    (r"rad\.net\.([14])\.(weight|bias)", "radial.network.norms.{}.{}", _same),
    (r"rad\.offset", "radial.network.maps.2.bias", _same),
]
_ATTENTION = [
    *_linear("merge_src", "from_sender"), *_linear("merge_dst", "from_receiver"), *_RADIAL,
    *_of_scalars("lin_alpha", "to_alpha"), (r"alpha_dot", "dot", _same),
    *_gate("lin_value", "gate"), *_linear("proj", "linear"),
]  # fmt: skip
_NORM: list[tuple[str, str, Change]] = [
    (r"affine_weight", "weights", lambda array: array[:, 0]),
    (r"affine_bias", "bias", _flat),
]
# (beginning of a name, what it is here, what can follow)
_PARTS: tuple[tuple[str, str, list[tuple[str, str, Change]]], ...] = (
    (r"rbf\.", "basis.", [("mean", "means", _flat), ("std", "widths", _flat),
                          ("weight", "weight", _flat), ("bias", "bias", _flat)]),
    (r"atom_embed\.atom_type_lin\.", "", [("weight", "embedding", _transposed),
                                          ("bias", "embedding_bias", _same)]),
    (r"edge_embed\.", "edge_degree.", [*_of_scalars("exp", "constants"), *_RADIAL,
                                       *_linear("proj", "linear")]),
    (r"blocks\.(\d+)\.norm([12])\.", "layers.{}.norm_{}.", _NORM),
    (r"blocks\.(\d+)\.attn\.", "layers.{}.attention.", _ATTENTION),
    (r"blocks\.(\d+)\.ffn\.", "layers.{}.", [*_gate("0", "ffn_1"), *_linear("2", "ffn_2")]),
    (r"norm\.", "norm.", _NORM),
    (r"head\.", "", [*_of_scalars("0", "head_1"), *_of_scalars("2", "head_2")]),
    (r"force_head\.", "force_head.attention.", _ATTENTION),
    (r"force_proj", "force_head", _linear("", "linear")),
)  # fmt: skip


def rename(name: str, where: str) -> list[tuple[str, Change]]:
    """Our names of a parameter, and how its array changes; ``ValueError`` for one unknown."""
    found = []
    for beginning, here, ends in _PARTS:
        for end, there, change in ends:
            if match := re.fullmatch(beginning + end, name):
                groups = list(match.groups())
                count = here.count("{}")
                if ".net." in name:  # counted with the normalisations and SiLUs between
                    groups[count] = str(int(groups[count]) // 3)
                joint = "." if here and not here.endswith(".") else ""
                ours = here.format(*groups[:count]) + joint + there.format(*groups[count:])
                found.append((ours, change))
    if not found:
        raise ValueError(f"{where}: {name!r} is not a parameter of the TDN that is covered.")
    return found
