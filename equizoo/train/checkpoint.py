"""Training state on disk by Orbax: separate items, committed atomically, restored exactly."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from equizoo.train.step import TrainState

ITEMS = ("params", "ema", "optimizer", "data", "meta")


class Checkpoints:
    """The checkpoints of one run: the newest two under ``last``, the best one under ``best``."""

    def __init__(self, folder: Path):
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._managers = {
            kind: ocp.CheckpointManager(
                (folder / kind).absolute(),
                item_names=ITEMS,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                    enable_async_checkpointing=False,
                    cleanup_tmp_directories=True,
                ),
            )
            for kind, keep in (("last", 2), ("best", 1))
        }

    def save(
        self, kind: str, state: TrainState, data: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        """Writes one checkpoint, whole or not at all; an existing one of this step is kept.

        Raises ``OSError`` where it cannot be written; earlier ones are as they were.
        """
        manager, step = self._managers[kind], int(state.step)
        if step in manager.all_steps():
            return
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            ema=ocp.args.StandardSave(state.ema),
            optimizer=ocp.args.StandardSave(state.optimizer),
            data=ocp.args.JsonSave(data),
            meta=ocp.args.JsonSave(meta | {"step": step}),
        )
        before = manager.latest_step()
        try:
            manager.save(step, args=args, force=True)
            manager.wait_until_finished()
        except (OSError, ValueError) as error:  # the latter from Orbax's own writer
            kept = (
                "there is none before it" if before is None else f"that of step {before} is valid"
            )
            raise OSError(
                f"The checkpoint of step {step} cannot be written to {manager.directory}, {kept}: "
                f"{error}. Make room, or make the folder writable, and resume."
            ) from error

    def restore(
        self, kind: str, like: TrainState
    ) -> tuple[TrainState, dict[str, Any], dict[str, Any]] | None:
        """The newest checkpoint of a kind in the shapes of ``like``; ``None`` if there is none."""
        manager = self._managers[kind]
        step = manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                ema=ocp.args.StandardRestore(abstract.ema),
                optimizer=ocp.args.StandardRestore(abstract.optimizer),
                data=ocp.args.JsonRestore(),
                meta=ocp.args.JsonRestore(),
            ),
        )
        counter = np.asarray(restored.meta["step"], like.step.dtype)
        counter = jax.make_array_from_process_local_data(like.step.sharding, counter)
        state = TrainState(restored.params, restored.ema, restored.optimizer, counter)
        return state, restored.data, restored.meta

    def close(self) -> None:
        for manager in self._managers.values():
            manager.close()
