"""Checkpoints of EquiformerV2 to potentials."""

from collections.abc import Iterable
from pathlib import Path

from ase.data import atomic_numbers as number_of

from equizoo.eval._step_one import CheckpointKind, read_or_dump, run_step_one
from equizoo.eval.potential import Potential, _rebuild
from equizoo.structure import EnergyReference
from equizoo.zoo._convert import equiformer_v2_dump
from equizoo.zoo._convert.equiformer_v2 import convert, read_dump

KIND = CheckpointKind(
    program=Path(equiformer_v2_dump.__file__),
    expected="a checkpoint of fairchem 1.x (.pt)",
    needs="torch",
    install="pip install torch numpy safetensors",
)


def dump_equiformer_v2(
    file: str | Path, folder: str | Path, *, raw: bool = False, python: str | Path | None = None
) -> None:
    """Writes a checkpoint of fairchem 1.x as plain arrays and JSON to a new ``folder``.

    Runs in a process of ``python``: an interpreter that has torch, by default the one named in
    ``EQUIZOO_TORCH_PYTHON``, else this one. No code in the checkpoint is run. ``raw`` takes the
    weights of the last step instead of their moving average. Raises ``ValueError`` for a file that
    holds no such checkpoint, and where torch is missing.
    """
    run_step_one(KIND, file, folder, options=["--raw"] if raw else [], python=python)


def convert_equiformer_v2(
    source: str | Path,
    *,
    energy_reference: EnergyReference,
    raw: bool = False,
    python: str | Path | None = None,
    level_of_theory: str = "as in the checkpoint",
    elements: Iterable[str] = (),
    name: str = "",
) -> Potential:
    """The potential in a checkpoint of fairchem 1.x, or in a dump of one; equal to rounding but for
    the frames of edges, whose angle the original draws at random.

    ``energy_reference`` is that of the energies it was trained on, ``adsorption`` for OC20,
    ``total`` for OC22. ``elements`` cuts it down to those. Raises ``ValueError`` as
    :func:`dump_equiformer_v2` does, and for models that have no counterpart here.
    """
    source = Path(source).expanduser()
    dump = read_or_dump(
        source, read_dump, lambda folder: dump_equiformer_v2(source, folder, raw=raw, python=python)
    )
    symbols = list(elements)
    if unknown := [symbol for symbol in symbols if symbol not in number_of]:
        raise ValueError(f"elements has {', '.join(unknown)}, expected chemical symbols.")
    converted = convert(dump, [number_of[symbol] for symbol in symbols])
    return Potential(
        _rebuild(converted.config, converted.arrays, str(source)),
        reference_energies=converted.reference_energies,
        energy_reference=energy_reference,
        level_of_theory=level_of_theory,
        name=name or source.stem,
        source=converted.source,
    )
