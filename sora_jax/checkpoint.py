"""Saves and restores any tree of arrays with Orbax, beside JSON for data position and config.

A step is written as `saving-120`. When Orbax is done with it, process 0 hashes all its files in
the background, adds the manifest and renames the folder to `120`: what has a number is complete.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from sora_jax import agreement, manifest
from sora_jax.background import Background

_LEFT_OVER = re.compile(r"saving-.*|removing-.*|.*\.orbax-checkpoint-tmp.*")


def flat(tree) -> dict[str, Any]:
    """Leaves by their path: independent of the container classes of optax and flax."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


class Checkpointer:
    """Training checkpoints under `directory`, one folder a step, written asynchronously.

    All processes of a run make the same calls; the folder is one that all of them see.

    Args:
      keep: newest steps kept.
      keep_every: steps that are multiples of it are kept for ever; 0 keeps none so.
      keep_best: so many of the lowest `loss` are kept as well.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep: int = 2,
        keep_every: int = 0,
        keep_best: int = 0,
    ):
        self._directory = epath.Path(directory).resolve()
        self._keep, self._keep_every, self._keep_best = keep, keep_every, keep_best
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                # Named here, so that shapes can be read before anything is restored.
                state=ocp.StandardCheckpointHandler(),
                data=ocp.JsonCheckpointHandler(),
                meta=ocp.JsonCheckpointHandler(),
            )
        )
        self._sound: set[int] = set()  # steps whose files were found as they were written
        self._background = Background("checkpoint")
        self._cleaned = False

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def all_steps(self) -> list[int]:
        """Complete steps, ascending; sound or not."""
        if not self._directory.exists():
            return []
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdigit())

    def latest_step(self) -> int | None:
        return max(self.all_steps(), default=None)

    def save(
        self, step: int, state, *, data: dict, meta: dict, loss: float | int | None = None
    ) -> None:
        """Starts to save `state`; `data` is the loader's position, `meta` anything in JSON.

        Args:
          loss: what `keep_best` goes by.
        """
        self.wait()
        if not self._cleaned and jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            for path in self._directory.iterdir():
                if _LEFT_OVER.fullmatch(path.name):  # of a process that was killed
                    path.rmtree()
        self._cleaned = True
        saving = self._directory / f"saving-{step}"
        self._orbax.save(
            saving,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(flat(state)),
                data=ocp.args.JsonSave(data),
                meta=ocp.args.JsonSave(meta),
            ),
        )
        note = {} if loss is None else {"loss": float(loss)}
        self._background.start(self._complete, step, note)

    def _complete(self, step: int, note: dict[str, float]) -> None:
        self._orbax.wait_until_finished()
        if jax.process_index() != 0:
            return
        saving = self._directory / f"saving-{step}"
        manifest.write(saving, note)
        saving.rename(self._directory / str(step))
        self._sound.add(step)
        self._prune()

    def _prune(self) -> None:
        """Removes the steps that nothing keeps."""
        steps = self.all_steps()
        kept = set(steps[-self._keep :])
        if self._keep_every:
            kept |= {step for step in steps if step % self._keep_every == 0}
        if self._keep_best:
            notes = {step: manifest.read_note(self._directory / str(step)) for step in steps}
            losses = {step: note["loss"] for step, note in notes.items() if "loss" in note}
            kept |= set(sorted(losses, key=losses.__getitem__)[: self._keep_best])
        for step in set(steps) - kept:
            # Renamed first, so that a step which is half removed is none.
            removing = self._directory / f"removing-{step}"
            (self._directory / str(step)).rename(removing)
            removing.rmtree()

    def newest_sound(self, *, set_aside: bool = False) -> int | None:
        """The newest step all of whose files are as they were written; None if there is no step.

        The processes share the reading, and all get the same answer. What older versions wrote
        has no checksums: it counts as sound, and the log says so.

        Args:
          set_aside: rename damaged steps, `120` to `damaged-120`; else they are only told of.

        Raises:
          ValueError: there are steps, and all are damaged.
        """
        found: list[str] = []
        for step in reversed(agreement.of_first(self.all_steps())):
            problems = self._damage(step)
            if not problems:
                return step
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            found.append(f"step {step}: {problems[0]}{more}")
            logging.warning("%s: %s; using the step before.", self._directory, found[-1])
            if set_aside:
                self._set_aside(step)
        if found:
            raise ValueError(
                f"{self._directory}: no sound checkpoint is left ({'; '.join(found)}); put a copy "
                "back, or use another workdir."
            )
        return None

    def _damage(self, step: int) -> Sequence[str]:
        if step in self._sound and jax.process_count() == 1:
            return []
        folder = self._directory / str(step)
        if not agreement.of_first(manifest.exists(folder)):
            logging.warning("%s: written without checksums; restored as it is.", folder)
            return []
        share = (jax.process_index(), jax.process_count())
        shares = agreement.gather(manifest.damage(folder, share=share))
        problems = [problem for found in shares for problem in found]
        if not problems:
            self._sound.add(step)
        return problems

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside, n = self._directory / f"damaged-{step}", 1
            while aside.exists():
                n += 1
                aside = self._directory / f"damaged-{step}-{n}"
            (self._directory / str(step)).rename(aside)
        agreement.gather(None)  # none looks before it is gone

    def restore(
        self, abstract, shardings=None, *, step: int | None = None
    ) -> tuple[Any, dict, dict]:
        """(state, data, meta) at `step`, or the newest that is sound; damaged ones are set aside.

        Args:
          abstract: tree of ShapeDtypeStructs, as `eval_shape` gives, with the paths and shapes
            of what was saved; its containers may be others.
          shardings: tree of shardings of the same structure; None restores to the default device.

        Raises:
          FileNotFoundError: there is no checkpoint, or not that one.
          ValueError: what was saved has other arrays or shapes, or is damaged.
        """
        self.wait()
        saved = self.all_steps()
        if not saved or (step is not None and step not in saved):
            found = f"steps {', '.join(map(str, saved))}" if saved else "none"
            what = "training checkpoint" if step is None else f"checkpoint of step {step}"
            raise FileNotFoundError(f"no {what} under {self._directory}; found: {found}.")
        if step is None:
            step = self.newest_sound(set_aside=True)
        elif problems := self._damage(step):
            raise ValueError(f"{self._directory / str(step)}: {problems[0]}; use another step.")
        wanted = flat(abstract)
        self._check_shapes(step, wanted)
        if shardings is not None:
            placed = flat(shardings)
            wanted = {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[path])
                for path, leaf in wanted.items()
            }
        restored = self._orbax.restore(
            self._directory / str(step),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(wanted),
                data=ocp.args.JsonRestore(),
                meta=ocp.args.JsonRestore(),
            ),
        )
        leaves = [restored["state"][path] for path in wanted]
        state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
        return state, restored["data"], restored["meta"]

    def read_meta(self, step: int | None = None) -> dict:
        """What was saved as `meta` with `step`, or with the newest that is sound.

        Raises:
          ValueError: there is no checkpoint, or none that is sound.
        """
        step = self.newest_sound() if step is None else step
        if step is None:
            raise ValueError(f"{self._directory}: no training checkpoint; train first.")
        return self._orbax.restore(
            self._directory / str(step), args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        )["meta"]

    def restore_part(self, abstract, *, under: str):
        """The branch `under` ("ema", say) of the newest sound state, and nothing else of it.

        Args:
          abstract: tree of ShapeDtypeStructs with the paths of that branch.
        """
        wanted = {f"{under}/{path}": leaf for path, leaf in flat(abstract).items()}
        restored = ocp.PyTreeCheckpointer().restore(
            self._directory / str(self.newest_sound()) / "state",
            args=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
        )
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored[path] for path in wanted])

    def _check_shapes(self, step: int, wanted_leaves: dict[str, Any]) -> None:
        """Orbax would refuse them too, with a page of text."""
        metadata = self._orbax.metadata(self._directory / str(step)).item_metadata["state"].tree
        saved = {path: tuple(leaf.shape) for path, leaf in metadata.items()}
        wanted = {path: tuple(leaf.shape) for path, leaf in wanted_leaves.items()}
        differ = [p for p in saved | wanted if saved.get(p) != wanted.get(p)]
        if differ:
            path = differ[0]
            raise ValueError(
                f"{self._directory / str(step)} holds {path} as {saved.get(path, 'nothing')}, the "
                f"config makes it {wanted.get(path, 'nothing')} ({len(differ)} arrays differ); "
                "resume with the config that was trained, or use another workdir."
            )

    def wait(self) -> None:
        """Returns when everything started is on disk, with its checksums.

        Raises:
          whatever stopped the writing.
        """
        self._background.wait()

    def close(self) -> None:
        """Waits, then ends the writing threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()
