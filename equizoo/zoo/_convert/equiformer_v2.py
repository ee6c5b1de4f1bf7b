"""Step two of converting an EquiformerV2 checkpoint: a dump to our configuration and weights.

Reference: names and settings of fairchem 1.x and atomicarchitects/equiformer_v2.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ase.data
import numpy as np
from jaxtyping import Float

from equizoo.layers.sphere_grid import Grid
from equizoo.neighbors import NeighborLimit
from equizoo.zoo._base import Forces
from equizoo.zoo._convert import equiformer_v2_dump
from equizoo.zoo._convert.dump import Dump, read_folder
from equizoo.zoo.equiformer_v2 import EquiformerV2Config, Norm

NORMS = {"layer_norm_sh": Norm.SEPARATE, "rms_norm_sh": Norm.JOINT}
# Settings with one value that is covered, and what the original takes where they are not given.
FIXED = {
    "share_atom_edge_embedding": (False, False),
    "use_atom_edge_embedding": (True, True),
    "use_m_share_rad": (False, False),
    "distance_function": ("gaussian", "gaussian"),
    "use_s2_act_attn": (False, False),
    "use_attn_renorm": (True, True),
    "use_gate_act": (False, False),
    "use_grid_mlp": (True, False),
    "use_sep_s2_act": (True, True),
}
AVG_NUM_NODES, AVG_DEGREE = 77.81317, 23.395238876342773  # of OC20, unless given
TOLERANCE = 0.01  # [Å^2] of the original's graph construction
_LARGEST = 1e3  # [eV] of a reference energy; where a fit had no data it leaves up to 1e12


class Converted(NamedTuple):
    """The same model in our terms."""

    config: EquiformerV2Config
    arrays: dict[str, np.ndarray]  # by the names of our parameters
    reference_energies: dict[int, float]  # [eV] by atomic number
    source: Mapping[str, str]  # name and SHA-256 of the file


def read_dump(folder: str | Path) -> Dump:
    """The dump in a folder; ``ValueError`` where it is not one."""
    return read_folder(folder, equiformer_v2_dump)


def convert(dump: Dump, elements: Sequence[int] = ()) -> Converted:
    """The model of a dump; ``elements`` (atomic numbers) keeps these alone.

    Energies are ``std * network + mean``, and forces ``std_F * network``, as the checkpoint's
    normalisers say; linear references become reference energies. Raises ``ValueError`` for
    settings that are not covered, and arrays that are unknown.
    """
    model = dict(dump.settings["model"])
    _check_fixed(model, dump.where)
    rows = int(model.get("max_num_elements", 90))
    arrays = dict(dump.arrays)
    linear = arrays.pop("energy_lin_ref", None)
    normalizers = dump.settings.get("normalizers", {})
    references = {
        z: energy
        for z in range(1, min(rows, len(ase.data.chemical_symbols)))
        if abs(energy := _reference(z, linear, normalizers, dump.settings)) < _LARGEST
    }
    if unknown := sorted(set(elements) - set(references)):
        raise ValueError(
            f"{dump.where} has no elements {unknown}; it has {sorted(references)} (in a linear fit "
            "of reference energies, those that the data lacked have none that mean anything)."
        )
    numbers = [z for z in references if z in set(elements) or not elements]
    config = _config(model, normalizers, arrays, tuple(numbers))
    references = {z: references[z] for z in numbers}
    converted = {}
    for name, array in arrays.items():
        ours, change = rename(name, dump.where)
        array = np.asarray(array)
        if ours.rsplit(".", 1)[-1] in ("embedding", "senders", "receivers"):
            array = array[numbers]
        converted[ours] = change(array)
    return Converted(config, converted, references, dump.source)


def _config(
    model: Mapping[str, Any],
    normalizers: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    numbers: tuple[int, ...],
) -> EquiformerV2Config:
    (l_max,), (m_max,) = model.get("lmax_list", [6]), model.get("mmax_list", [2])
    energy = _energy_normalizer(normalizers)
    forces = normalizers.get("forces") or {"mean": 0.0, "std": 1.0}
    if forces["mean"] != 0:
        raise ValueError(f"Forces are normalised with mean {forces['mean']}, expected 0.")
    strict = bool(model.get("enforce_max_neighbors_strictly", True))
    return EquiformerV2Config(
        atomic_numbers=numbers,
        cutoff=float(model.get("max_radius", 5.0)),
        avg_num_neighbors=float(model.get("avg_degree") or AVG_DEGREE),
        channels=int(model.get("sphere_channels", 128)),
        hidden_channels=int(model.get("attn_hidden_channels", 128)),
        ffn_channels=int(model.get("ffn_hidden_channels", 512)),
        alpha_channels=int(model.get("attn_alpha_channels", 32)),
        value_channels=int(model.get("attn_value_channels", 16)),
        edge_channels=int(model.get("edge_channels", 128)),
        num_layers=int(model.get("num_layers", 12)),
        num_heads=int(model.get("num_heads", 8)),
        l_max=int(l_max),
        m_max=int(m_max),
        num_basis=_num_basis(arrays),
        grid_points=int(model["grid_resolution"]),
        grid=Grid.FEJER,
        norm=NORMS[model.get("norm_type", "rms_norm_sh")],
        forces=Forces.DIRECT if model.get("regress_forces", True) else Forces.GRADIENT,
        envelope_p=None,
        neighbor_limit=NeighborLimit(
            int(model.get("max_neighbors", 500)), None if strict else TOLERANCE
        ),
        alpha_dropout=float(model.get("alpha_drop", 0.1)),
        drop_path=float(model.get("drop_path_rate", 0.05)),
        avg_num_nodes=float(model.get("avg_num_nodes") or AVG_NUM_NODES),
        scale=float(energy["std"]),
        force_scale=float(forces["std"]),
        offset=float(energy["mean"]),
        zero_isolated=False,
    )


def _num_basis(arrays: Mapping[str, np.ndarray]) -> int:
    """600 in the original whatever its settings say; what the first radial network takes."""
    inputs = arrays["edge_degree_embedding.rad_func.net.0.weight"].shape[1]
    return inputs - 2 * arrays["edge_degree_embedding.source_embedding.weight"].shape[1]


def _reference(
    z: int,
    linear: Float[np.ndarray, " rows"] | None,
    normalizers: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> float:
    """Those in the weights are in units of the normaliser's ``std``, those beside them in eV."""
    by_element = settings.get("element_references")
    energy = 0.0
    if linear is not None:
        energy += _energy_normalizer(normalizers)["std"] * float(linear[z])
    if by_element is not None and z < len(by_element):
        energy += float(by_element[z])
    return energy


