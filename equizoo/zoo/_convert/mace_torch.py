"""Step two of converting a mace-torch model: a dump to our configuration and weights.

Reference: parameter names and normalisations of mace-torch 0.3.16 and e3nn 0.4.4; see
``docs/from-mace.md``.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ase.data
import e3nn_jax as e3nn
import numpy as np
from jaxtyping import Float

from equizoo.config import to_dict
from equizoo.layers.activation import FACTORS, ActivationConstant, Nonlinearity
from equizoo.layers.radial import Agnesi, Bessel, Chebyshev, Gaussian, Soft
from equizoo.layers.repulsion import ZBL
from equizoo.tensor_products._base import natural_irreps
from equizoo.tensor_products._symmetric import monomials, symmetric_basis
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.zoo._convert import mace_torch_dump
from equizoo.zoo._convert.dump import Dump, read_folder

RESIDUAL = 1e-12  # of a contraction basis in ours, relative; rounding
RESIDUAL_SINGLE = 1e-6  # where the checkpoint's constants are rounded to float32
_SAME = 1e-13  # relative: a constant that differs by no more is the standard one

ATTENTION, NONLINEAR = "real_agnostic_attention_residual", "real_agnostic_residual_nonlinear"
INTERACTIONS = {
    "RealAgnosticInteractionBlock": "real_agnostic",
    "RealAgnosticResidualInteractionBlock": "real_agnostic_residual",
    "RealAgnosticDensityInteractionBlock": "real_agnostic_density",
    "RealAgnosticDensityResidualInteractionBlock": "real_agnostic_density_residual",
    "RealAgnosticAttResidualInteractionBlock": ATTENTION,
    "RealAgnosticResidualNonLinearInteractionBlock": NONLINEAR,
}
READOUTS = {
    "LinearReadoutBlock": "linear",
    "NonLinearReadoutBlock": "mlp",
    "NonLinearBiasReadoutBlock": "biased_mlp",
}
_MATRICES = {
    "linear": ("linear",),
    "mlp": ("linear_1", "linear_2"),
    "biased_mlp": ("linear_1", "linear_mid", "linear_2"),
}
QUANTITIES = {"total_charge": "charge", "total_spin": "spin"}


class Converted(NamedTuple):
    """The same model in our terms."""

    config: dict[str, Any]  # as in config.json
    arrays: dict[str, np.ndarray]  # by the names of our parameters, float64
    reference_energies: dict[str, dict[int, float]]  # [eV] by head and atomic number
    source: Mapping[str, str]  # name and SHA-256 of the file, where known


def read_dump(folder: str | Path) -> Dump:
    """The dump in a folder; ``ValueError`` where it is not one."""
    return read_folder(folder, mace_torch_dump)


def convert(dump: Dump) -> Converted:
    """The model of a dump, equal to rounding.

    Raises ``ValueError`` for what has no counterpart here, and when an array has another size than
    the settings imply, or is left over.
    """
    return _Conversion(dump).run()


class _Conversion:
    def __init__(self, dump: Dump):
        self.dump = dump
        self.model = dump.settings["model"]
        self.left = dict(dump.arrays)
        self.out: dict[str, np.ndarray] = {}

    # ---- reading

    def take(self, key: str) -> np.ndarray:
        if key not in self.left:
            raise ValueError(f"{self.dump.where} lacks the array {key}; make the dump anew.")
        array = self.left.pop(key)
        return array.astype(np.float64) if array.dtype.kind == "f" else array

    def number(self, key: str) -> float:
        return float(self.take(key))

    def refuse(self, what: str) -> ValueError:
        return ValueError(f"{self.dump.where}: {what}, which has no counterpart in equizoo.")

    def irreps(self, text: str, where: str) -> tuple[int, int]:
        """(channels, highest degree) of ``C x (0e + 1o + ...)``; refuses any other content."""
        irreps = e3nn.Irreps(text).simplify()
        channels, l_max = irreps[0].mul, len(irreps) - 1
        if irreps != e3nn.Irreps([(channels, ir) for _, ir in natural_irreps(l_max)]):
            raise self.refuse(f"{where} are '{text}', not C x (0e + 1o + 2e + ...)")
        return channels, l_max

    # ---- the whole

    def run(self) -> Converted:
        model = self.model
        if model["use_so3"]:
            raise self.refuse("the model has harmonics of even parity only (use_so3)")
        self.numbers = tuple(int(z) for z in self.take("atomic_numbers"))
        self.cutoff = self.number("r_max")
        self.heads = tuple(model["heads"])
        _, self.l_max = self.irreps("+".join(f"{ir}" for ir in e3nn.Irreps(model["harmonics"])), "")
        self.layers = model["interactions"]
        self.channels, _ = self.irreps(self.layers[0]["node_irreps"], "node features")
        hidden = [self.irreps(p["irreps"], "hidden features")[1] for p in model["products"]]
        # the last layer is read out by its scalars alone, whatever it has
        self.hidden_l_max = hidden[0] if len(hidden) > 1 else 0
        if any(other != hidden[0] for other in hidden[1:-1]):
            raise self.refuse(f"layers differ in their highest degrees {hidden}")
        self.correlation = max(max(p["correlation"]) for p in model["products"])
        config = self.config()
        for index in range(len(self.layers)):
            self.layer(index)
        self.readouts()
        size = len(self.numbers), self.channels
        self.out["embedding"] = self.take("node_embedding.linear.weight").reshape(size)
        self.embedding()
        energies = np.atleast_2d(self.take("atomic_energies_fn.atomic_energies"))
        if energies.shape == (1, size[0]):
            energies = np.repeat(energies, len(self.heads), axis=0)
        if energies.shape != (len(self.heads), size[0]):
            raise ValueError(
                f"{self.dump.where}: reference energies have shape {energies.shape}, expected "
                f"{(len(self.heads), size[0])} (heads, elements)."
            )
        self.take("num_interactions")
        if self.left:
            raise self.refuse(f"the model has arrays {', '.join(sorted(self.left))}")
        return Converted(
            config,
            self.out,
            {
                head: dict(zip(self.numbers, row.tolist(), strict=True))
                for head, row in zip(self.heads, energies, strict=True)
            },
            self.dump.source,
        )

    def config(self) -> dict[str, Any]:
        model, heads = self.model, self.heads
        scale: float | tuple[float, ...] = 1.0
        shift: float | tuple[float, ...] = 0.0
        if self.dump.settings["class"] == "ScaleShiftMACE":
            scale, shift = (
                self.per_head(self.take(f"scale_shift.{name}")) for name in ("scale", "shift")
            )
        last = model["readouts"][-1]
        if last["class"] not in READOUTS:
            raise self.refuse(f"the last readout is a {last['class']}")
        kinds = []
        for layer, product in zip(self.layers, model["products"], strict=True):
            if layer["class"] not in INTERACTIONS:
                raise self.refuse(f"a layer is a {layer['class']}")
            kinds.append(INTERACTIONS[layer["class"]])
            if product["self_connection"] < ("Residual" in layer["class"]):
                raise self.refuse(f"a {layer['class']} has its self-connection switched off")
            self.check_activations(layer["activations"], ("radial", "scalars"), Nonlinearity.SILU)
            self.check_activations(layer["activations"], ("gates",), Nonlinearity.SIGMOID)
        envelope_p = int(self.take("radial_embedding.cutoff_fn.p"))
        if not np.isclose(self.number("radial_embedding.cutoff_fn.r_max"), self.cutoff, rtol=_SAME):
            raise self.refuse("the envelope ends elsewhere than the neighbour list")
        self.graph_features = list(self.read_graph_features())
        hidden = self.left.get("readouts.0.linear_1.weight", np.zeros(0))
        for index in range(len(model["readouts"])):
            hidden = self.left.get(f"readouts.{index}.linear_1.weight", hidden)
        width = hidden.size // (self.channels * len(heads))
        sizes: dict[str, Any] = {"readout_channels": width} if width else {}
        for index, kind in enumerate(kinds):
            found: dict[str, Any] = {"radial_widths": self.widths(index)}
            if kind == ATTENTION:
                down = self.left[f"interactions.{index}.linear_down.weight"].size // self.channels
                found = {"attention": {"channels": down, "widths": self.widths(index)}}
            if kind == NONLINEAR:
                found["density_widths"] = self.widths(index, "density_fn")
            for name, value in found.items():
                if sizes.setdefault(name, value) != value:
                    raise self.refuse(f"layers differ in {name}: {sizes[name]} and {value}")
        return dict(
            architecture="mace",
            format=1,
            atomic_numbers=list(self.numbers),
            cutoff=self.cutoff,
            avg_num_neighbors=self.layers[0]["avg_num_neighbors"],
            channels=self.channels,
            hidden_l_max=self.hidden_l_max,
            l_max=self.l_max,
            correlation=self.correlation,
            interactions=tuple(kinds),
            num_bessel=model["radial_size"],
            envelope_p=envelope_p,
            scale=scale,
            shift=shift,
            zero_isolated=False,
            activation=ActivationConstant.TORCH.value,
            radial_basis=to_dict(self.radial_basis()),
            distance_transform=_to_dict(self.distance_transform()),
            envelope_on="basis" if model["apply_cutoff"] else "weights",
            repulsion=_to_dict(self.repulsion()),
            heads=heads,
            last_readout=READOUTS[last["class"]],
            readout_activation=self.readout_activation(last).value,
            edge_features=self.edge_features(),
            joint_embedding=self.graph_features,
            embedding_readout=model["embedding_readout"],
            **sizes,
        )

    def per_head(self, values: np.ndarray) -> float | tuple[float, ...]:
        values = np.atleast_1d(values)
        if len(values) not in (1, len(self.heads)):
            raise ValueError(
                f"{self.dump.where}: {len(values)} scales or shifts for {len(self.heads)} heads."
            )
        return float(values[0]) if len(values) == 1 else tuple(values.tolist())

    def edge_features(self) -> list[dict[str, int]]:
        features = []
        for index, layer in enumerate(self.layers):
            _, node_l_max = self.irreps(layer["node_irreps"], "node features")
            channels, l_max = self.irreps(layer["edge_irreps"], "edge features")
            if l_max > node_l_max:
                raise self.refuse(f"edge features of layer {index} have degrees that nodes lack")
            features.append({"channels": channels, "l_max": l_max})
        plain = [
            {"channels": self.channels, "l_max": self.irreps(layer["node_irreps"], "")[1]}
            for layer in self.layers
        ]
        return [] if features == plain else features

    # ---- radial functions

    def radial_basis(self):
        model, number = self.model, self.model["radial_size"]
        name, prefix = model["radial_basis"], "radial_embedding.bessel_fn"
        if name == "BesselBasis":
            frequencies = self.take(f"{prefix}.bessel_weights")
            prefactor = self.number(f"{prefix}.prefactor")
            self.take(f"{prefix}.r_max")
            return Bessel(
                _unless(frequencies, np.arange(1, number + 1) * np.pi / self.cutoff),
                _one(_unless([prefactor], [np.sqrt(2 / self.cutoff)])),
            )
        if name == "GaussianBasis":
            centers = self.take(f"{prefix}.gaussian_weights")
            coefficient, standard = model["gaussian_coefficient"], self.cutoff / (number - 1)
            return Gaussian(
                _unless(centers, np.linspace(0, self.cutoff, number)),
                _one(_unless([coefficient], [-0.5 / standard**2])),
            )
        if name == "ChebychevBasis":
            if not np.array_equal(self.take(f"{prefix}.n").ravel(), np.arange(1, number + 1)):
                raise self.refuse("orders of the Chebyshev basis are not 1 to N")
            return Chebyshev()
        raise self.refuse(f"the radial basis is a {name}")

    def distance_transform(self):
        name, prefix = self.model["distance_transform"], "radial_embedding.distance_transform"
        if name is None:
            return None
        radii = self.radii(f"{prefix}.covalent_radii")
        if name == "AgnesiTransform":
            q, p, a = (self.number(f"{prefix}.{key}") for key in "qpa")
            return Agnesi(q, p, a, radii)
        if name == "SoftTransform":
            return Soft(self.number(f"{prefix}.alpha"), radii)
        raise self.refuse(f"the distance transform is a {name}")

    def repulsion(self) -> ZBL | None:
        if not self.model["pair_repulsion"]:
            return None
        prefix = "pair_repulsion_fn"
        a, b, c, d = self.take(f"{prefix}.c").tolist()
        self.left.pop(f"{prefix}.r_max", None)  # in files of older versions, without use
        return ZBL(
            envelope_p=int(self.take(f"{prefix}.p")),
            exponent=self.number(f"{prefix}.a_exp"),
            prefactor=self.number(f"{prefix}.a_prefactor"),
            coefficients=(a, b, c, d),
            radii=self.radii(f"{prefix}.covalent_radii"),
        )

    def radii(self, key: str) -> tuple[float, ...] | None:
        table = self.take(key)
        return _unless(
            table[list(self.numbers)], [ase.data.covalent_radii[z] for z in self.numbers]
        )

    # ---- layers

    def widths(self, index: int, network: str = "conv_tp_weights") -> tuple[int, ...]:
        """Of the hidden layers of a radial network."""
        prefix = f"interactions.{index}.{network}"
        sizes = []
        for j in itertools.count():
            if (key := f"{prefix}.layer{j}.weight") in self.left:
                sizes.append(self.left[key].shape[1])
            elif (key := f"{prefix}.net.{3 * j}.weight") in self.left:
                sizes.append(self.left[key].shape[0])
            else:
                break
        return tuple(sizes[:-1])

    def layer(self, index: int) -> None:
        settings = self.layers[index]
        kind = INTERACTIONS[settings["class"]]
        source, target = f"interactions.{index}", f"layers.{index}"
        last = index == len(self.layers) - 1
        messages, irreps_out = (
            natural_irreps(self.l_max),
            natural_irreps(0 if last else self.hidden_l_max),
        )
        node = natural_irreps(self.irreps(settings["node_irreps"], "")[1])
        edge_channels, edge_l_max = self.irreps(settings["edge_irreps"], "")
        edge = natural_irreps(edge_l_max)
        channels, edge_size = self.channels, edge_channels
        paths = ClebschGordan().bind(edge, messages, messages).irreps_paths

        self.linear(f"{source}.linear_up", f"{target}.linear_up", node, edge, edge_size)
        hidden = natural_irreps(self.irreps(settings["hidden_irreps"], "")[1])
        if kind == NONLINEAR:
            self.normalized_mlp(f"{source}.conv_tp_weights", f"{target}.radial")
            self.normalized_mlp(f"{source}.density_fn", f"{target}.density")
            for name in ("source_embedding", "target_embedding"):
                table = self.take(f"{source}.{name}.weight")
                self.out[f"{target}.{name}"] = table.reshape(len(self.numbers), channels)
            for name in ("alpha", "beta"):
                self.out[f"{target}.{name}"] = self.take(f"{source}.{name}").reshape(())
            self.gated(f"{source}.linear_1", target, "", paths, edge_size)
            self.gated(f"{source}.linear_res", target, "residual_", edge, edge_size)
            self.linear(f"{source}.linear_2", f"{target}.linear_out", messages, messages, channels)
            self.linear(f"{source}.skip_tp", f"{target}.skip_linear", node, hidden, channels,
                        keep=irreps_out)  # fmt: skip
        else:
            self.mlp(f"{source}.conv_tp_weights", f"{target}.radial")
            average = settings["avg_num_neighbors"]
            factor = (
                1.0
                if "Density" in settings["class"]
                else self.layers[0]["avg_num_neighbors"] / average
            )
            self.linear(f"{source}.linear", f"{target}.linear", paths, messages, channels,
                        factor=factor)  # fmt: skip
            if kind == ATTENTION:
                down = self.left[f"{source}.linear_down.weight"].size // channels
                self.linear(f"{source}.linear_down", f"{target}.linear_down", node,
                            natural_irreps(0), down)  # fmt: skip
                self.linear(f"{source}.skip_linear", f"{target}.skip_linear", node, hidden,
                            channels, keep=irreps_out)  # fmt: skip
            elif "Residual" in settings["class"]:
                self.species_linear(source, target, node, hidden, irreps_out)
            else:
                self.species_linear(source, target, messages, messages, messages)
            if "Density" in settings["class"]:
                self.mlp(f"{source}.density_fn", f"{target}.density")
        self.product(index, messages, irreps_out)

    def linear(
        self,
        source: str,
        target: str,
        irreps_in: e3nn.Irreps,
        irreps_out: e3nn.Irreps,
        size: int,
        keep: e3nn.Irreps | None = None,
        factor: float = 1.0,
    ) -> None:
        """Blocks of one irrep stacked; what is not in ``keep`` is passed over."""
        blocks = self.blocks(source, irreps_in, dict.fromkeys((ir for _, ir in irreps_out), size))
        for ir, kernel in blocks.items():
            if keep is None or ir in [ir_kept for _, ir_kept in keep]:
                self.out[f"{target}.kernels.{ir}"] = factor * kernel

    def blocks(
        self, source: str, irreps_in: e3nn.Irreps, sizes_out: Mapping[Any, int]
    ) -> dict[Any, Float[np.ndarray, "fan_in size"]]:
        """The matrices of an e3nn Linear by irrep, in the order of the input."""
        flat = self.take(f"{source}.weight").ravel()
        counts = {ir: sum(1 for _, i in irreps_in if i == ir) for ir in sizes_out}
        used = [ir for _, ir in irreps_in if counts.get(ir)]
        columns = sum(sizes_out[ir] for ir in used)
        if not columns or flat.size % columns:
            raise ValueError(
                f"{self.dump.where}: {source}.weight has {flat.size} numbers, expected a multiple "
                f"of {columns} for '{irreps_in}'."
            )
        rows, start = flat.size // columns, 0
        stacked: dict[Any, list[np.ndarray]] = {ir: [] for ir in sizes_out if counts[ir]}
        for ir in used:
            end = start + rows * sizes_out[ir]
            stacked[ir].append(flat[start:end].reshape(rows, sizes_out[ir]))
            start = end
        return {ir: np.concatenate(parts) for ir, parts in stacked.items()}

    def gated(
        self, source: str, target: str, prefix: str, irreps_in: e3nn.Irreps, edge_size: int
    ) -> None:
        """A map to messages and, beside the scalars, a gate for each of the others."""
        sizes = {ir: self.channels for _, ir in natural_irreps(self.l_max)}
        scalar = e3nn.Irrep("0e")
        sizes[scalar] = self.channels * (1 + self.l_max)
        for ir, kernel in self.blocks(source, irreps_in, sizes).items():
            self.out[f"{target}.{prefix}linear.kernels.{ir}"] = kernel[:, : self.channels]
            if ir == scalar:
                self.out[f"{target}.{prefix}gate_linear.kernels.{ir}"] = kernel[:, self.channels :]

    def species_linear(
        self,
        source: str,
        target: str,
        irreps_in: e3nn.Irreps,
        irreps_out: e3nn.Irreps,
        keep: e3nn.Irreps,
    ) -> None:
        number, channels = len(self.numbers), self.channels
        flat = self.take(f"{source}.skip_tp.weight").ravel()
        shared = [ir for _, ir in irreps_in if ir in [other for _, other in irreps_out]]
        kernels = flat.reshape(len(shared), channels, number, channels)
        for ir, kernel in zip(shared, kernels, strict=True):
            if ir in [other for _, other in keep]:
                self.out[f"{target}.species_linear.kernels.{ir}"] = kernel.transpose(1, 0, 2)

    def mlp(self, source: str, target: str) -> None:
        for j in itertools.count():
            if (key := f"{source}.layer{j}.weight") not in self.left:
                break
            self.out[f"{target}.kernels.{j}"] = self.take(key)

    def normalized_mlp(self, source: str, target: str) -> None:
        for j in itertools.count():
            if f"{source}.net.{3 * j}.weight" not in self.left:
                break
            self.out[f"{target}.kernels.{j}"] = self.take(f"{source}.net.{3 * j}.weight").T
            self.out[f"{target}.biases.{j}"] = self.take(f"{source}.net.{3 * j}.bias")
            if (norm := f"{source}.net.{3 * j + 1}") + ".weight" in self.left:
                self.out[f"{target}.norm_scales.{j}"] = self.take(f"{norm}.weight")
                self.out[f"{target}.norm_biases.{j}"] = self.take(f"{norm}.bias")

    # ---- products

    def product(self, index: int, messages: e3nn.Irreps, irreps_out: e3nn.Irreps) -> None:
        prefix = f"products.{index}.symmetric_contractions.contractions"
        settings = self.model["products"][index]
        everything = natural_irreps(self.irreps(settings["irreps"], "")[1])
        rows = []
        for position, (_, ir) in enumerate(everything):
            wanted = ir in [other for _, other in irreps_out]
            order = settings["correlation"][position]
            for nu in range(1, self.correlation + 1):
                if nu <= order:
                    name = "weights_max" if nu == order else f"weights.{order - 1 - nu}"
                    weights = self.take(f"{prefix}.{position}.{name}")
                    couplings = self.take(f"{prefix}.{position}.U_matrix_{nu}")
                    if wanted:
                        where = f"{self.dump.where}: layer {index}, {ir}, order {nu}"
                        change = change_of_basis(couplings, messages, ir, nu, where)
                        rows.append(np.einsum("jk,zkc->zjc", change, weights))
                elif wanted:
                    size = len(symmetric_basis(messages, ir, nu))
                    rows.append(np.zeros((1, size, self.channels)))
        shape = (len(self.numbers), -1, self.channels)  # one row for all species where agnostic
        together = [np.broadcast_to(row, (shape[0], *row.shape[1:])) for row in rows]
        self.out[f"layers.{index}.product_weights"] = np.concatenate(together, axis=1)
        self.linear(
            f"products.{index}.linear",
            f"layers.{index}.product_linear",
            everything,
            everything,
            self.channels,
            keep=irreps_out,
        )

    # ---- readouts, embedding

    def readouts(self) -> None:
        number, last = len(self.heads), len(self.layers) - 1
        # with use_last_readout_only there is one, and the earlier ones give nothing
        missing = len(self.layers) - len(self.model["readouts"])
        for index in range(missing):
            self.out[f"readouts.{index}.kernels.0"] = np.zeros((self.channels, number))
        for index, readout in enumerate(self.model["readouts"], missing):
            source, target = f"readouts.{index - missing}", f"readouts.{index}"
            if index < last and READOUTS.get(readout["class"]) != "linear":
                raise self.refuse(f"the readout of layer {index} is a {readout['class']}")
            width = self.channels
            for j, name in enumerate(_MATRICES[READOUTS[readout["class"]]]):
                kernel = self.take(f"{source}.{name}.weight").reshape(width, -1)
                self.out[f"{target}.kernels.{j}"], width = kernel, kernel.shape[1]
                if f"{source}.{name}.bias" in self.left:
                    self.out[f"{target}.biases.{j - 1}"] = self.take(f"{source}.{name}.bias")

    def readout_activation(self, last: Mapping[str, Any]) -> Nonlinearity:
        if last["activation"] is None:
            return Nonlinearity.NONE if "NonLinear" in last["class"] else Nonlinearity.SILU
        name, constant = last["activation"]
        if name not in [member.value for member in Nonlinearity]:
            raise self.refuse(f"the last readout has the activation {name}")
        self.check_activations({"": [name, constant]}, ("",), Nonlinearity(name))
        return Nonlinearity(name)

    def check_activations(
        self, found: Mapping[str, Any], keys: Sequence[str], expected: Nonlinearity
    ) -> None:
        factor = FACTORS[expected]["torch"]
        for key in keys:
            if found.get(key) is not None:
                name, constant = found[key]
                if name != expected.value or not np.isclose(constant, factor, rtol=1e-12, atol=0):
                    raise self.refuse(
                        f"an activation is {constant} x {name}, not {factor} x {expected.value}"
                    )

    def read_graph_features(self) -> Iterator[dict[str, Any]]:
        for name, spec in (self.model["embedding_specs"] or {}).items():
            if name not in QUANTITIES or spec["per"] != "graph":
                raise self.refuse(f"the joint embedding has {name} per {spec['per']}")
            encoding: dict[str, Any] = {"kind": spec["type"]}
            if spec["type"] == "categorical":
                encoding |= {"num_classes": spec["num_classes"], "offset": spec.get("offset", 0)}
            elif spec.get("in_dim", 1) != 1:
                raise self.refuse(f"the joint embedding has {name} with {spec['in_dim']} numbers")
            yield {
                "quantity": QUANTITIES[name],
                "channels": spec["emb_dim"],
                "encoding": encoding,
            }

    def embedding(self) -> None:
        if not self.graph_features:
            return
        names = {quantity: name for name, quantity in QUANTITIES.items()}
        for feature in self.graph_features:
            quantity = feature["quantity"]
            source = f"joint_embedding.embedders.{names[quantity]}"
            target = "joint_embedding"
            if feature["encoding"]["kind"] == "categorical":
                self.out[f"{target}.tables.{quantity}"] = self.take(f"{source}.weight")
                continue
            for ours, theirs in ((1, 0), (2, 2)):
                prefix = f"{target}.networks.{quantity}"
                self.out[f"{prefix}.kernel_{ours}"] = self.take(f"{source}.{theirs}.weight").T
                biased = f"{source}.{theirs}.bias" in self.left
                self.out[f"{prefix}.bias_{ours}"] = (
                    self.take(f"{source}.{theirs}.bias")
                    if biased
                    else np.zeros(feature["channels"])
                )
        self.out["joint_embedding.kernel"] = self.take("joint_embedding.project.0.weight").T
        if self.model["embedding_readout"]:
            flat = self.take("embedding_readout.linear.weight")
            self.out["embedding_readout.kernels.0"] = flat.reshape(self.channels, -1)


def change_of_basis(
    couplings: Float[np.ndarray, "..."],
    irreps_in: e3nn.Irreps,
    ir_out: e3nn.Irrep,
    order: int,
    where: str = "couplings",
) -> Float[np.ndarray, "functions columns"]:
    r"""``P`` with ``sym(U) = B P``: the couplings' symmetric part in our basis of polynomials.

    The contraction only ever sees the part of ``U`` that is symmetric in its inputs, so any other
    basis of the same space serves, whatever the signs and the order of its couplings. Raises
    ``ValueError`` where the space is another.
    """
    dim = irreps_in.dim
    couplings = couplings.reshape(ir_out.dim, *([dim] * order), -1)
    ours = symmetric_basis(irreps_in, ir_out, order)
    theirs = np.zeros((ir_out.dim, ours.shape[2], couplings.shape[-1]))
    flat = couplings.reshape(ir_out.dim, -1, couplings.shape[-1])
    np.add.at(theirs, (slice(None), _monomial_of(dim, order)), flat)
    matrix = ours.reshape(len(ours), -1).T
    wanted = theirs.reshape(-1, theirs.shape[-1])
    change = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
    residual = np.abs(matrix @ change - wanted).max() / max(np.abs(wanted).max(), 1.0)
    single = np.array_equal(couplings, couplings.astype(np.float32))
    if not residual <= (allowed := RESIDUAL_SINGLE if single else RESIDUAL):
        raise ValueError(
            f"{where}: couplings to {ir_out} of order {order} leave a residual of {residual:.1e} "
            f"in our basis, allowed {allowed:.0e}: they are not equivariant, or for other irreps."
        )
    return change


@functools.cache
def _monomial_of(dim: int, order: int) -> np.ndarray:
    """The monomial that each multi-index stands for, as a position."""
    place = {tuple(row): position for position, row in enumerate(monomials(dim, order).tolist())}
    indices = itertools.product(range(dim), repeat=order)
    return np.array([place[tuple(sorted(index))] for index in indices])


def _unless(values: Any, standard: Any) -> tuple[float, ...] | None:
    """The values, or ``None`` where they are the standard ones."""
    if np.allclose(values, standard, rtol=_SAME, atol=0):
        return None
    return tuple(np.asarray(values, np.float64).tolist())


def _to_dict(part: Any) -> dict[str, Any] | None:
    return None if part is None else to_dict(part)


def _one(values: tuple[float, ...] | None) -> float | None:
    return None if values is None else values[0]
