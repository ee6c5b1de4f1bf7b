"""How a fine-tuning run trains: settings of its own, or those that suit the number of frames."""

import dataclasses

from equizoo.train.config import LossWeights, Optimizer, TrainConfig
from equizoo.train.parametrization import LowRank

FEWEST_STEPS = 400
FEWEST_EPOCHS = 40
VALIDATIONS = 20  # about; at most one in an epoch


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """What a fine-tuning run is told; what is ``None`` follows from the rest.

    Muon, by default at a third of the rate from scratch, or at that rate for changes of low rank,
    which start from zero; at least 40 passes over the frames and at least 400 steps. The evidence
    is in docs/fine-tuning.md. For anything else write a :class:`TrainConfig`, perhaps with
    ``dataclasses.replace`` of what :meth:`for_frames` gives.
    """

    epochs: int | None = None
    learning_rate: float | None = None
    batch_size: int = 5  # structures of mean size
    microbatches: int = 1
    stress_weight: float = 0.0  # of (eV/Å^3)^2, where (eV/atom)^2 have 100 and (eV/Å)^2 10
    frozen: tuple[str, ...] = ()  # parameter path patterns that do not move
    low_rank: LowRank | None = None  # None: weights move as they are
    seed: int = 0

    def for_frames(self, frames: int) -> TrainConfig:
        """The run on this many frames.

        Raises ``ValueError`` as :class:`TrainConfig` and :class:`Optimizer` do.
        """
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1.")
        steps = max(1, -(-frames // self.batch_size))  # in an epoch
        epochs, rate = self.epochs, self.learning_rate
        if epochs is None:
            epochs = max(FEWEST_EPOCHS, -(-FEWEST_STEPS // steps))
        if rate is None:
            rate = 4e-3 if self.low_rank is None else 0.012
        return TrainConfig(
            epochs=epochs,
            batch_size=self.batch_size,
            microbatches=self.microbatches,
            loss=LossWeights(energy=100.0, forces=10.0, stress=self.stress_weight),
            optimizer=Optimizer(
                kind="muon",
                learning_rate=rate,
                ema_decay=0.99,
                warmup_steps=20,
                frozen=self.frozen,
            ),
            low_rank=self.low_rank,
            seed=self.seed,
            validate_every=max(1, epochs // VALIDATIONS),
        )


SUITED_TO_DATA = FinetuneSettings()
