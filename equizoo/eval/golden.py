"""Small generated structures stored with a model, and the outputs that loading must reproduce."""

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np
from ase.data import covalent_radii
from jaxtyping import Shaped

from equizoo.structure import Structure
from equizoo.zoo._base import ArchitectureConfig

RTOL = 1e-4  # of the largest value of its kind: backends round float32 sums in their own order
ATOL = 1e-5  # [eV, eV/Å, eV/Å^3] per value
_ROUNDING = 10.0  # times what float32 loses against float64 in the stored outputs
_OUTPUTS = ("node_energies", "forces", "stress")


def golden_structures(config: ArchitectureConfig) -> dict[str, Structure]:
    """A cluster and a sheared crystal that together hold every element of the model.

    Atoms sit on displaced sites of a grid whose spacing follows the covalent radii, closer than
    half the cutoff. Drawn from a fixed seed, not from any data set.
    """
    rng = np.random.default_rng(20)
    numbers = np.array(config.atomic_numbers)
    spacing = min(2.2 * float(covalent_radii[numbers].mean()), config.cutoff / 2)
    shear = np.array([[1.0, 0.0, 0.0], [0.15, 1.0, 0.0], [-0.1, 0.2, 1.1]])

    def sites(per_axis: int, count: int):
        grid = np.array(list(itertools.product(range(per_axis), repeat=3))[:count], np.float64)
        return spacing * (grid + rng.uniform(-0.12, 0.12, grid.shape))

    num_cluster = max(7, len(numbers))
    return {
        "cluster": Structure(
            atomic_numbers=np.resize(numbers, num_cluster),
            positions=sites(math.ceil(num_cluster ** (1 / 3)), num_cluster),
            cell=np.zeros((3, 3)),
            name="golden cluster",
        ),
        "crystal": Structure(
            atomic_numbers=np.resize(numbers[::-1], 8),
            positions=sites(2, 8) @ shear,
            cell=2 * spacing * shear,
            pbc=(True, True, True),
            name="golden crystal",
        ),
    }


def golden_outputs(
    predict: Callable, config: ArchitectureConfig
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The structures and what ``predict`` gives for them in float64 and float32, as flat arrays."""
    structures = golden_structures(config)
    arrays = {}
    for name, structure in structures.items():
        for field in ("atomic_numbers", "positions", "cell"):
            arrays[f"{name}.{field}"] = getattr(structure, field)
        arrays[f"{name}.pbc"] = np.array(structure.pbc)
    for dtype in ("float64", "float32"):
        results = predict(list(structures.values()), dtype=dtype)
        for name, result in zip(structures, results, strict=True):
            arrays[f"{name}.{dtype}.energy"] = np.array(result.energy)
            for output in _OUTPUTS:
                if (value := getattr(result, output)) is not None:
                    arrays[f"{name}.{dtype}.{output}"] = value
    return arrays


def check_golden_outputs(
    predict: Callable,
    golden: Mapping[str, Shaped[np.ndarray, "..."]],
    where: str,
    dtype: str = "float32",
) -> None:
    """Raises ``ValueError`` unless ``predict`` reproduces the stored outputs in ``dtype``.

    Allowed are ``RTOL`` of the largest value of its kind (for energies the largest force times
    1 Å) plus ``ATOL``, in float32 also ten times
    the rounding error of the stored outputs; float64 is held to a hundred-thousandth of it.
    """
    structures = _stored_structures(golden, where)
    results = predict(list(structures.values()), dtype=dtype)
    problems = []
    for name, result in zip(structures, results, strict=True):
        for output in _OUTPUTS:
            found, key = getattr(result, output), f"{name}.{dtype}.{output}"
            if (found is None) != (key not in golden):
                problems.append(f"{key} is {'missing' if found is not None else 'unexpected'}")
            if found is None or key not in golden:
                continue
            expected = golden[key]
            if expected.shape != found.shape:
                problems.append(f"{key} has shape {expected.shape}, expected {found.shape}")
                continue
            allowed = _allowed(golden, name, output, dtype)
            error = np.abs(found - expected).max()
            if not error <= allowed:  # NaN included
                problems.append(f"{key} differs by {error:.2e}, allowed {allowed:.2e}")
    if problems:
        raise ValueError(
            f"{where}: this model does not give the outputs stored with it: {'; '.join(problems)}. "
            "Weights or configuration were altered, or another convention is at work; fetch the "
            "model again. check_golden=False loads it all the same."
        )


def _allowed(golden: Mapping[str, np.ndarray], name: str, output: str, dtype: str) -> float:
    exact, rounded = (golden[f"{name}.{d}.{output}"] for d in ("float64", "float32"))
    # Energies are held to the forces times 1 Å: their own size is that of reference energies.
    scale = golden[f"{name}.float64.{'stress' if output == 'stress' else 'forces'}"]
    rounding = _ROUNDING * np.abs(exact - rounded).max()
    tolerance = RTOL * np.abs(scale).max() + ATOL
    return float(max(tolerance, rounding) if dtype == "float32" else 1e-5 * tolerance)


def _stored_structures(golden: Mapping[str, np.ndarray], where: str) -> dict[str, Structure]:
    names = [key.removesuffix(".positions") for key in golden if key.endswith(".positions")]
    if not names:
        raise ValueError(
            f"{where} holds no structures to check the model with. Save it with golden=True, or "
            "load it with check_golden=False."
        )
    try:
        return {
            name: Structure(
                atomic_numbers=golden[f"{name}.atomic_numbers"],
                positions=golden[f"{name}.positions"],
                cell=golden[f"{name}.cell"],
                pbc=_three_flags(golden[f"{name}.pbc"]),
                name=f"golden {name}",
            )
            for name in sorted(names)
        }
    except KeyError as error:
        raise ValueError(f"{where} lacks {error}; fetch the model again.") from error


def _three_flags(pbc: Shaped[np.ndarray, "3"]) -> tuple[bool, bool, bool]:
    a, b, c = pbc.tolist()
    return a, b, c
