"""How fast a recipe trains on this machine, against batch size, devices and reading processes."""

import csv
import dataclasses
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from equizoo.data.pipeline import Packing, Reading
from equizoo.eval.benchmark_timing import environment
from equizoo.eval.plots import throughput_plot
from equizoo.graph import Frame
from equizoo.train.config import TrainConfig
from equizoo.train.loop import fit
from equizoo.train.parallel import largest_share
from equizoo.train.progress import read_rows
from equizoo.train.recipe import Recipe, packed, prepare_data, untrained
from equizoo.zoo._base import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A short training run: its last epoch, compiled long before, validation left out."""

    recipe: str
    batch_size: int
    microbatches: int
    devices: int  # that share them
    workers: int  # processes that read ahead
    steps: int  # of the epoch measured
    structures_per_s: float
    idle_share: float  # of the devices' time, between steps
    padding_nodes: float
    padding_edges: float
    peak_memory_GB: float | None
    device: str
    cores: int
    python: str
    jax: str
    jaxlib: str
    equizoo: str
    commit: str


def benchmark_training(
    recipe: Recipe,
    folder: Path,
    batch_sizes: Sequence[int] = (),
    microbatches: Sequence[int] = (),
    workers: Sequence[int] = (0,),
    epochs: int = 3,
) -> Iterator[Row]:
    """Rows for all combinations, as they are measured; in the end ``train.csv`` and ``train.png``.

    Without ``batch_sizes`` and ``microbatches`` they are the recipe's. A combination runs for
    ``epochs`` epochs, the last of which counts. Raises ``ValueError`` when ``folder`` has results
    already, for fewer than two epochs, and for batches that cannot be cut into the microbatches.
    """
    file = folder / "train.csv"
    if file.exists():
        raise ValueError(f"{file} exists; remove it, or choose another folder.")
    if epochs < 2:
        raise ValueError(f"epochs is {epochs}, expected two or more: the first warms up.")
    training = dataclasses.replace(
        recipe.training, epochs=epochs, validate_every=epochs, checkpoint_every=10**9
    )
    # Before anything is measured: what cannot be.
    trainings = [
        dataclasses.replace(training, batch_size=batch_size, microbatches=parts)
        for batch_size, parts in itertools.product(
            batch_sizes or [training.batch_size], microbatches or [training.microbatches]
        )
    ]
    data = prepare_data(recipe.data)
    start = untrained(recipe, data)
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as table:
        writer = csv.DictWriter(
            table, [field.name for field in dataclasses.fields(Row)], lineterminator="\n"
        )
        writer.writeheader()
        for training in trainings:
            batches = packed(start, data, training)
            for processes in workers:
                row = _measured(recipe.name, start.model, batches, training, processes)
                rows.append(dataclasses.asdict(row))
                writer.writerow(rows[-1])
                table.flush()
                yield row
    throughput_plot(rows, folder / "train.png")


def _measured(
    recipe: str,
    model: Architecture,
    batches: tuple[Sequence[Frame], Sequence[Frame], Packing],
    training: TrainConfig,
    workers: int,
) -> Row:
    reading = Reading(workers=workers)
    with tempfile.TemporaryDirectory() as run:
        fit(model, *batches, training, Path(run), recipe, reading, boards=())
        last = read_rows(Path(run) / "metrics.jsonl")[-1]
    known = {field.name for field in dataclasses.fields(Row)}
    facts = {"peak_memory_GB": None} | last | environment()._asdict()
    return Row(
        **{name: value for name, value in facts.items() if name in known},
        recipe=recipe,
        batch_size=training.batch_size,
        microbatches=training.microbatches,
        devices=largest_share(training.microbatches, jax.device_count()),
        workers=workers,
        steps=last["step"] // training.epochs,
    )
