"""The training loop: epochs of steps, validation, best and last checkpoints, exact resumption."""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from equizoo.data.corruption import Corruptor
from equizoo.data.pipeline import (
    THREADS,
    LazyFrames,
    Packing,
    Reading,
    Share,
    sequential_batches,
    training_stream,
)
from equizoo.eval.metrics import MeanErrors, error_entries
from equizoo.graph import Budget, Frame, Graph, Labels
from equizoo.train.checkpoint import Checkpoints
from equizoo.train.config import LossWeights, TrainConfig
from equizoo.train.device_clock import DeviceClock
from equizoo.train.hosts import Termination, gathered, is_first
from equizoo.train.loss import ErrorSums, LossSums
from equizoo.train.memory import forecast, peak_memory, require_fit
from equizoo.train.optimizer import learning_rate_schedule, make_optimizer
from equizoo.train.parallel import (
    local_parts,
    make_mesh,
    of_one_device,
    replicated,
    shared,
)
from equizoo.train.parametrization import parametrization
from equizoo.train.progress import BOARDS, Board, LiveProgress, NoLog, RunLog
from equizoo.train.step import (
    StepReport,
    TrainState,
    init_state,
    make_train_step,
    make_validation_step,
)
from equizoo.zoo._base import Architecture, ArchitectureConfig, Remat

_MOST_SKIPPED = 20  # steps: in a row, or those of one structure
_NAMED = 5  # structures
_HOSTS = "hosts"  # of a checkpoint's items, one entry of each


