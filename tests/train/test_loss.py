"""The loss and its error sums against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from conftest import frames_of, labelled, make_structures, packing_for

from equizoo.train.config import Errors, LossWeights, TrainConfig
from equizoo.train.loop import _objective
from equizoo.train.loss import error_sums, loss, loss_sums
from equizoo.zoo._base import Prediction


@pytest.fixture(scope="module")
def batch():
    pair = labelled(Atoms("AlCu", [[0, 0, 0], [2.5, 0, 0]]), "pair")
    crystal = make_structures(1)[0]
    frames = frames_of([pair, crystal])
    packing = packing_for(frames)
    return jax.tree.map(jnp.asarray, packing(frames))


def off_by(labels, energy=0.0, forces=0.0, stress=0.0) -> Prediction:
    return Prediction(
        labels.energy + energy,
        labels.forces + forces,
        labels.stress + stress,
        jnp.zeros(labels.forces.shape[0], labels.energy.dtype),
    )


def test_each_term_is_the_mean_square_over_the_labels_present(batch):
    graph, labels = batch
    # energies per atom are off by 0.6 / 2 and 0.6 / 4 eV
    value = loss(off_by(labels, energy=0.6), graph, labels, LossWeights(energy=2.0, forces=0.0))
    assert float(value) == pytest.approx(2.0 * (0.3**2 + 0.15**2) / 2, rel=1e-5)
    value = loss(off_by(labels, forces=0.1), graph, labels, LossWeights(energy=0.0, forces=3.0))
    assert float(value) == pytest.approx(3.0 * 0.01, rel=1e-5)
    # only the crystal has a stress
    value = loss(off_by(labels, stress=0.2), graph, labels, LossWeights(stress=5.0))
    assert float(value) == pytest.approx(5.0 * 0.04, rel=1e-5)


def test_huber_is_twice_the_huber_function(batch):
    graph, labels = batch
    weights = LossWeights(energy=0.0, forces=1.0, huber_delta=0.1)
    small = loss(off_by(labels, forces=0.05), graph, labels, weights)
    large = loss(off_by(labels, forces=0.5), graph, labels, weights)
    assert float(small) == pytest.approx(0.05**2, rel=1e-4)
    assert float(large) == pytest.approx(0.1 * (2 * 0.5 - 0.1), rel=1e-5)


def test_a_masked_label_counts_for_nothing_whatever_its_value(batch):
    graph, labels = batch
    weights = LossWeights(energy=1.0, forces=1.0, stress=1.0)
    prediction = off_by(labels, 0.1, 0.1, 0.1)
    hidden = labels._replace(
        energy_mask=labels.energy_mask.at[0].set(False),
        forces_mask=labels.forces_mask.at[0].set(False),
        stress_mask=jnp.zeros_like(labels.stress_mask),
    )
    garbage = hidden._replace(
        energy=hidden.energy.at[0].set(1e6),
        forces=hidden.forces.at[0].set(-1e6),
        stress=jnp.full_like(hidden.stress, 1e6),
    )
    assert float(loss(prediction, graph, hidden, weights)) == float(
        loss(prediction, graph, garbage, weights)
    )
    gradient = jax.grad(lambda p: loss(p, graph, garbage, weights))(prediction)
    assert np.all(np.asarray(gradient.stress) == 0)
    assert np.all(np.asarray(gradient.forces[0]) == 0)
    assert np.isfinite(np.asarray(gradient.energy)).all()


def test_error_sums_count_the_labels(batch):
    graph, labels = batch
    sums = error_sums(off_by(labels, 0.6, 0.1, 0.2), graph, labels)
    expected = {  # components, absolute, squares
        "energy": (2, 2 * 0.6, 2 * 0.36),
        "energy_per_atom": (2, 0.3 + 0.15, 0.09 + 0.0225),
        "forces": (18, 18 * 0.1, 18 * 0.01),
        "stress": (9, 9 * 0.2, 9 * 0.04),
    }
    assert set(expected) == set(sums._fields)
    for quantity, numbers in expected.items():
        np.testing.assert_allclose(getattr(sums, quantity), numbers, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"huber_delta": 0.15}, {"errors": Errors.NORMS}], ids=str)
def test_the_objective_of_validation_is_the_loss(batch, options):
    graph, labels = batch
    weights = LossWeights(energy=2.0, forces=3.0, stress=5.0, **options)
    rng = np.random.default_rng(0)
    errors = (rng.normal(0, 0.2, x.shape).astype(np.float32) for x in labels[:3])
    off = off_by(labels, *errors)
    sums = np.array(loss_sums(off, graph, labels, weights))
    halves = [sums * share for share in (0.25, 0.75)]  # of two batches
    expected = float(loss(off, graph, labels, weights))
    assert _objective(np.sum(halves, axis=0), weights) == pytest.approx(expected, rel=1e-5)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        LossWeights(energy=-1.0)
    with pytest.raises(ValueError, match="one must be positive"):
        LossWeights(energy=0.0, forces=0.0)
    with pytest.raises(ValueError, match="epochs is 0, expected at least 1"):
        TrainConfig(epochs=0)
