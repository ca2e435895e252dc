"""The watchdog: stacks after the limit, the end after twice that, and patience at the beginning."""

import threading
import time

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


def test_beats_keep_it_quiet_and_what_compiles_has_four_times_as_long(tmp_path):
    file = tmp_path / "hang-0.txt"
    begun = time.monotonic()
    with Watchdog(10 * LIMIT / 60, file, exit=lambda code: None) as dog:
        for _ in range(20):
            time.sleep(LIMIT / 2)
            dog.beat()
        assert not file.exists() and time.monotonic() - begun > 10 * LIMIT / 2
    begun = time.monotonic()
    with Watchdog(LIMIT / 60, file, exit=lambda code: None):
        assert wait_for(file.exists)
    assert time.monotonic() - begun >= watchdog.PATIENCE * LIMIT


def test_nothing_is_watched_at_0_minutes(tmp_path):
    with Watchdog(0, tmp_path / "hang-0.txt") as dog:
        dog.beat()
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}
