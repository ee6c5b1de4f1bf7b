"""The training loop: epochs of steps, validation, best and last checkpoints, exact resumption."""

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from equizoo.data.corruption import Corruptor
from equizoo.data.pipeline import Packing, sequential_batches, training_stream
from equizoo.eval.metrics import MeanErrors, error_entries
from equizoo.graph import Frame, Graph, Labels
from equizoo.train.checkpoint import Checkpoints
from equizoo.train.config import LossWeights, TrainConfig
from equizoo.train.loss import ErrorSums
from equizoo.train.memory import forecast, require_fit
from equizoo.train.optimizer import learning_rate_schedule, make_optimizer
from equizoo.train.parallel import make_mesh, replicated, shared
from equizoo.train.parametrization import parametrization
from equizoo.train.progress import LiveProgress, RunLog
from equizoo.train.step import TrainState, init_state, make_train_step, make_validation_step
from equizoo.zoo._base import Architecture, ArchitectureConfig


@dataclasses.dataclass
class Progress:
    """What a run remembers beside its arrays; saved as the checkpoint's ``meta``."""

    best: float = math.inf  # validation objective
    best_epoch: int = 0
    plateau_best: float = math.inf
    plateau_wait: int = 0
    scale: float = 1.0  # of the learning rate, lowered on plateaus
    loss_sum: float = 0.0  # over the steps of the current epoch
    error_sums: list[list[float]] = dataclasses.field(  # likewise, the rows of ErrorSums
        default_factory=lambda: np.zeros((len(ErrorSums._fields), 3)).tolist()
    )
    skipped_steps: int = 0  # loss or gradient not finite
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
) -> Fitted:
    """The model's parameters fitted to ``train``, chosen by the loss on ``valid``.

    ``folder`` receives checkpoints, ``metrics.jsonl`` and TensorBoard files. A folder with a
    checkpoint in it is resumed: batches and losses that follow are those of an uninterrupted run,
    bit for bit on one device. SIGTERM saves and returns with ``finished=False``.
    """
    _require_denoises(model, config)
    steps_per_epoch = -(-len(train) // config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    params = nnx.state(model, nnx.Param)
    form = parametrization(params, config.low_rank, config.seed)
    mesh = None if config.microbatches == 1 else make_mesh(config.microbatches)
    optimizer = make_optimizer(config.optimizer, form.start(params), total_steps, form.fixed)
    schedule = learning_rate_schedule(config.optimizer, total_steps)
    validate = make_validation_step(model, form)
    step_of = {
        weights: make_train_step(
            model,
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
    valid_batches = [
        jax.tree.map(jnp.asarray, batch[1:]) for batch in sequential_batches(valid, packing)
    ]

    state = init_state(model, optimizer, form)
    stream = training_stream(train, packing, config.seed, make_corruptor(model.config, config))
    progress = Progress()
    checkpoints = Checkpoints(folder / "checkpoints")
    if (restored := checkpoints.restore("last", state)) is not None:
        state, data, meta = restored
        stream.set_state(data)
        meta.pop("step")
        progress = Progress(**meta)
    state = state if mesh is None else replicated(mesh, state)
    first_step = int(state.step)
    if first_step < total_steps:
        weights = _loss_at(config, first_step / total_steps)
        step_of[weights] = _fitting(step_of[weights], state, stream, config, mesh)
    log = RunLog(folder, first_step)
    live = LiveProgress(total_steps, first_step, title)
    started = time.monotonic() - progress.seconds

    def save(kind: str) -> None:
        progress.seconds = time.monotonic() - started
        checkpoints.save(kind, state, stream.get_state(), dataclasses.asdict(progress))

    finished = True
    step = first_step
    try:
        with _TerminationSignal() as termination:
            while step < total_steps:
                weights = _loss_at(config, step / total_steps)
                graph, labels = _next_batch(stream, config.microbatches, mesh)
                scale = jnp.asarray(progress.scale, jnp.float32)
                state, report = step_of[weights](state, graph, labels, scale)
                step += 1
                _accumulate(progress, report)
                live.advance()
                if step % steps_per_epoch == 0:
                    epoch = step // steps_per_epoch
                    row = {
                        "epoch": epoch,
                        "step": step,
                        "learning_rate": progress.scale * float(schedule(step)),
                    }
                    row |= _train_row(progress, steps_per_epoch)
                    progress.loss_sum, progress.error_sums = 0.0, Progress().error_sums
                    if epoch % config.validate_every == 0 or step == total_steps:
                        sums = [validate(state.ema, *batch) for batch in valid_batches]
                        errors = _errors(np.sum(jax.device_get(sums), axis=0, dtype=np.float64))
                        row |= _prefixed("valid", error_entries(errors))
                        objective = _objective(errors, _stages(config)[-1])
                        row["valid_objective"] = objective
                        _update_plateau(progress, objective, config)
                        if objective < progress.best:
                            progress.best, progress.best_epoch = objective, epoch
                            save("best")
                        live.report(row)
                    row["seconds"] = round(time.monotonic() - started, 1)
                    log.write(row)
                    if config.early_stop and epoch - progress.best_epoch >= config.early_stop:
                        break
                if step % config.checkpoint_every == 0 or termination.received:
                    save("last")
                if termination.received:
                    finished = False
                    break
            if finished:
                save("last")
        best = checkpoints.restore("best", state)
    finally:
        live.close()
        log.close()
        checkpoints.close()
    trained = state.ema if best is None else best[0].ema
    return Fitted(
        params=form.weights(trained),
        best_epoch=progress.best_epoch,
        epochs=step // steps_per_epoch,
        finished=finished,
        seconds=time.monotonic() - started,
    )


def make_corruptor(model: ArchitectureConfig, config: TrainConfig) -> Corruptor | None:
    """What puts noise on frames of this model; ``None`` where a run has no denoising."""
    if config.auxiliary is None:
        return None
    return Corruptor(config.auxiliary.corruption, model.frame)


def _require_denoises(model: Architecture, config: TrainConfig) -> None:
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


def _next_batch(stream: Any, parts: int, mesh: Mesh | None) -> tuple[Graph, Labels]:
    if mesh is None:
        return jax.tree.map(jnp.asarray, next(stream))
    return shared(mesh, [next(stream) for _ in range(parts)])


def _fitting(
    step: Any, state: TrainState, stream: Any, config: TrainConfig, mesh: Mesh | None
) -> Any:
    """The step compiled for the one shape of all batches, once its memory is known to fit."""
    position = stream.get_state()
    batch = _next_batch(stream, config.microbatches, mesh)
    stream.set_state(position)
    program = step.lower(state, *batch, jnp.asarray(1.0, jnp.float32)).compile()
    found = forecast(program, state, config.batch_size)
    if found is not None:
        require_fit(found, config.when_too_large)
    return program


def _stages(config: TrainConfig) -> tuple[LossWeights, ...]:
    return (
        (config.loss,) if config.second_stage is None else (config.loss, config.second_stage.loss)
    )


def _loss_at(config: TrainConfig, fraction: float) -> LossWeights:
    stage = config.second_stage
    return config.loss if stage is None or fraction < stage.start else stage.loss


def _accumulate(progress: Progress, report: Any) -> None:
    loss, errors = jax.device_get((report.loss, report.errors))
    if not math.isfinite(loss):
        progress.skipped_steps += 1
        if progress.skipped_steps > 20:
            raise FloatingPointError(
                "The loss was not finite for more than 20 steps; the last checkpoint is valid. "
                "Lower the learning rate, or look for outliers in the labels."
            )
        return
    progress.loss_sum += float(loss)
    progress.error_sums = np.add(progress.error_sums, errors, dtype=np.float64).tolist()


def _train_row(progress: Progress, steps: int) -> dict[str, float]:
    row = {"train_loss": progress.loss_sum / steps, "skipped_steps": progress.skipped_steps}
    return row | _prefixed("train", error_entries(_errors(progress.error_sums)))


def _errors(sums: Sequence[Sequence[float]] | np.ndarray) -> dict[str, MeanErrors]:
    """By quantity, from the rows of :class:`ErrorSums`."""
    rows = zip(ErrorSums._fields, np.asarray(sums).tolist(), strict=True)
    return {quantity: MeanErrors(*row) for quantity, row in rows}


def _prefixed(split: str, entries: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}_{key}": value for key, value in entries.items()}


def _objective(errors: Mapping[str, MeanErrors], weights: LossWeights) -> float:
    """The weighted mean squared errors over a data set: what the best checkpoint minimises."""
    terms = (
        (weights.energy, errors["energy_per_atom"]),
        (weights.forces, errors["forces"]),
        (weights.stress, errors["stress"]),
    )
    return float(sum(weight * e.squares / e.count for weight, e in terms if e.count))


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


class _TerminationSignal:
    """Notes a SIGTERM instead of dying of it, so that the step in progress can be saved."""

    received = False

    def __enter__(self) -> "_TerminationSignal":
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_: Any) -> None:
        self.received = True

    def __exit__(self, *_: Any) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._previous)
