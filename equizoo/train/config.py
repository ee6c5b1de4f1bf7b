"""Everything a training run is told, as frozen dataclasses: the schema of recipes."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Literal

from equizoo.graph import ForcesOn
from equizoo.train.denoising import Denoising
from equizoo.train.parametrization import LowRank
from equizoo.zoo._base import Kernels, Remat


class Errors(enum.StrEnum):
    """What the loss is a mean of.

    ``squares``: of errors of energies per atom and of components of forces and stress. ``norms``:
    the absolute error of a structure's energy, and the lengths of errors of forces and stress, as
    published Equiformers and models of OC20 are trained.
    """

    SQUARES = "squares"
    NORMS = "norms"


class WhenTooLarge(enum.StrEnum):
    """What to do before the first step when the memory forecast says that it will not fit."""

    REFUSE = "refuse"
    WARN = "warn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the mean errors: squares (or Huber's function), or norms."""

    energy: float = 1.0  # of (eV/atom)^2; of norms: of eV
    forces: float = 10.0  # of (eV/Å)^2; of norms: of eV/Å
    stress: float = 0.0  # of (eV/Å^3)^2; of norms: of eV/Å^3
    errors: Errors = Errors.SQUARES
    huber_delta: float | None = None  # errors above are penalised linearly; None: squares
    forces_on: ForcesOn = ForcesOn.ALL  # atoms; OC20 and OC22 are trained on the free ones

    def __post_init__(self):
        if min(self.energy, self.forces, self.stress) < 0 or (
            self.energy == self.forces == self.stress == 0
        ):
            raise ValueError("Loss weights must not be negative, and one must be positive.")
        if self.huber_delta is not None and not self.huber_delta > 0:
            raise ValueError(f"huber_delta is {self.huber_delta}, expected positive or null.")
        if self.huber_delta is not None and self.errors == Errors.NORMS:
            raise ValueError("huber_delta is for errors='squares'; leave it out with norms.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecondStage:
    """A last part of the run with other weights, usually more on energies."""

    start: float  # fraction of the epochs after which it begins
    loss: LossWeights

    def __post_init__(self):
        if not 0 < self.start < 1:
            raise ValueError(f"The second stage starts at {self.start}, expected within (0, 1).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Adam in one of its forms, its schedule, and what is averaged, decayed, clipped, frozen.

    ``muon`` orthogonalises the momentum of the matrices of linear layers (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon), scaled by the root of their outputs (the spectral
    condition of Yang et al. 2023, arXiv:2310.17813, where weights have unit variance), and is Adam
    for everything else.
    """

    kind: Literal["adamw", "amsgrad", "muon"] = "amsgrad"
    learning_rate: float = 0.01
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    warmup_steps: int = 100
    final_learning_rate: float = 1e-4  # as a fraction of learning_rate, end of the cosine
    plateau_factor: float = 0.8
    plateau_patience: int = 50  # validations without improvement
    weight_decay: float = 5e-7
    decayed: tuple[str, ...] = ("*.linear.*", "*.product_weights")  # parameter path patterns
    frozen: tuple[str, ...] = ()  # parameter path patterns that do not move
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)  # factors by path pattern
    clip_norm: float = 10.0
    ema_decay: float = 0.99

    def __post_init__(self):
        if not self.learning_rate > 0 or not self.clip_norm > 0:
            raise ValueError(
                f"learning_rate ({self.learning_rate}) and clip_norm ({self.clip_norm}) must be "
                "positive."
            )
        if wrong := {pattern: rate for pattern, rate in self.rates.items() if not rate > 0}:
            raise ValueError(f"rates are {wrong}, expected positive; to keep weights: frozen.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, expected within [0, 1).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run, apart from the architecture."""

    epochs: int
    batch_size: int = 5  # structures of mean size
    microbatches: int = 1  # parts of a batch: shared between devices, else one after the other
    loss: LossWeights = LossWeights()
    second_stage: SecondStage | None = None
    auxiliary: Denoising | None = None
    optimizer: Optimizer = Optimizer()
    low_rank: LowRank | None = None  # None: weights move as they are
    seed: int = 0
    validate_every: int = 1  # epochs
    checkpoint_every: int = 200  # steps
    early_stop: int | None = None  # epochs without improvement, asked at validations
    remat: Remat = Remat.NONE  # what is computed again for derivatives, to save memory
    kernels: Kernels = Kernels.XLA  # of sums over neighbours
    when_too_large: WhenTooLarge = WhenTooLarge.REFUSE

    def __post_init__(self):
        stage = self.second_stage
        if stage is not None and stage.loss.forces_on != self.loss.forces_on:
            raise ValueError(
                f"The second stage has forces on {stage.loss.forces_on.value} atoms, the first on "
                f"{self.loss.forces_on.value}; expected the same, since labels are made once."
            )
        counts = ("epochs", "batch_size", "microbatches", "validate_every", "checkpoint_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1.")
        if self.early_stop is not None and self.early_stop < 1:
            raise ValueError(f"early_stop is {self.early_stop}, expected at least 1, or null.")
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"batch_size is {self.batch_size}, which {self.microbatches} microbatches cannot "
                "share equally; expected a multiple."
            )
