"""The watchdog: stacks after the limit, the end after twice that, and patience at the beginning."""

import threading
import time
import types

from sora_jax.train import watchdog
from sora_jax.train.watchdog import Watchdog

LIMIT = 0.2  # seconds


def stuck(release):
    release.wait(30)


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def test_a_hang_dumps_the_stacks_of_all_threads_and_then_ends_with_the_restart_status(
    tmp_path, capfd
):
    codes, release = [], threading.Event()
    thread = threading.Thread(target=stuck, args=(release,))
    thread.start()
    file = tmp_path / "hang-0.txt"
    with Watchdog(LIMIT / 60, file, exit=codes.append) as dog:
        dog.beat()
        assert wait_for(lambda: codes)
    release.set()
    thread.join()
    assert codes == [75]
    assert "in stuck" in file.read_text() and "no step for" in file.read_text()
    assert "exit with status 75" in capfd.readouterr().err


def test_beats_keep_it_quiet_and_what_compiles_has_four_times_as_long(tmp_path, monkeypatch):
    file, now = tmp_path / "hang-0.txt", [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], ctime=time.ctime)
    with monkeypatch.context() as patch:
        patch.setattr(watchdog, "time", clock)
        with Watchdog(LIMIT / 60, file, exit=lambda code: None) as dog:
            for _ in range(20):
                now[0] += 0.9 * LIMIT
                dog.beat()
                time.sleep(LIMIT / 5)  # it looks every tenth
        assert not file.exists() and now[0] > 2 * watchdog.PATIENCE * LIMIT
    begun = time.monotonic()
    with Watchdog(LIMIT / 60, file, exit=lambda code: None):
        assert wait_for(file.exists)
    assert time.monotonic() - begun >= watchdog.PATIENCE * LIMIT


def test_nothing_is_watched_at_0_minutes(tmp_path):
    with Watchdog(0, tmp_path / "hang-0.txt") as dog:
        dog.beat()
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}