@dataclasses.dataclass
class Progress:
    """What a run remembers beside its arrays, on each host; the checkpoint's ``meta``."""

    best: float = math.inf  # validation objective
    best_epoch: int = 0
    plateau_best: float = math.inf
    plateau_wait: int = 0
    scale: float = 1.0  # of the learning rate, lowered on plateaus
    loss_sum: float = 0.0  # over the steps of the current epoch that were not skipped
    loss_steps: int = 0  # their number
    error_sums: list[list[float]] = dataclasses.field(  # likewise, the rows of ErrorSums
        default_factory=lambda: np.zeros((len(ErrorSums._fields), 3)).tolist()
    )
    skipped_steps: int = 0  # loss or gradient not finite, in the whole run
    skipped_in_a_row: int = 0  # of them those since the last good step
    suspects: dict[str, int] = dataclasses.field(default_factory=dict)  # see _note_suspects
    nodes: int = 0  # in the batches of the current epoch, without padding
    edges: int = 0
    epochs: int = 0  # that have their row in the log, and their validation
    seconds: float = 0.0  # spent training, all sessions of the run together


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The result of :func:`fit`."""

    params: nnx.State  # the averaged ones of the best validation
    best_epoch: int
    epochs: int
    finished: bool  # False: stopped by SIGTERM, resume later
    seconds: float


def fit(
    model: Architecture,
    train: Sequence[Frame],
    valid: Sequence[Frame],
    packing: Packing,
    config: TrainConfig,
    folder: Path,
    title: str = "training",
    reading: Reading = THREADS,
    boards: Sequence[Board] = BOARDS,
) -> Fitted:
    """The model's parameters fitted to ``train``, chosen by the loss on ``valid``.

    Both may be :class:`LazyFrames`, of which a few batches are in memory at a time.

    ``folder`` receives checkpoints, ``metrics.jsonl`` and what ``boards`` write. A folder with a
    checkpoint in it is resumed: batches and losses that follow are those of an uninterrupted run,
    bit for bit on one device. SIGTERM, at any time, saves and returns with ``finished=False``.

    A step whose loss or gradient is not finite changes nothing. Raises ``FloatingPointError`` after
    more than twenty of them in a row, and, at the end of an epoch, for a structure that was in more
    than twenty of them and in no good step since.
    """
    _require_able(model, config)
    computing = model.with_kernels(config.kernels)
    share = Share(jax.process_index(), jax.process_count())
    steps_per_epoch = -(-len(train) // config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    params = nnx.state(model, nnx.Param)
    form = parametrization(params, config.low_rank, config.seed)
    parts = range(local_parts(config.microbatches))
    mesh = None if config.microbatches == 1 else make_mesh(config.microbatches)
    optimizer = make_optimizer(
        config.optimizer, form.start(params), total_steps, form.fixed, model.unit_kernels
    )
    schedule = learning_rate_schedule(config.optimizer, total_steps)
    validate = make_validation_step(computing, _stages(config)[-1], form)
    step_of = {
        weights: make_train_step(
            computing,
            optimizer,
            weights,
            config.optimizer.ema_decay,
            config.remat,
            _noise_weight(config, total_steps),
            form,
            mesh,
        )
        for weights in _stages(config)
    }

    with contextlib.ExitStack() as closing:
        termination = closing.enter_context(Termination())
        valid_batches = _ValidationBatches(valid, packing, reading, share)
        state = replicated(mesh, init_state(model, optimizer, form))
        corruptor = make_corruptor(model.config, config)
        stream = training_stream(
            train, packing, config.seed, corruptor, reading=reading, share=share
        )
        closing.callback(stream.close)
        progress = Progress()
        checkpoints = Checkpoints(folder / "checkpoints")
        closing.callback(checkpoints.close)
        if (restored := checkpoints.restore("last", state)) is not None:
            state, data, meta = restored
            stream.set_state(_own(data))
            progress = Progress(**_own(meta))
        step = first_step = int(state.step)
        if first_step < total_steps:
            weights = _loss_at(config, first_step / total_steps)
            step_of[weights] = _fitting(step_of[weights], state, stream, config, mesh, model.remats)
        # the row of an epoch whose validation is still to come is written anew
        logged = first_step - _epoch_is_due(first_step, steps_per_epoch, progress)
        log = RunLog(folder, logged, title, boards) if is_first() else NoLog()
        closing.callback(log.close)
        live = LiveProgress(total_steps, first_step, title, quiet=not is_first())
        closing.callback(live.close)
        clock = DeviceClock()
        closing.callback(clock.close)
        started = time.monotonic() - progress.seconds
        structures = 0

        def save(kind: str) -> None:
            progress.seconds = time.monotonic() - started
            data, meta = gathered(stream.get_state()), gathered(dataclasses.asdict(progress))
            checkpoints.save(kind, state, {_HOSTS: data}, {_HOSTS: meta})

        def end_epoch() -> bool:
            """Validates and writes the row; false, with nothing changed, when told to stop."""
            nonlocal structures
            _require_no_spoiler(progress)
            epoch = step // steps_per_epoch
            row = {
                "epoch": epoch,
                "step": step,
                "learning_rate": progress.scale * float(schedule(step)),
            }
            row |= _train_row(progress)
            row |= _padding(progress, packing.budget, steps_per_epoch * config.microbatches)
            clock.pause()
            sums = None
            if epoch % config.validate_every == 0 or step == total_steps:
                averages = of_one_device(state.ema)
                runs = (validate(averages, *batch) for batch in valid_batches)
                sums = _one_ahead(itertools.takewhile(lambda _: not termination.noted, runs))
                if termination.noted:
                    return False
            row |= clock.row(sum(gathered(structures)))
            structures = 0
            _begin_epoch(progress)
            progress.epochs = epoch
            if sums is not None:
                errors = _errors(_total([errors for errors, _ in sums], ErrorSums, 3))
                row |= _prefixed("valid", error_entries(errors))
                parts_of_loss = _total([terms for _, terms in sums], LossSums, 2)
                objective = _objective(parts_of_loss, _stages(config)[-1])
                row["valid_objective"] = objective
                _update_plateau(progress, objective, config)
                if objective < progress.best:
                    progress.best, progress.best_epoch = objective, epoch
                    save("best")
            row["seconds"] = round(time.monotonic() - started, 1)
            if (peak := peak_memory()) is not None:
                row["peak_memory_GB"] = round(peak / 1e9, 3)
            if sums is not None:
                live.report(row)
            log.write(row)
            return True

        stopping = termination.noted
        if not stopping and _epoch_is_due(step, steps_per_epoch, progress):
            stopping = not end_epoch()
        while (
            not stopping
            and step < total_steps
            and not _is_over(config, step, steps_per_epoch, progress)
        ):
            weights = _loss_at(config, step / total_steps)
            batches, frames = [], []
            for _ in parts:
                batches.append(next(stream))
                frames += stream.frames
            scale = replicated(mesh, np.float32(progress.scale))
            batch = _on_devices(batches, mesh)
            asked = time.monotonic()
            state, report = step_of[weights](state, *batch, scale)
            clock.step(asked, report)
            step += 1
            if step < total_steps:
                stream.peek()  # made while the device is busy
            _accumulate(progress, report, frames)
            structures += len(frames)
            live.advance(len(frames))
            due = _epoch_is_due(step, steps_per_epoch, progress)
            stopping = (due and not end_epoch()) or termination.after(step)
            if step % config.checkpoint_every == 0 or stopping:
                clock.pause()
                save("last")
        if not stopping:
            save("last")
        best = checkpoints.restore("best", state)
        finished = not stopping and not termination.noted
    trained = state.ema if best is None else best[0].ema
    return Fitted(
        params=form.weights(of_one_device(trained)),
        best_epoch=progress.best_epoch,
        epochs=step // steps_per_epoch,
        finished=finished,
        seconds=time.monotonic() - started,
    )


class _ValidationBatches:
    """This host's validation batches: on the device, or made anew each time for lazy frames."""

    def __init__(self, frames: Sequence[Frame], packing: Packing, reading: Reading, share: Share):
        self._frames, self._packing, self._reading = frames, packing, reading
        self._share = share
        self._held = None if isinstance(frames, LazyFrames) else list(self._made())

    def _made(self) -> Iterator[Any]:
        batches = sequential_batches(self._frames, self._packing, self._reading)
        for batch in itertools.islice(batches, self._share.host, None, self._share.hosts):
            yield jax.tree.map(jnp.asarray, batch[1:])

    def __iter__(self) -> Iterator[Any]:
        return self._made() if self._held is None else iter(self._held)


