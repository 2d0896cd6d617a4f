"""How tests start a process with several devices on a machine that has one."""

import os


def several_devices(count):
    """Variables of the environment of a process with that many virtual devices."""
    return {
        # They share the machine's cores: a collective may wait for long.
        "XLA_FLAGS": (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count} "
            "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300 "
            "--xla_cpu_collective_call_terminate_timeout_seconds=900"
        ),
        # XLA:CPU starts independent collectives in any order, and a waiting one keeps its thread:
        # with two cores' threads, devices can wait for each other for good.
        "NPROC": "32",
    }
