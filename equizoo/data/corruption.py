"""Structures with noise on some atoms, for models that learn to take it away.

Reference: Liao et al. 2024 (DeNS), https://arxiv.org/abs/2403.09549, section 3.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from equizoo.graph import Frame, Noise
from equizoo.structure import Structure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corruption:
    """Which batches are corrupted, which of their atoms, and how far.

    A coin decides for a whole batch. Of its structures, each free atom is displaced with
    probability ``fraction`` by normal noise. Its standard deviation is one of ``noise``, drawn for
    each structure; targets are displacements over the largest of them.
    """

    probability: float  # of a batch
    fraction: float  # of atoms that are not held fixed (``info["fixed"]``)
    noise: tuple[float, ...]  # [Å] standard deviations
    spared: str | None = None  # structures whose ``info`` is true here are left as they are

    def __post_init__(self):
        for field in ("probability", "fraction"):
            if not 0 < getattr(self, field) <= 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected within (0, 1].")
        if not self.noise or not min(self.noise) > 0:
            raise ValueError(
                f"noise is {self.noise}, expected one or more standard deviations in Å, all "
                "positive."
            )

    def displaced(self, structure: Structure, rng: np.random.Generator) -> tuple[Structure, Noise]:
        """The structure with its noise; forces and energy stay those of before.

        Its stress goes, since it is no function of what the model sees. A structure that is spared
        or has no forces comes back as it is, with noise on no atom.
        """
        level = self.noise[rng.integers(len(self.noise))]
        mask = (rng.random(structure.num_nodes) < self.fraction) & self._free(structure)
        noise = np.where(mask[:, None], rng.normal(0, level, (structure.num_nodes, 3)), 0.0)
        if mask.any():
            structure = dataclasses.replace(
                structure, positions=structure.positions + noise, stress=None
            )
        return structure, Noise(noise / max(self.noise), mask)

    def _free(self, structure: Structure) -> Bool[np.ndarray, " nodes"]:
        spared = self.spared is not None and bool(structure.info.get(self.spared, False))
        if spared or structure.forces is None:
            return np.zeros(structure.num_nodes, bool)
        return structure.free


def log_spaced(low: float, high: float, count: int) -> tuple[float, ...]:
    """Standard deviations [Å] from ``low`` to ``high``, each the same factor times the one before.

    The multi-scale noise of the paper is ``log_spaced(0.01, 0.5, 50)``.
    """
    return tuple(np.geomspace(low, high, count).tolist())


class Corruptor(NamedTuple):
    """A corruption and how frames are made of structures: neighbours are those of moved atoms."""

    corruption: Corruption
    frame: Callable[[Structure], Frame]

    def heads(self, seed: int) -> bool:
        """Whether a batch whose first frame has drawn this number is corrupted."""
        return np.random.default_rng((seed, 0)).random() < self.corruption.probability

    def corrupted(self, frame: Frame, seed: int, attempt: int = 0) -> Frame:
        """The frame with noise, the same for the same numbers."""
        rng = np.random.default_rng((seed, 1, attempt))
        structure, noise = self.corruption.displaced(frame.structure, rng)
        if not noise.mask.any():
            return untouched(frame)
        return self.frame(structure)._replace(head=frame.head, noise=noise)


def untouched(frame: Frame) -> Frame:
    """The frame with noise on no atom."""
    nothing = Noise(np.zeros((frame.num_nodes, 3)), np.zeros(frame.num_nodes, bool))
    return frame._replace(noise=nothing)
