"""Two processes: flags, checkpoints from both, one decision about damage, local copies, a kill."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAST = str(float(64 * 63 // 2 * 2**12))  # a step doubles the sum, and every one is exact
# A run in small: a step adds what all devices hold, and saves as the loop does.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from sora_jax import agreement, sharding
from sora_jax.checkpoint import Checkpointer
from sora_jax.train import startup
from sora_jax.train.interrupts import Interrupts
from sora_jax.train.local_checkpoint import LocalCheckpointer

workdir, mode = Path(sys.argv[1]), sys.argv[2]
sharding.join_processes()
me = jax.process_index()
startup.log_apart(workdir)
mesh = sharding.make_mesh(fsdp=4)
where = {"x": sharding.named(mesh, "embed"), "step": sharding.named(mesh)}
init = jax.jit(lambda: {"x": jnp.arange(64.0), "step": jnp.int32(0)}, out_shardings=where)
shapes = jax.eval_shape(init)
step = jax.jit(
    lambda s: {"x": s["x"] + jnp.sum(s["x"]) / 64, "step": s["step"] + 1},
    donate_argnums=0, out_shardings=where,
)
local = LocalCheckpointer(workdir / f"disk-{me}", run=startup.run_id(workdir))
with Checkpointer(workdir / "checkpoints") as shared, Interrupts() as signals:
    newest = shared.newest_sound(set_aside=True)
    near = local.newest(shapes, where, above=-1 if newest is None else newest)
    if near is not None:
        state = local.restore(near, shapes, where)[0]
    elif newest is not None:
        state = shared.restore(shapes, where, step=newest)[0]
    else:
        state = init()
    begun, flags, stop = int(state["step"]), agreement.Flags(mesh, 1), 0
    for n in range(begun + 1, 13):
        state = step(state)
        (stop,) = flags.exchange(signals.requested)
        if n % 4 == 0 or stop:
            shared.save(n, state, data={}, meta={})
        else:
            local.save(n, state, data={}, meta={})
        if stop:
            break
        if mode == "signal" and me == 1 and n == 6:
            signal.raise_signal(signal.SIGTERM)
        if mode == "kill" and n == 7:
            local.wait()
            shared.wait()
            agreement.gather(None)  # both have written
            if me == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
    shared.wait()
print(me, begun, n, stop, float(jnp.sum(state["x"])), flush=True)
"""


def run(workdir: Path, mode: str = "", *, count: int = 2) -> list[tuple[int, str, str]]:
    """(exit status, standard output, errors) of each; the first to fail ends the others."""
    processes = start([["-c", PROGRAM, str(workdir), mode]] * count, devices=4 // count)
    until = time.monotonic() + 300
    while time.monotonic() < until and any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            break
        time.sleep(0.05)
    for process in processes:
        process.kill()
    return [(p.returncode, *map(str, ends)) for p in processes for ends in [p.communicate()]]


def start(programs: list[list[str]], devices: int = 1) -> list[subprocess.Popen]:
    """A process of one job for each of the command lines."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port = listening.getsockname()[1]
    shared = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(len(programs)),
    }
    return [
        subprocess.Popen(
            [sys.executable, *program],
            cwd=ROOT,
            env=os.environ | shared | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, program in enumerate(programs)
    ]


def ends(results: list[tuple[int, str, str]]) -> list[list[str]]:
    assert not any(code for code, *_ in results), results
    return [out.splitlines()[-1].split()[1:] for _, out, _ in results]  # below Gloo's


def test_a_signal_to_one_process_ends_both_at_one_step_and_damage_sends_both_back(tmp_path):
    first, second = ends(run(tmp_path, "signal"))
    assert first == second and first[1:3] == ["8", "1"], "told behind step 7, learned behind 8"
    steps = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert steps == {"4", "8"}
    file = next(f for f in (tmp_path / "checkpoints" / "8" / "state").rglob("d/*") if f.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    results = run(tmp_path)
    first, second = ends(results)
    # Not the shared step 4: both have copies of step 7 on their own disks.
    assert first == second == ["7", "12", "0", LAST]
    assert (tmp_path / "checkpoints" / "damaged-8").is_dir()
    word = f"step 8: state/{file.relative_to(tmp_path / 'checkpoints' / '8' / 'state')} is damaged"
    assert word in results[0][2] and word not in results[1][2]
    assert word in (tmp_path / "logs" / "process-1.log").read_text()


def test_after_a_kill_they_go_on_from_what_they_share_where_a_copy_or_a_process_is_missing(
    tmp_path,
):
    workdir = tmp_path / "two"
    workdir.mkdir()
    killed = run(workdir, "kill")
    assert killed[1][0] == -signal.SIGKILL
    copy = workdir / "disk-1" / "sora_jax-1-of-2" / "7"
    copy.rename(tmp_path / "elsewhere")  # process 1 comes back on another host
    for older in copy.parent.iterdir():
        older.unlink()
    shutil.copytree(workdir, tmp_path / "one")
    assert ends(run(tmp_path / "one", count=1)) == [["4", "12", "0", LAST]]
    assert ends(run(workdir)) == [["4", "12", "0", LAST]] * 2


def test_an_error_of_all_is_told_once_and_one_of_a_process_alone_ends_it_at_once(tmp_path):
    def train(config: str) -> list[str]:
        command = ["-m", "sora_jax.cli", "train", "--distributed", "--workdir", str(tmp_path / "a")]
        return [*command, "--config", config]

    jobs = start([train("none.py"), train("none.py"), train("nothing.py")])
    told = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [2, 2, 2]
    assert told[0].startswith("sora-jax: --config none.py") and told[1] == ""
    assert told[2].startswith("sora-jax: process 2: --config nothing.py")

    # Hosts that were given different configs.
    own = [*train("configs/paperworld_vae.py:smoke"), "--config.optim.peak_lr=0.5"]
    jobs = start([train("configs/paperworld_vae.py:smoke"), own])
    told = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [2, 2] and told[1] == ""
    assert "process 1 differs from process 0 in config.optim.peak_lr (0.5, not " in told[0]
    assert not (tmp_path / "a" / "metrics.jsonl").exists()

    # A crash, and the other waits for it in a collective.
    in_train = (
        "from sora_jax import agreement, cli; from sora_jax.train import loop; "
        "loop.train = lambda *_: {}; cli.main(['train', '--distributed', '--config', "
        "'configs/paperworld_vae.py:smoke', '--workdir', 'a'])"
    )
    waits, crash = in_train.format("agreement.gather(0)"), in_train.format("1 / 0")
    waiting, crashing = start([["-c", waits], ["-c", crash]])
    try:
        assert "ZeroDivisionError" in crashing.communicate(timeout=120)[1]
        assert crashing.returncode == 1 and waiting.poll() is None
    finally:
        waiting.kill()
        waiting.communicate()
