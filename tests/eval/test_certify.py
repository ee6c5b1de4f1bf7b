"""A certificate passes what is so, and fails exactly the property that a broken model lacks."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import ENERGIES, Pair, PairConfig, crystal, mace_potential, pair_potential

from equizoo.eval.certificate import Certificate, Check, Settings, Verdict, shown
from equizoo.eval.certify import certify
from equizoo.eval.potential import Potential
from equizoo.graph import sum_graphs, sum_receivers
from equizoo.structure import EnergyReference, Structure
from equizoo.zoo._base import Symmetry

BRIEF = Settings(frames=1, turns=1, nve_picoseconds=0.0, md_picoseconds=0.0)
NAMES = (
    "rotation",
    "reflection",
    "translation",
    "permutation",
    "forces are the gradient",
    "stress is the derivative by strain",
    "smooth at the cutoff",
    "size consistency",
    "the same from run to run",
    "float32 against float64",
)
DERIVATIVES = NAMES[4:6]


@pytest.fixture(scope="module")
def solid():
    rng = np.random.default_rng(0)
    frames = [Structure.from_atoms(crystal(rng)) for _ in range(3)]
    labels = {"energy": 1.0, "forces": np.ones((8, 3)), "stress": np.eye(3)}  # those of a data set
    return [dataclasses.replace(frame, **labels) for frame in frames]


@pytest.fixture(scope="module")
def certificate(solid):
    settings = Settings(
        frames=2,
        turns=2,
        timestep=0.5,
        nve_picoseconds=0.05,
        md_picoseconds=0.05,
        replicas=2,
        temperatures=(300.0,),
    )
    return certify(pair_potential(), solid, source="three", sha256="a" * 64, settings=settings)


def verdicts(certificate):
    return {check.name: check.verdict for check in certificate.checks}


def test_a_sound_potential_passes_all(certificate):
    names = [*NAMES, "energy is conserved (NVE)", "stable at 300 K"]
    assert verdicts(certificate) == dict.fromkeys(names, Verdict.PASSED)
    assert certificate.failed == ()
    for check in certificate.checks:
        assert set(check.limits) <= set(check.values) and check.how
        assert all(value >= 0 for key, value in check.values.items() if "mean_drift" not in key)


def test_what_was_run_is_stated(certificate):
    assert certificate.structures == "2 generated, 2 of three"
    assert certificate.settings.timestep == 0.5 and certificate.sha256 == "a" * 64
    assert {"equizoo", "jax"} <= set(certificate.versions) and "cpu" in certificate.device
    by_name = {check.name: check for check in certificate.checks}
    how = by_name["stable at 300 K"].how
    for words in ("float32", "0.5 fs", "for 0.05 ps of 0.05", "2 replicas", "friction 10/ps"):
        assert words in how
    values = by_name["stable at 300 K"].values
    assert values["replicas"] == 2 and values["stable_until_ps"] == pytest.approx(0.05)


def test_it_is_json_and_a_table_and_front_matter(certificate, tmp_path):
    certificate.save(tmp_path / "certificate.json")
    assert Certificate.load(tmp_path / "certificate.json") == certificate
    plain = json.loads((tmp_path / "certificate.json").read_text())
    assert plain["checks"][0]["verdict"] == "passed"
    text = certificate.markdown()
    assert text.startswith("| property | verdict | measured |\n")
    assert sum(line.startswith("| ") for line in text.splitlines()) == 2 + len(certificate.checks)
    assert "| rotation | passed | energy float32 " in text
    for row in certificate.front_matter():
        words = {key for key, value in row.items() if isinstance(value, str)}
        assert words == {"check", "verdict"}


def test_mace_passes_without_any_structures():
    found = certify(mace_potential(), settings=BRIEF)
    assert found.structures == "2 generated"
    expected = dict.fromkeys(NAMES, Verdict.PASSED)
    expected |= dict.fromkeys(
        ("energy is conserved (NVE)", "stable at 300 K", "stable at 500 K"), Verdict.NOT_RUN
    )
    assert verdicts(found) == expected
    assert found.checks[-1].how == "left out by the settings (0 ps)"
    alone = certify(pair_potential(), settings=dataclasses.replace(BRIEF, md_picoseconds=1.0))
    assert alone.checks[-1].how == "no structures were given that the model is made for"


# ---- broken in one way each


class Broken(Pair):
    """Pairs whose energy per edge is that of Pair times ``factor``, plus ``extra`` per node."""

    def node_energies(self, vectors, graph):
        squares = jnp.sum(vectors**2, axis=1) / self.config.cutoff**2
        strength = self.strength[...].astype(vectors.dtype)
        pair = strength[graph.species[graph.senders]] * self.profile(squares)
        pair = pair * self.factor(vectors, graph)
        return strength[graph.species] * sum_receivers(pair, graph) + self.extra(vectors, graph)

    def profile(self, squares):
        return jnp.maximum(1 - squares, 0) ** 3

    def factor(self, vectors, graph):
        return jnp.ones_like(vectors[:, 0])

    def extra(self, vectors, graph):
        return jnp.zeros(graph.num_nodes, vectors.dtype)


class Tilted(Broken):
    def factor(self, vectors, graph):
        return 1 + 0.1 * vectors[:, 2] ** 2


class Handed(Broken):
    """The triple product of three differently weighted sums over neighbours."""

    def extra(self, vectors, graph):
        near = jnp.maximum(1 - jnp.sum(vectors**2, axis=1) / self.config.cutoff**2, 0) ** 3
        kind = graph.species[graph.senders].astype(vectors.dtype)
        a, b, c = (
            sum_receivers((near * w)[:, None] * vectors, graph)
            for w in (jnp.ones_like(near), near, kind + near**2)
        )
        return 0.1 * jnp.sum(a * jnp.cross(b, c), axis=1)


class Ordered(Broken):
    def extra(self, vectors, graph):
        index = jnp.arange(graph.num_nodes)
        first = jax.ops.segment_min(index, graph.node_graph, graph.num_graphs)
        rank = (index - first[graph.node_graph]).astype(vectors.dtype)
        near = jnp.maximum(1 - jnp.sum(vectors**2, axis=1) / self.config.cutoff**2, 0) ** 3
        return 1e-3 * rank * sum_receivers(near, graph)


class Abrupt(Broken):
    def profile(self, squares):
        return jnp.where(squares < 1, 1.1 - squares, 0)


class Global(Broken):
    """Every atom feels the energy of the whole."""

    def extra(self, vectors, graph):
        near = jnp.maximum(1 - jnp.sum(vectors**2, axis=1) / self.config.cutoff**2, 0) ** 3
        total = sum_graphs(sum_receivers(near, graph), graph)
        return 1e-4 * total[graph.node_graph] * sum_receivers(near, graph)


class Moody(Broken):
    """Another function every time it is compiled."""

    moods = itertools.count()

    def factor(self, vectors, graph):
        return jnp.full_like(vectors[:, 0], 1 + 0.01 * next(self.moods))


class Undefined(Broken):
    def profile(self, squares):
        return squares * jnp.nan


class Direct(Broken):
    """Forces of a head, which are no gradient."""

    def energies_and_forces(self, vectors, graph):
        squares = jnp.sum(vectors**2, axis=1) / self.config.cutoff**2
        push = sum_receivers(jnp.maximum(1 - squares, 0)[:, None] ** 3 * vectors, graph)
        return self.node_energies(vectors, graph), push


@dataclasses.dataclass(frozen=True, kw_only=True)
class BrokenConfig(PairConfig):
    model: type = Broken
    group: Symmetry = Symmetry.O3
    gradient: bool = True
    continuous: bool = True

    @property
    def symmetry(self):
        return self.group

    @property
    def conservative(self):
        return self.gradient

    @property
    def smooth(self):
        return self.continuous

    def build(self, *, rngs):
        return self.model(self)


def broken(model, **options) -> Potential:
    config = BrokenConfig(
        atomic_numbers=(1, 6, 8), cutoff=3.0, avg_num_neighbors=8.0, model=model, **options
    )
    return Potential(
        config.build(rngs=nnx.Rngs(0)),
        reference_energies=ENERGIES,
        energy_reference=EnergyReference.TOTAL,
        level_of_theory="none",
        name=model.__name__.lower(),
    )


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Tilted, ("rotation", "reflection")),
        (Handed, ("reflection",)),
        (Ordered, ("permutation", "size consistency")),
        (Abrupt, (DERIVATIVES[1], "smooth at the cutoff")),
        (Global, ("size consistency",)),
        (Moody, ("the same from run to run",)),
        (Undefined, NAMES),
    ],
)
def test_a_broken_potential_fails_what_it_lacks(model, names, solid):
    found = certify(broken(model), solid, settings=BRIEF)
    if model is Moody:  # the two precisions are two compilations
        assert set(found.failed) >= set(names)
    else:
        assert found.failed == names


@pytest.mark.parametrize(
    ("model", "options", "names"),
    [
        (Handed, {"group": Symmetry.SO3}, ("reflection",)),
        (Abrupt, {"continuous": False}, (*DERIVATIVES, "smooth at the cutoff")),
        (Direct, {"gradient": False}, ("forces are the gradient",)),
    ],
)
def test_what_is_not_claimed_is_measured_and_marked(model, options, names, solid):
    found = certify(broken(model, **options), solid, settings=BRIEF)
    assert found.failed == ()
    unclaimed = {c.name: c for c in found.checks if c.verdict is Verdict.NOT_CLAIMED}
    assert tuple(unclaimed) == names
    check = unclaimed[names[-1]]
    assert any(check.values[key] > limit for key, limit in check.limits.items())
    if model is Direct:
        assert verdicts(found)["stress is the derivative by strain"] is Verdict.NOT_RUN


def test_what_flies_apart_is_not_stable(solid):
    """Atoms of one molecule that only repel each other."""
    molecule = dataclasses.replace(solid[0], cell=np.zeros((3, 3)), pbc=(False, False, False))
    settings = dataclasses.replace(
        BRIEF, md_picoseconds=0.2, temperatures=(1000.0,), timestep=1.0, replicas=1
    )
    found = certify(pair_potential(), [molecule], settings=settings)
    (check,) = [c for c in found.checks if c.name == "stable at 1000 K"]
    assert check.verdict is Verdict.FAILED and check.values["unstable_replicas"] == 1
    assert 0 < check.values["stable_until_ps"] < 0.2


def test_nan_does_not_pass():
    check = Check.of("x", {"a_meV": float("nan"), "b_meV": 1.0}, {"a_meV": 1.0}, "")
    assert check.verdict is Verdict.FAILED and check.values == {"b_meV": 1.0}


@pytest.mark.parametrize(
    "options", [{"frames": 0}, {"md_picoseconds": -1.0}, {"dtype": "bfloat16"}]
)
def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        Settings(**options)


def test_names_of_figures_are_read():
    assert shown("forces_float64_meV_per_A", 3.21e-11) == "forces float64 3.21e-11 meV/Å"
    assert shown("drift_meV_per_atom_per_ps", 0.5) == "drift 0.5 meV/atom/ps"
    assert shown("replicas", 4.0) == "replicas 4"
