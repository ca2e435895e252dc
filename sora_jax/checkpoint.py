"""Saves and restores any tree of arrays with Orbax, beside JSON for data position and config."""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath


def _flat(tree) -> dict[str, Any]:
    """Leaves by their path: independent of the container classes of optax and flax."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


class Checkpointer:
    """Training checkpoints under `directory`, one folder a step, written asynchronously.

    Args:
      keep: newest steps kept.
    """

    def __init__(self, directory: str, *, keep: int = 2):
        self._directory = epath.Path(directory).resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state, *, data: dict, meta: dict) -> None:
        """Starts to save `state`; `data` is the loader's position, `meta` anything in JSON."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_flat(state)),
                data=ocp.args.JsonSave(data),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def restore(self, abstract, shardings=None, *, step: int | None = None) -> tuple[Any, dict, dict]:
        """(state, data, meta) at `step`, or the newest.

        Args:
          abstract: tree of ShapeDtypeStructs, as `eval_shape` gives; may be a part of what was
            saved only if its paths are the same.
          shardings: tree of shardings of the same structure; None restores to the default device.

        Raises:
          FileNotFoundError: there is no checkpoint.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise FileNotFoundError(f"no training checkpoint under {self._directory}.")
        flat = _flat(abstract)
        if shardings is not None:
            placed = _flat(shardings)
            flat = {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[path])
                for path, leaf in flat.items()
            }
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(flat),
                data=ocp.args.JsonRestore(),
                meta=ocp.args.JsonRestore(),
            ),
        )
        leaves = [restored["state"][path] for path in flat]
        state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
        return state, restored["data"], restored["meta"]

    def wait(self) -> None:
        """Returns when everything started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
