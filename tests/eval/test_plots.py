import matplotlib.image
import numpy as np
import pytest

from equizoo.eval.evaluate import Evaluation
from equizoo.eval.plots import learning_curve, parity_plot


def evaluation(points, stress=0, name="mace-3bpa"):
    rng = np.random.default_rng(points)

    def pairs(count, mean, width, error):
        reference = mean + width * rng.standard_normal(count)
        return np.stack([reference, reference + error * rng.standard_normal(count)], axis=1)

    kinds = ("energy_{}_meV_per_atom", "forces_{}_meV_per_A", "stress_{}_meV_per_A3")
    return Evaluation(
        model=name,
        dataset="3bpa-test-300K",
        dtype="float32",
        metrics={kind.format(e): 3.21 for kind in kinds for e in ("mae", "rmse")},
        left_out={},
        energy_per_atom=pairs(points // 30, -654.07, 0.01, 0.001),
        forces=pairs(points, 0.0, 1.0, 0.03),
        stress=pairs(stress, 0.0, 0.1, 0.01),
    )


def rows(epochs):
    for epoch in range(1, epochs + 1):
        yield {
            "epoch": epoch,
            "train_loss": 2.0 / epoch,
            "learning_rate": 0.01 * (1 - epoch / (epochs + 1)),
            "train_forces_rmse_meV_per_A": 900 / epoch,
            "train_energy_rmse_meV_per_atom": 30 / epoch,
        } | (
            {
                "valid_forces_rmse_meV_per_A": 20 + 900 / epoch,
                "valid_energy_rmse_meV_per_atom": 1 + 30 / epoch,
            }
            if epoch % 2 == 0
            else {}
        )


def assert_picture(path):
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.02  # not blank
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing half-written


@pytest.mark.parametrize("points", [60, 20_000])
def test_parity_plot(tmp_path, points):
    assert_picture(parity_plot(evaluation(points), tmp_path / "parity.png"))


def test_parity_plot_of_several_evaluations(tmp_path):
    several = [evaluation(600, stress=90), evaluation(300, name="other")]
    assert_picture(parity_plot(several, tmp_path / "parity.png"))


def test_learning_curve(tmp_path):
    assert_picture(learning_curve(list(rows(40)), tmp_path / "curve.png"))


def test_learning_curve_of_one_epoch(tmp_path):
    assert_picture(learning_curve(list(rows(1)), tmp_path / "curve.png"))


def test_nothing_to_plot_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one evaluation with labels; got 0"):
        parity_plot([], tmp_path / "parity.png")
    with pytest.raises(ValueError, match="at least one evaluation with labels; got 1"):
        parity_plot(evaluation(0), tmp_path / "parity.png")
    with pytest.raises(ValueError, match="any of train_loss"):
        learning_curve([{"epoch": 1, "train_loss": float("nan")}], tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())
