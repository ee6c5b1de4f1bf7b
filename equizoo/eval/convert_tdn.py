"""Checkpoints of TDN to potentials."""

from pathlib import Path

from ase.data import atomic_numbers as number_of

from equizoo.config import parse_json
from equizoo.eval._step_one import CheckpointKind, read_or_dump, run_step_one
from equizoo.eval.potential import Potential, _rebuild
from equizoo.structure import EnergyReference
from equizoo.zoo._base import Forces
from equizoo.zoo._convert import tdn_dump
from equizoo.zoo._convert.tdn import Run, convert, read_dump
from equizoo.zoo.tdn import Output

KIND = CheckpointKind(
    program=Path(tdn_dump.__file__),
    expected="a checkpoint of TDN (.pth)",
    needs="torch",
    install="pip install torch numpy safetensors",
)


def dump_tdn(
    file: str | Path,
    folder: str | Path,
    *,
    factors: str | Path | None = None,
    raw: bool = False,
    python: str | Path | None = None,
) -> None:
    """Writes a checkpoint of TDN's training as plain arrays and JSON to a new ``folder``.

    Runs in a process of ``python``: an interpreter that has torch, by default the one named in
    ``EQUIZOO_TORCH_PYTHON``, else this one. No code in the checkpoint is run. ``factors`` is the
    file of the run's cache with the decomposition, for checkpoints without it. ``raw`` takes the
    weights of the last step instead of their moving average. Raises ``ValueError`` for a file that
    holds no such checkpoint, and where torch is missing.
    """
    options = ["--raw"] if raw else []
    if factors is not None:
        options += ["--factors", str(Path(factors).expanduser().resolve())]
    run_step_one(KIND, file, folder, options=options, python=python)


def run_of(
    *,
    cutoff: float,  # [Å]
    avg_num_nodes: float,
    avg_num_neighbors: float,
    energies: str,
    forces: str,
    references: str | Path | None,
) -> Run:
    """A :class:`Run` from words and a JSON file of reference energies [eV] by chemical symbol.

    Raises ``ValueError`` for symbols that are none and values that are no numbers.
    """
    run = Run(cutoff, avg_num_nodes, avg_num_neighbors, Output(energies), Forces(forces))
    if references is None:
        return run
    path = Path(references).expanduser()
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected JSON such as {{'H': -13.6}}.")
    found = parse_json(path.read_text("utf-8"), str(path))
    if wrong := [s for s, e in found.items() if s not in number_of or not _is_number(e)]:
        raise ValueError(
            f"{path} has {', '.join(wrong)}; expected chemical symbols, each with an energy [eV]."
        )
    return run._replace(reference_energies={number_of[s]: float(e) for s, e in found.items()})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def convert_tdn(
    source: str | Path,
    run: Run | None = None,
    *,
    factors: str | Path | None = None,
    raw: bool = False,
    python: str | Path | None = None,
    energy_reference: EnergyReference = EnergyReference.TOTAL,
    level_of_theory: str = "as in the checkpoint",
    name: str = "",
) -> Potential:
    """The potential in a checkpoint of TDN, or in a dump of one, equal to rounding.

    ``run`` has what the checkpoint does not say, PubChemQCR-S by default. Raises ``ValueError`` as
    :func:`dump_tdn` does, and for models that have no counterpart here.
    """
    source = Path(source).expanduser()
    dump = read_or_dump(
        source,
        read_dump,
        lambda folder: dump_tdn(source, folder, factors=factors, raw=raw, python=python),
    )
    converted = convert(dump, run)
    return Potential(
        _rebuild(converted.config, converted.arrays, str(source)),
        reference_energies=converted.reference_energies,
        energy_reference=energy_reference,
        level_of_theory=level_of_theory,
        name=name or source.stem,
    )
