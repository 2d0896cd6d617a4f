"""Several processes over loopback: as good as one, and none is left behind when one dies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import mesh_process
import numpy as np
import pytest
from toy import max_relative
from virtual_devices import several_devices

from patchgd_jax import ConfigError
from patchgd_jax.engine.distributed import check_same, initialize, watchdog

HERE = Path(__file__).parent
WORKER = HERE / "mesh_process.py"


def environment(devices, **limits):
    return {
        **{k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
        **several_devices(devices),
        **limits,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }


def start(what, processes, folder, *, devices=1, only=None, **limits):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    numbers = range(processes) if only is None else only
    return [
        subprocess.Popen(
            [sys.executable, WORKER, what, coordinator, str(processes), str(number), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(devices, **limits),
        )
        for number in numbers
    ]


def finish(workers, timeout=200):
    """Exit codes and outputs; none is left running whatever happens."""
    try:
        outputs = [worker.communicate(timeout=timeout) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [w.returncode for w in workers], [out for out, _ in outputs], [e for _, e in outputs]


RESTORE = """
import sys, jax, numpy as np, orbax.checkpoint as ocp
jax.config.update("jax_enable_x64", True)
from mesh_process import RULES, start
from patchgd_jax.engine.sharding.mesh import make_mesh
from patchgd_jax.engine.sharding.params import param_shardings
state = start()[2]
mesh = make_mesh(f"patch={jax.device_count()}", batch_size=4, strata=8)
like = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state, param_shardings(state, RULES, mesh),
)
got = ocp.StandardCheckpointer().restore(sys.argv[1], like)
assert len(got.params["encoder"]["w1"].sharding.device_set) == jax.device_count()
np.savez(sys.argv[2], *map(np.asarray, jax.tree.leaves(got)))
"""


def restored(folder, devices):
    target = folder / f"on_{devices}.npz"
    command = [sys.executable, "-c", RESTORE, str(folder / "state"), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(devices))
    assert done.returncode == 0, done.stderr
    with np.load(target) as arrays:
        return [arrays[f"arr_{i}"] for i in range(len(arrays.files))]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_as_one_and_restore_on_any_number(float64, tmp_path, processes):
    codes, outputs, errors = finish(start("train", processes, tmp_path, devices=4 // processes))
    assert codes == [0] * processes, errors
    wanted = jax.tree.leaves(mesh_process.alone())
    kept = [restored(tmp_path, devices) for devices in ((1, 8) if processes == 2 else (1, 2, 8))]
    assert max_relative(kept[0], wanted) < 1e-12
    for other in kept[1:]:
        for one, two in zip(kept[0], other, strict=True):
            np.testing.assert_array_equal(one, two)
    if processes == 2:
        # Each process has one place along `data`, and is given only that half of the batch.
        assert ["range(0, 2)" in outputs[0], "range(2, 4)" in outputs[1]] == [True, True]


def test_a_killed_process_ends_the_others_with_a_message(tmp_path):
    workers = start("die", 2, tmp_path, PATCHGD_JAX_HEARTBEAT_SECONDS="3")
    codes, _, errors = finish(workers, timeout=150)
    assert codes == [9, -9], errors
    assert "has probably died" in errors[0]
    assert "last checkpoint" in errors[0]


@pytest.mark.slow
def test_a_process_that_does_something_else_ends_the_others(tmp_path):
    workers = start("hang", 2, tmp_path)
    workers[0].wait(150)
    workers[1].kill()
    codes, _, errors = finish(workers)
    assert codes[0] == 9, errors[0]
    assert "waited 8 s for the others" in errors[0]


def test_processes_that_differ_end_with_what_differs(tmp_path):
    codes, outputs, errors = finish(start("differ", 2, tmp_path))
    assert codes == [2, 2], errors
    for text in outputs:
        assert "seed: process 1 has 1, process 0 has 0" in text
        assert "patch" not in text


@pytest.mark.slow
@pytest.mark.parametrize("only", [0, 1])
def test_a_peer_that_never_comes_up_ends_the_start(tmp_path, only):
    limit = {"PATCHGD_JAX_START_SECONDS": "3"}
    codes, _, errors = finish(start("train", 2, tmp_path, only=[only], **limit))
    assert codes == [2], errors
    assert "not all of the 2 processes of the run came up within 3 s" in errors[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1", 2, None), "only some are given"),
        (("localhost:1", 2, 2), r"it must be in 0\.\.1"),
        (("localhost", 2, 0), "not host:port"),
    ],
)
def test_bad_arguments_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        initialize(*given)


def test_a_bad_environment_is_named(monkeypatch):
    monkeypatch.setenv("PATCHGD_PROCESSES", "two")
    with pytest.raises(ConfigError, match="PATCHGD_PROCESSES is 'two'"):
        initialize()


def test_one_process_alone_needs_nothing(monkeypatch):
    # The script of a Slurm job, and a TPU host by itself, are one process.
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert not initialize()
    check_same({"seed": 1})
    with watchdog(0.001):
        time.sleep(0.1)
