"""The memory plan of a run, with the true shapes of its images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from patchgd_jax.baselines.registry import WHOLE_IMAGE
from patchgd_jax.config import TrainConfig
from patchgd_jax.data.run_data import ImageFiles, make_data
from patchgd_jax.engine.devices import select_device
from patchgd_jax.engine.setup import make_run_task, training_grids
from patchgd_jax.errors import ConfigError
from patchgd_jax.planner.compiled import compiled_total
from patchgd_jax.planner.estimate import Estimator, Row, Traces
from patchgd_jax.planner.measure import Calibration, calibration
from patchgd_jax.planner.methods import Method
from patchgd_jax.planner.request import PlanRequest, leaf_bytes
from patchgd_jax.planner.solver import Answer, Quantity, solve

# Memory of a run on the CPU for reading, evaluating and saving, beside its steps (measured: 17 to
# 25 MB).
_HOST_BYTES = 24 * 2**20


class RunPlan(NamedTuple):
    """The plan of a run; all requests have the same settings and differ in the images."""

    method: Method
    """The planner's name of the run's method."""
    requests: tuple[PlanRequest, ...]
    """One for each padded size that no other exceeds in pixels and patches, the largest first."""
    examples: int
    """Training images."""
    fewest_patches: int
    """N of the smallest padded size; no image size allows more inner steps than that."""
    device: jax.Device
    calibration: Calibration
    traces: Traces

    def expected(self, request: PlanRequest, compiled: int) -> int:
        """Predicts the device memory of training in bytes, from the compiled or estimated figure.

        The loop sends the next batch to the device while a step computes. On the CPU the device's
        memory is the process's, which has its other needs.
        """
        image = jax.ShapeDtypeStruct((request.batch, *request.image), "uint8")
        beside = _HOST_BYTES if self.device.platform == "cpu" else 0
        return self.calibration.expected(compiled) + leaf_bytes(image) + beside

    def compiled(self, request: PlanRequest) -> int:
        """Predicts bytes of training with a request's settings, by a compile for each size."""
        return max(self.expected(r, compiled_total(r, self.method)) for r in self._sizes(request))

    def row(self, request: PlanRequest) -> Row:
        """Estimates the run's method."""
        return Estimator(request, self.traces).row(self.method)

    def estimated(self, request: PlanRequest) -> int:
        """Predicts bytes of training with a request's settings, by estimate."""
        return max(self.expected(r, self.row(r).total) for r in self._sizes(request))

    def largest(
        self,
        request: PlanRequest,
        quantity: Quantity,
        budget: int,
        total: Callable[[PlanRequest], int],
    ) -> Answer:
        """Solves for the largest setting, by `self.compiled` or `self.estimated`."""
        most = self.fewest_patches
        return solve(request, self.method, quantity, budget, total=total, most_inner_steps=most)

    def _sizes(self, request: PlanRequest) -> list[PlanRequest]:
        return [dataclasses.replace(request, size=of.size, slots=of.slots) for of in self.requests]


def plan_of(config: TrainConfig, files: ImageFiles | None = None) -> RunPlan:
    """Plans a run without auto settings on its images; `files` are its image files if read already.

    Raises `ConfigError` for images that are streamed or on a mesh, `DeviceError` if the device is
    missing, and as `make_data`.
    """
    if config.stream.enabled or config.mesh is not None:
        raise ConfigError(
            "the memory planner plans for one device that holds whole images; leave out "
            "stream.enabled and mesh"
        )
    device = select_device(config.device)
    data = make_data(config, files)
    grids = training_grids(config, data)
    classes = make_run_task(config, data.num_classes).num_outputs(data.num_classes)
    plain = dataclasses.replace(PlanRequest.from_config(config), classes=classes)
    requests = [
        dataclasses.replace(plain, size=shape, slots=slots)
        for shape, slots in zip(data.shapes, data.slots, strict=True)
    ]

    def extent(request: PlanRequest) -> tuple[int, int]:
        """Counts pixels, and the patches of a method that has some."""
        return math.prod(request.size), 1 if config.method in WHOLE_IMAGE else request.patches

    requests.sort(key=extent, reverse=True)
    most: list[PlanRequest] = []
    for request in requests:
        pixels, patches = extent(request)
        if not any(pixels <= extent(r)[0] and patches <= extent(r)[1] for r in most):
            most.append(request)
    fewest = min(slots or grid.num_patches for slots, grid in zip(data.slots, grids, strict=True))
    return RunPlan(
        method=planned_method(config),
        requests=tuple(most),
        examples=len(data.train),
        fewest_patches=fewest,
        device=device,
        calibration=calibration(device),
        traces=Traces(),
    )


def planned_method(config: TrainConfig) -> Method:
    """Returns the planner's name of a run's method."""
    if config.method == "patchgd":
        return config.patchgd.mode
    # The run's images are the shrunk ones already.
    return "gd" if config.method == "downscale" else config.method
