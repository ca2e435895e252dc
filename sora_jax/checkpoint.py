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

    def __init__(self, directory: epath.PathLike, *, keep: int = 2):
        self._directory = epath.Path(directory).resolve()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            # Named here, so that shapes can be read before anything is restored.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

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

    def restore(
        self, abstract, shardings=None, *, step: int | None = None
    ) -> tuple[Any, dict, dict]:
        """(state, data, meta) at `step`, or the newest.

        Args:
          abstract: tree of ShapeDtypeStructs, as `eval_shape` gives, with the paths and shapes
            of what was saved; its containers may be others.
          shardings: tree of shardings of the same structure; None restores to the default device.

        Raises:
          FileNotFoundError: there is no checkpoint, or not that one.
          ValueError: what was saved has other arrays or shapes.
        """
        self.wait()
        saved = self._manager.all_steps()
        if not saved or (step is not None and step not in saved):
            found = f"steps {', '.join(map(str, saved))}" if saved else "none"
            wanted = "training checkpoint" if step is None else f"checkpoint of step {step}"
            raise FileNotFoundError(f"no {wanted} under {self._directory}; found: {found}.")
        step = self.latest_step() if step is None else step
        flat = _flat(abstract)
        self._check_shapes(step, flat)
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

    def read_meta(self) -> dict:
        """What was saved as `meta` with the newest step.

        Raises:
          ValueError: there is no checkpoint.
        """
        step = self.latest_step()
        if step is None:
            raise ValueError(f"{self._directory}: no training checkpoint; train first.")
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
            "meta"
        ]

    def restore_part(self, abstract, *, under: str):
        """The branch `under` ("ema", say) of the newest state, and nothing else of it.

        Args:
          abstract: tree of ShapeDtypeStructs with the paths of that branch.
        """
        flat = {f"{under}/{path}": leaf for path, leaf in _flat(abstract).items()}
        restored = ocp.PyTreeCheckpointer().restore(
            self._directory / str(self.latest_step()) / "state",
            args=ocp.args.PyTreeRestore(
                item=flat,
                restore_args=ocp.checkpoint_utils.construct_restore_args(flat),
                partial_restore=True,
            ),
        )
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored[path] for path in flat])

    def _check_shapes(self, step: int, flat: dict[str, Any]) -> None:
        """Orbax would refuse them too, with a page of text."""
        metadata = self._manager.item_metadata(step)["state"].tree
        saved = {path: tuple(leaf.shape) for path, leaf in metadata.items()}
        wanted = {path: tuple(leaf.shape) for path, leaf in flat.items()}
        differ = [p for p in saved | wanted if saved.get(p) != wanted.get(p)]
        if differ:
            path = differ[0]
            raise ValueError(
                f"{self._directory / str(step)} holds {path} as {saved.get(path, 'nothing')}, the "
                f"config makes it {wanted.get(path, 'nothing')} ({len(differ)} arrays differ); "
                "resume with the config that was trained, or use another workdir."
            )

    def wait(self) -> None:
        """Returns when everything started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the writing threads."""
        self._manager.close()