def _own(of_hosts: Mapping[str, Any]) -> Any:
    """This host's part of what a checkpoint says of each."""
    parts = of_hosts.get(_HOSTS, [of_hosts])  # as older versions wrote it, refused further on
    if len(parts) != jax.process_count():
        raise ValueError(
            f"The run to resume had {len(parts)} processes, now there are {jax.process_count()}. "
            f"Each has its own part of the data: resume with {len(parts)}, or begin a new run "
            "(finetune) from the saved weights."
        )
    return parts[jax.process_index()]


def _total(sums: Sequence[Any], kind: type, columns: int) -> np.ndarray:
    """Over the batches of all hosts, in float64, a row for every field of ``kind``."""
    nothing = np.zeros((len(kind._fields), columns))  # type: ignore[attr-defined]
    own = np.sum([nothing, *map(np.asarray, sums)], axis=0, dtype=np.float64)
    return np.sum(gathered(own.tolist()), axis=0)


def make_corruptor(model: ArchitectureConfig, config: TrainConfig) -> Corruptor | None:
    """What puts noise on frames of this model; ``None`` where a run has no denoising."""
    if config.auxiliary is None:
        return None
    return Corruptor(config.auxiliary.corruption, model.frame)


def _require_able(model: Architecture, config: TrainConfig) -> None:
    """Raises ``ValueError`` where the model lacks what a part of the run is to learn."""
    if not model.config.conservative and any(loss.stress > 0 for loss in _stages(config)):
        raise ValueError(
            "The stress has a weight in the loss, but a model with direct forces predicts none; "
            "set it to 0, or let the forces be the gradient of the energy."
        )
    if config.auxiliary is not None and not model.config.denoises:
        raise ValueError(
            f"The run is to denoise, but {type(model).__name__} as configured takes no forces and "
            "has no head for noise; set its config's force_input, or auxiliary to null."
        )


def _noise_weight(
    config: TrainConfig, total_steps: int
) -> Callable[[Int[Array, ""]], Float[Array, ""]] | None:
    auxiliary = config.auxiliary
    return None if auxiliary is None else lambda step: auxiliary.weight_at(step, total_steps)


def _on_devices(parts: Sequence[tuple[Graph, Labels]], mesh: Mesh | None) -> tuple[Graph, Labels]:
    if mesh is not None:
        return shared(mesh, parts)
    (batch,) = parts
    return replicated(mesh, batch)


def _fitting(
    step: Any,
    state: TrainState,
    stream: Any,
    config: TrainConfig,
    mesh: Mesh | None,
    remats: Collection[Remat],
) -> Any:
    """The step compiled for the one shape of all batches, once its memory is known to fit."""
    # of one shape, all of them
    batch = _on_devices([stream.peek()] * local_parts(config.microbatches), mesh)
    program = step.lower(state, *batch, replicated(mesh, np.float32(1.0))).compile()
    found = forecast(program, state, config.batch_size)
    if found is not None:
        require_fit(found, config.when_too_large, remats)
    return program


def _stages(config: TrainConfig) -> tuple[LossWeights, ...]:
    return (
        (config.loss,) if config.second_stage is None else (config.loss, config.second_stage.loss)
    )


def _loss_at(config: TrainConfig, fraction: float) -> LossWeights:
    stage = config.second_stage
    return config.loss if stage is None or fraction < stage.start else stage.loss


def _epoch_is_due(step: int, steps_per_epoch: int, progress: Progress) -> bool:
    """Whether an epoch is over that has no row in the log yet."""
    return step % steps_per_epoch == 0 and step // steps_per_epoch > progress.epochs


def _one_ahead(runs: Iterator[Any]) -> list[Any]:
    """Results on the host; the device has one more to do while each is waited for, and no more, so
    that a signal is heard between them."""
    found, running = [], None
    for run in runs:
        if running is not None:
            found.append(jax.device_get(running))
        running = run
    return found if running is None else [*found, jax.device_get(running)]


def _is_over(config: TrainConfig, step: int, steps_per_epoch: int, progress: Progress) -> bool:
    """Whether a validation found that the errors have not fallen for long enough."""
    epoch, within = divmod(step, steps_per_epoch)
    if config.early_stop is None or within or not epoch or epoch % config.validate_every:
        return False
    return epoch - progress.best_epoch >= config.early_stop


