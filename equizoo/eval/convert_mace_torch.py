"""Checkpoints of mace-torch to potentials, on the user's machine and with the user's consent."""

from collections.abc import Iterable
from pathlib import Path

from equizoo.config import from_dict
from equizoo.eval._step_one import CheckpointKind, read_or_dump, run_step_one
from equizoo.eval.potential import Potential, _rebuild
from equizoo.structure import EnergyReference
from equizoo.zoo._base import ArchitectureConfig
from equizoo.zoo._convert import mace_torch_dump
from equizoo.zoo._convert.mace_torch import convert, read_dump

KIND = CheckpointKind(
    program=Path(mace_torch_dump.__file__),
    expected="a model of mace-torch (.model)",
    needs="mace-torch",
    install="pip install mace-torch safetensors",
)
WHY_CONSENT = (
    "it is a pickled Python object, and opening it runs whatever code its author put in. Only if "
    "you trust where it comes from: trust=True"
)


def dump_mace_torch(
    file: str | Path, folder: str | Path, *, trust: bool = False, python: str | Path | None = None
) -> None:
    """Writes a mace-torch model as plain arrays and JSON to a new ``folder``.

    Runs in a process of ``python``: an interpreter that has mace-torch, by default the one named
    in ``EQUIZOO_TORCH_PYTHON``, else this one. Raises ``ValueError`` without ``trust``, for a file
    that holds no such model, and where mace-torch is missing.
    """

    def consent() -> None:
        if not trust:
            raise ValueError(f"{file}: {WHY_CONSENT} (on the command line --trust).")

    run_step_one(KIND, file, folder, python=python, before=consent)


def convert_mace_torch(
    source: str | Path,
    *,
    trust: bool = False,
    python: str | Path | None = None,
    level_of_theory: str = "as in the checkpoint",
    energy_reference: EnergyReference = EnergyReference.TOTAL,
    elements: Iterable[str] = (),
    name: str = "",
) -> Potential:
    """The potential in a ``.model`` file of mace-torch, or in a dump of one; equal to rounding.

    ``elements`` cuts it down to those. Raises ``ValueError`` as :func:`dump_mace_torch` does, and
    for models that have no counterpart here.
    """
    source = Path(source).expanduser()
    dump = read_or_dump(
        source,
        read_dump,
        lambda folder: dump_mace_torch(source, folder, trust=trust, python=python),
    )
    converted = convert(dump)
    config = from_dict(ArchitectureConfig, converted.config, str(source))
    potential = Potential(
        _rebuild(config, converted.arrays, str(source)),
        reference_energies=converted.reference_energies,
        energy_reference=energy_reference,
        level_of_theory=dict.fromkeys(config.heads, level_of_theory),
        name=name or source.stem,
        source=converted.source,
    )
    return potential.with_elements(elements) if (elements := list(elements)) else potential