def _energy_normalizer(normalizers: Mapping[str, Any]) -> Mapping[str, float]:
    return normalizers.get("energy") or {"mean": 0.0, "std": 1.0}


def _check_fixed(model: Mapping[str, Any], where: str) -> None:
    problems = [
        f"{name} is {model.get(name, default)!r}, expected {covered!r}"
        for name, (covered, default) in FIXED.items()
        if model.get(name, default) != covered
    ]
    if (norm := model.get("norm_type", "rms_norm_sh")) not in NORMS:
        problems.append(f"norm_type is {norm!r}, expected one of {', '.join(NORMS)}")
    if model.get("grid_resolution") is None:
        problems.append("grid_resolution is not given, expected a number such as 18")
    if len(model.get("lmax_list", [6])) != 1 or len(model.get("mmax_list", [2])) != 1:
        problems.append("there are several resolutions, expected one l_max and one m_max")
    if problems:
        raise ValueError(f"{where} is an EquiformerV2 that is not covered: {'; '.join(problems)}.")


Change = Callable[[np.ndarray], np.ndarray]


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _transposed(array: np.ndarray) -> np.ndarray:
    """Ours are [..., in, out], theirs [..., out, in]."""
    return np.ascontiguousarray(np.swapaxes(array, -1, -2))


_RADIAL = r"(?:so2_conv_1\.)?rad_func\.net\."
# (end of a name, what it is here, what happens to the array); the first that fits is taken
_ENDS: tuple[tuple[str, str, Change], ...] = (
    (r"source_embedding\.weight", "weights.senders", _same),
    (r"target_embedding\.weight", "weights.receivers", _same),
    (rf"{_RADIAL}([036])\.weight", "weights.network.maps.{}.kernel", _transposed),
    (rf"{_RADIAL}([036])\.bias", "weights.network.maps.{}.bias", _same),
    (rf"{_RADIAL}([14])\.(weight|bias)", "weights.network.norms.{}.{}", _same),
    (r"so2_conv_([12])\.fc_m0\.weight", "conv_{}.axial.kernel", _transposed),
    (r"so2_conv_([12])\.fc_m0\.bias", "conv_{}.axial.bias", _same),
    (r"so2_conv_([12])\.so2_m_conv\.(\d+)\.fc\.weight", "conv_{}.planar.{}", _transposed),
    (r"alpha_norm\.(weight|bias)", "norm.{}", _same),
    (r"alpha_dot", "dot", _same),
    (r"proj\.weight", "linear.kernels", _transposed),
    (r"proj\.bias", "linear.bias", _same),
    (r"so3_linear_([12])\.weight", "linear_{}.kernels", _transposed),
    (r"so3_linear_([12])\.bias", "linear_{}.bias", _same),
    (r"scalar_mlp\.0\.weight", "scalars.kernel", _transposed),
    (r"scalar_mlp\.0\.bias", "scalars.bias", _same),
    (r"grid_mlp\.([024])\.weight", "pointwise.{}", _transposed),
    (r"norm_l0\.(weight|bias)", "scalars.{}", _same),
    (r"affine_weight", "weights", _same),
    (r"affine_bias", "bias", _same),
)  # fmt: skip
_BEGINNINGS = (
    (r"edge_degree_embedding", "edge_degree"),
    (r"blocks\.(\d+)\.(norm_[12])", "layers.{}.{}"),
    (r"blocks\.(\d+)\.ga", "layers.{}.attention"),
    (r"blocks\.(\d+)\.ffn", "layers.{}.ffn"),
    (r"norm", "norm"),
    (r"energy_block", "energy_head"),
    (r"force_block", "force_head"),
)


def rename(name: str, where: str) -> tuple[str, Change]:
    """Our name of a parameter, and how its array changes; ``ValueError`` for one unknown."""
    if name == "sphere_embedding.weight":
        return "embedding", _same
    for beginning, here in _BEGINNINGS:
        for end, there, change in _ENDS:
            if found := re.fullmatch(rf"(?:{beginning})\.(?:{end})", name):
                groups = found.groups()
                count = here.count("{}")
                first, second = groups[:count], list(groups[count:])
                for stride, part in ((3, ".net."), (2, ".grid_mlp.")):
                    if part in name:  # counted with the normalisations and SiLUs between
                        second[0] = str(int(second[0]) // stride)
                return f"{here.format(*first)}.{there.format(*second)}", change
    raise ValueError(
        f"{where}: {name!r} is not a parameter of the EquiformerV2 that is covered (energy and "
        "force heads, separable activations on a grid)."
    )
