"""Work beside the training loop, one piece at a time."""

import threading
from collections.abc import Callable
from typing import Any


class Background:
    """Runs a function in a thread; what stops it is raised by the next `wait`."""

    def __init__(self, name: str):
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Starts `function`, once what was started before has ended."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(function, args), name=self._name)
        self._thread.start()

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            function(*args)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Returns when what was started has ended; raises what stopped it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
