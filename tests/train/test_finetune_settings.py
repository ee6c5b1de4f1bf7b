"""Settings of fine-tuning that follow from the number of frames."""

import dataclasses

import pytest

from equizoo.train.config import LossWeights
from equizoo.train.finetune_settings import FinetuneSettings
from equizoo.train.parametrization import LowRank


@pytest.mark.parametrize(
    ("frames", "epochs"), [(1, 400), (8, 200), (45, 45), (50, 40), (100, 40), (5000, 40)]
)
def test_few_frames_are_seen_more_often(frames, epochs):
    config = FinetuneSettings().for_frames(frames)
    assert config.batch_size == 5 and config.epochs == epochs
    steps = -(-frames // 5) * epochs
    assert steps >= 400 and (epochs == 40 or steps < 440)
    assert 20 <= config.epochs // config.validate_every <= 40


def test_what_is_given_stays():
    given = FinetuneSettings(
        epochs=7, batch_size=3, learning_rate=0.02, frozen=("embedding",), stress_weight=2.0, seed=4
    )
    config = given.for_frames(10)
    assert (config.epochs, config.batch_size, config.seed) == (7, 3, 4)
    assert config.optimizer.learning_rate == 0.02 and config.optimizer.frozen == ("embedding",)
    assert config.loss == LossWeights(energy=100.0, forces=10.0, stress=2.0)
    assert config.low_rank is None and config.validate_every == 1


def test_changes_of_low_rank_take_the_rate_from_scratch():
    low_rank = FinetuneSettings(low_rank=LowRank(rank=2))
    assert low_rank.for_frames(10).optimizer.learning_rate == 0.012
    assert FinetuneSettings().for_frames(10).optimizer.learning_rate == 0.004
    slower = dataclasses.replace(low_rank, learning_rate=0.001)
    assert slower.for_frames(10).optimizer.learning_rate == 0.001


def test_bad_settings_are_refused():
    for wrong in (-1, 0):
        with pytest.raises(ValueError, match="batch_size is"):
            FinetuneSettings(batch_size=wrong).for_frames(10)
        with pytest.raises(ValueError, match="epochs is"):
            FinetuneSettings(epochs=wrong).for_frames(10)
    with pytest.raises(ValueError, match="learning_rate"):
        FinetuneSettings(learning_rate=-1.0).for_frames(10)
