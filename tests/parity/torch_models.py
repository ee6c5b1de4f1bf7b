"""Small models made by mace-torch itself, and their energies, forces and stresses."""

import numpy as np
import torch
from ase import Atoms
from e3nn import o3
from mace import data, modules
from mace.tools import torch_geometric, utils

CUTOFF = 4.0  # [Å]
NUMBERS = (1, 6, 8)
TRICLINIC = np.array([[4.1, 0.3, 0.0], [1.1, 4.4, 0.2], [0.4, -0.7, 4.2]])  # [Å]
BLOCKS = {
    "agnostic": "RealAgnosticInteractionBlock",
    "residual": "RealAgnosticResidualInteractionBlock",
    "density": "RealAgnosticDensityInteractionBlock",
    "density_residual": "RealAgnosticDensityResidualInteractionBlock",
    "attention": "RealAgnosticAttResidualInteractionBlock",
    "nonlinear": "RealAgnosticResidualNonLinearInteractionBlock",
}


def build(
    first="residual",
    later="residual",
    *,
    hidden=1,
    channels=4,
    heads=("Default",),
    dtype=torch.float64,
    seed=0,
    scaled=True,
    **fields,
):
    """A model of mace-torch with random weights; ``fields`` are mace-torch's own arguments."""
    torch.set_default_dtype(dtype)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    number = len(heads)
    energies = -10 * rng.random((number, len(NUMBERS)))
    arguments = dict(
        r_max=CUTOFF,
        num_bessel=5,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=modules.interaction_classes[BLOCKS[later]],
        interaction_cls_first=modules.interaction_classes[BLOCKS[first]],
        num_interactions=2,
        num_elements=len(NUMBERS),
        hidden_irreps=o3.Irreps(
            [(channels, (degree, (-1) ** degree)) for degree in range(hidden + 1)]
        ),
        MLP_irreps=o3.Irreps("6x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=energies if number > 1 else energies[0],
        avg_num_neighbors=7.3,
        atomic_numbers=list(NUMBERS),
        correlation=3,
        radial_MLP=[8, 8],
        heads=list(heads),
        use_reduced_cg=False,
    )
    arguments |= fields
    if scaled:
        scale, shift = 0.5 + rng.random(number), rng.random(number)
        arguments |= dict(atomic_inter_scale=scale.tolist(), atomic_inter_shift=shift.tolist())
    model = (modules.ScaleShiftMACE if scaled else modules.MACE)(**arguments)
    for name, parameter in model.named_parameters():
        # what starts at a constant, or near zero, would hide an error
        constant = "embedding.weight" in name or parameter.std() == 0 or parameter.numel() == 1
        if constant and "alpha" not in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def molecule(seed=0, nodes=6, spread=1.2):
    """A random cluster with atoms at least 0.8 Å apart."""
    rng = np.random.default_rng(seed)
    positions = np.zeros((0, 3))
    while len(positions) < nodes:
        new = spread * rng.normal(size=3)
        if all(np.linalg.norm(new - old) > 0.8 for old in positions):
            positions = np.concatenate([positions, new[None]])
    return Atoms([NUMBERS[i % 3] for i in range(nodes)], positions)


def crystal(seed=1, nodes=4, pbc=True):
    atoms = molecule(seed, nodes, 1.0)
    atoms.set_cell(TRICLINIC)
    atoms.pbc = pbc
    return atoms


def evaluate(model, atoms, head=None, charge=None, spin=None):
    """(energy, forces, stress or None) by mace-torch, in the dtype of the model."""
    dtype = model.r_max.dtype
    torch.set_default_dtype(dtype)
    properties = {}
    if charge is not None:
        properties = {"total_charge": np.array(charge), "total_spin": np.array(spin)}
    config = data.Configuration(
        atomic_numbers=atoms.numbers,
        positions=atoms.positions,
        properties=properties,
        property_weights={},
        cell=np.array(atoms.cell),
        pbc=tuple(bool(p) for p in atoms.pbc),
        head=head or model.heads[0],
    )
    table = utils.AtomicNumberTable([int(z) for z in model.atomic_numbers])
    graph = data.AtomicData.from_config(
        config, z_table=table, cutoff=float(model.r_max), heads=list(model.heads)
    )
    loader = torch_geometric.dataloader.DataLoader([graph], batch_size=1, shuffle=False)
    periodic = all(atoms.pbc)
    result = model(next(iter(loader)).to_dict(), compute_stress=periodic)
    stress = result["stress"][0].detach().numpy() if periodic else None
    return float(result["energy"]), result["forces"].detach().numpy(), stress