def _accumulate(progress: Progress, report: StepReport, frames: Sequence[Frame]) -> None:
    loss, norm, errors = jax.device_get((report.loss, report.gradient_norm, report.errors))
    finite = math.isfinite(loss) and math.isfinite(norm)
    progress.nodes += sum(frame.num_nodes for frame in frames)
    progress.edges += sum(frame.num_edges for frame in frames)
    _note_suspects(progress, frames, finite)
    if not finite:
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row > _MOST_SKIPPED:
            raise FloatingPointError(
                f"The loss was not finite for more than {_MOST_SKIPPED} steps in a row; the last "
                f"checkpoint is valid. {_suspicion(progress.suspects)}"
            )
        return
    progress.skipped_in_a_row = 0
    progress.loss_sum += float(loss)
    progress.loss_steps += 1
    progress.error_sums = np.add(progress.error_sums, errors, dtype=np.float64).tolist()


def _require_no_spoiler(progress: Progress) -> None:
    """Raises where a structure has failed too often, on all hosts if on one."""
    suspects: dict[str, int] = {}
    for of_host in gathered(progress.suspects):
        suspects |= {name: max(count, suspects.get(name, 0)) for name, count in of_host.items()}
    if max(suspects.values(), default=0) > _MOST_SKIPPED:
        raise FloatingPointError(
            f"The loss was not finite in {progress.skipped_steps} steps so far; the last "
            f"checkpoint is valid. {_suspicion(suspects)}"
        )


def _note_suspects(progress: Progress, frames: Sequence[Frame], finite: bool) -> None:
    """Counts the failed steps of every structure that has not been in a good one since."""
    for name in {frame.structure.name for frame in frames}:
        if finite:
            progress.suspects.pop(name, None)
        else:
            progress.suspects[name] = progress.suspects.get(name, 0) + 1


def _suspicion(suspects: Mapping[str, int]) -> str:
    most = max(suspects.values())
    chief = [name or "(unnamed)" for name, count in suspects.items() if count == most]
    if most > 1 and len(chief) <= _NAMED:
        return (
            f"It never was with {', '.join(chief)}, in {most} of them: look at its labels and "
            "distances with `equizoo doctor`, and leave it out."
        )
    return (
        f"No structure stands out, among them {', '.join(chief[:_NAMED])}: lower the learning "
        "rate, or look for outliers in the labels with `equizoo doctor`."
    )


def _begin_epoch(progress: Progress) -> None:
    fresh = Progress()
    for field in ("loss_sum", "loss_steps", "error_sums", "nodes", "edges"):
        setattr(progress, field, getattr(fresh, field))


def _padding(progress: Progress, budget: Budget, batches: int) -> dict[str, float]:
    """The empty shares of the room in an epoch's batches, of all hosts."""
    nodes, edges = np.sum(gathered([progress.nodes, progress.edges]), axis=0).tolist()
    return {
        "padding_nodes": 1 - nodes / (batches * budget.nodes),
        "padding_edges": 1 - edges / (batches * budget.edges),
    }


def _train_row(progress: Progress) -> dict[str, float | int]:
    row: dict[str, float | int] = {"skipped_steps": progress.skipped_steps}
    if progress.loss_steps:
        row = {"train_loss": progress.loss_sum / progress.loss_steps} | row
    return row | _prefixed("train", error_entries(_errors(progress.error_sums)))


def _errors(sums: Sequence[Sequence[float]] | np.ndarray) -> dict[str, MeanErrors]:
    """By quantity, from the rows of :class:`ErrorSums`."""
    rows = zip(ErrorSums._fields, np.asarray(sums).tolist(), strict=True)
    return {quantity: MeanErrors(*row) for quantity, row in rows}


def _prefixed(split: str, entries: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}_{key}": value for key, value in entries.items()}


def _objective(sums: np.ndarray, weights: LossWeights) -> float:
    """The loss over a data set, from the rows of :class:`LossSums`: what the best checkpoint
    minimises."""
    terms = zip(LossSums._fields, sums.tolist(), strict=True)
    means = {quantity: total / count for quantity, (total, count) in terms if count}
    return float(sum(getattr(weights, quantity) * mean for quantity, mean in means.items()))


def _update_plateau(progress: Progress, objective: float, config: TrainConfig) -> None:
    if config.optimizer.schedule != "plateau":
        return
    if objective < progress.plateau_best:
        progress.plateau_best, progress.plateau_wait = objective, 0
        return
    progress.plateau_wait += 1
    if progress.plateau_wait > config.optimizer.plateau_patience:
        progress.scale *= config.optimizer.plateau_factor
        progress.plateau_wait = 0
