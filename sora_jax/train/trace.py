"""A profile for xprof or TensorBoard, of steps named in the config or when a file asks for it."""

from pathlib import Path

import jax

from sora_jax.train.startup import tell

_STEPS = 3  # traced when the file `trace` asks


class Tracer:
    """Traces into workdir/profile.

    `touch WORKDIR/trace` during a run traces the next three steps; the file is then gone.

    Args:
      steps: first and last step to trace; () none.
    """

    def __init__(self, workdir: Path, steps=()):
        self._file, self._folder = Path(workdir) / "trace", Path(workdir) / "profile"
        self._first, self._last = steps or (0, -1)
        self._until: int | None = None

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    @property
    def asked(self) -> int:
        """1 where the file is there, for the first process to tell the others."""
        return int(jax.process_index() == 0 and self._file.exists())

    def before(self, step: int, *, asked: int) -> None:
        """Starts or stops in front of `step`.

        Args:
          asked: as all processes agreed on it.
        """
        if self._until is not None and step > self._until:
            self._stop()
        if self._until is not None:
            return
        if self._first <= step <= self._last:
            self._start(self._last)
        elif asked:
            if jax.process_index() == 0:
                self._file.unlink(missing_ok=True)
            self._start(step + _STEPS - 1)

    def _start(self, until: int) -> None:
        self._until = until
        jax.profiler.start_trace(str(self._folder))

    def _stop(self) -> None:
        if self._until is not None:
            self._until = None
            jax.profiler.stop_trace()
            tell(f"a trace is in {self._folder}; `xprof {self._folder}` shows it.")
