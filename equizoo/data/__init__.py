"""Files and named data sets to structures with labels and reference energies.

The Grain pipeline is in :mod:`equizoo.data.pipeline`, which is not imported here.
"""

from equizoo.data.catalyst import open_catalyst
from equizoo.data.catalyst_frames import CatalystFrame, CatalystSource
from equizoo.data.catalyst_references import read_adsorption_references, read_linear_reference
from equizoo.data.datasets import DATASETS, DataSource, list_datasets, load_dataset
from equizoo.data.readers import (
    Dataset,
    LabelKeys,
    ReadReport,
    read_isolated_atoms,
    read_structures,
    write_structures,
)
from equizoo.data.reference_energies import (
    FromModel,
    Given,
    IsolatedAtoms,
    LeastSquares,
    LinearReference,
    ReferenceEnergies,
    RefitFromModel,
    fit_reference_energies,
    interaction_energy,
    refit,
    total_energy,
)

__all__ = [
    "DATASETS",
    "CatalystFrame",
    "CatalystSource",
    "DataSource",
    "Dataset",
    "FromModel",
    "Given",
    "IsolatedAtoms",
    "LabelKeys",
    "LeastSquares",
    "LinearReference",
    "ReadReport",
    "ReferenceEnergies",
    "RefitFromModel",
    "fit_reference_energies",
    "interaction_energy",
    "list_datasets",
    "load_dataset",
    "open_catalyst",
    "read_adsorption_references",
    "read_isolated_atoms",
    "read_linear_reference",
    "read_structures",
    "refit",
    "total_energy",
    "write_structures",
]
