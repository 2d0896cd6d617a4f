"""One contender of a comparison, in a process of its own: its peak memory is then its own.

It reads its task as JSON from the command line, builds and warms up, prints a line of JSON with
what that took, and then answers each line of its input, `run N`, `peak` or `quit`, with another.
`contenders.py` is the other end.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Task:
    """What a contender is to run: one outer step, or one step on whole images."""

    library: Literal["ours", "torch"]
    variant: str = ""
    """torch: any of `channels_last`, `compile`, joined by `+`; eager is empty. ours: the policy of
    rematerialisation."""
    method: Literal["patchgd", "accumulate", "exact", "gd"] = "accumulate"
    """gd: the plain network on the whole image; the others are gradient modes."""
    depth: int = 50
    side: int = 512
    patch: int = 64
    inner_steps: int = 4
    batch: int = 2
    latent: int = 256
    dtype: Literal["float32", "bfloat16"] = "float32"
    norm: Literal["batch", "group"] = "batch"
    norm_policy: Literal["paper", "inner", "frozen"] = "paper"
    device: Literal["cpu", "gpu"] = "cpu"
    plan_only: bool = False
    """ours: compile, report the compiler's figures, and allocate nothing."""
    limit_bytes: int = 0
    """Most memory the process may allocate (CPU); 0 is no limit."""

    @property
    def patches(self) -> int:
        """N, the patches of one image."""
        return (self.side // self.patch) ** 2

    def inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """The same uint8 images and labels for every contender."""
        rng = np.random.default_rng(0)
        shape = (self.batch, self.side, self.side, 3)
        return rng.integers(0, 256, shape, np.uint8), np.arange(self.batch, dtype=np.int32) % 10


class Ours:
    """patchgd_jax."""

    def __init__(self, task: Task) -> None:
        import jax
        import jax.numpy as jnp
        import optax

        import patchgd_jax as pgd

        self.jax, self.task = jax, task
        # An empty cache makes the first compilation a cold one.
        self._cache = tempfile.TemporaryDirectory()
        jax.config.update("jax_compilation_cache_dir", self._cache.name)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        if task.plan_only:
            shape = (task.batch, task.side, task.side, 3)
            images: Any = jax.ShapeDtypeStruct(shape, np.uint8)
            labels: Any = jax.ShapeDtypeStruct((task.batch,), np.int32)
        else:
            images, labels = jax.device_put(task.inputs())
        self.batch = {"image": images, "label": labels}
        self.key = jax.random.key(0)
        whole = task.method == "gd"
        grid = pgd.PatchGrid(task.side, task.side, task.side if whole else task.patch)
        model = pgd.build_model(
            pgd.ModelConfig(
                encoder=f"resnet{task.depth}",
                norm=task.norm,
                latent_dim=task.latent,
                head="linear" if whole else "cnn-original",
                dtype=task.dtype,
                remat=task.variant or "none",
            ),
            grid=grid,
            channels=3,
            classes=10,
            mean=0.5,
            std=0.25,
        )
        optimizer = optax.adam(1e-3)
        patchgd = pgd.PatchGDConfig(
            patch=grid.patch,
            mode="full" if whole else task.method,
            inner_steps=1 if whole else task.inner_steps,
            norm_policy="inner" if whole else task.norm_policy,
            fill_chunk=1 if whole else -(-grid.num_patches // task.inner_steps),
        )
        problem = pgd.Problem(model, grid, patchgd)
        self.init = partial(pgd.init_state, problem, optimizer)
        self.step = partial(pgd.train_step, problem, optimizer)
        self.abstract = jax.eval_shape(self.init, self.key)
        self.options = pgd.compiler_options()
        self.dtype = jnp.dtype(task.dtype)

    def _compile(self) -> tuple[Any, float]:
        jax = self.jax
        begun = time.perf_counter()
        lowered = jax.jit(self.step, donate_argnums=0, compiler_options=self.options).lower(
            self.abstract, self.batch, self.key
        )
        compiled = lowered.compile()
        return compiled, time.perf_counter() - begun

    def start(self) -> dict[str, Any]:
        """Compiles twice, cold and warm, and runs the first step."""
        self.compiled, cold = self._compile()
        memory = self.compiled.memory_analysis()
        figures = {
            "compile_cold_s": cold,
            "compiled_bytes": {
                "arguments": memory.argument_size_in_bytes,
                "temporary": memory.temp_size_in_bytes,
                "output": memory.output_size_in_bytes,
                "alias": memory.alias_size_in_bytes,
            },
        }
        if self.task.plan_only:
            return figures
        if self.task.method != "gd":
            del self.compiled
            self.jax.clear_caches()
            self.compiled, figures["compile_warm_s"] = self._compile()
        self.state = self.jax.jit(self.init)(self.key)
        self.run()
        self.jax.clear_caches()
        return figures

    def run(self) -> float:
        """Runs one step and returns its loss."""
        self.state, metrics = self.compiled(self.state, self.batch, self.key)
        self.jax.block_until_ready(self.state)
        return float(metrics["loss"])

    def matmul(self) -> float:
        """FLOP/s of a large matrix product in this task's number format: the device's peak."""
        jnp = self.jax.numpy
        size = 2048 if self.task.device == "cpu" else 8192
        a = jnp.ones((size, size), self.dtype)
        product = self.jax.jit(jnp.dot)
        times = []
        for _ in range(12):
            begun = time.perf_counter()
            product(a, a).block_until_ready()
            times.append(time.perf_counter() - begun)
        return 2 * size**3 / min(times)

    def peak_bytes(self) -> int:
        """The allocator's peak since the process began (GPU)."""
        return self.jax.devices()[0].memory_stats()["peak_bytes_in_use"]

    def reset_peak(self) -> None:
        """The allocator's peak cannot be reset; nothing larger than a step ran before."""


class Torch:
    """The PyTorch reference."""

    def __init__(self, task: Task) -> None:
        self._cache = tempfile.TemporaryDirectory()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = self._cache.name
        import torch
        import torch_reference as reference

        self.torch, self.task, self.reference = torch, task, reference
        torch.manual_seed(0)
        if task.device == "gpu":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        self.device = torch.device("cuda" if task.device == "gpu" else "cpu")
        images, labels = task.inputs()
        self.images = torch.from_numpy(images).to(self.device)
        self.labels = torch.from_numpy(labels).long().to(self.device)
        options = task.variant.split("+")
        channels_last = "channels_last" in options
        compiler = torch.compile if "compile" in options else lambda module: module
        autocast = torch.bfloat16 if task.dtype == "bfloat16" else None
        encoder = reference.ResNet(task.depth, task.latent).to(self.device)
        settings = reference.PatchGD(
            task.patch,
            mode=task.method if task.method != "gd" else "accumulate",
            norm_policy=task.norm_policy,
            mean=0.5,
            std=0.25,
            channels_last=channels_last,
            autocast=autocast,
        )
        rows = task.side // task.patch
        whole = task.method == "gd"
        # GD's head is a linear layer on the one latent of the image.
        head = (
            torch.nn.Linear(task.latent, 10)
            if whole
            else reference.CNNHead(task.latent, 10, (rows, rows))
        ).to(self.device)
        parameters = [*encoder.parameters(), *head.parameters()]
        self.optimizer = torch.optim.Adam(parameters, 1e-3, foreach=True)
        self.trainer = reference.Trainer(encoder, head, self.optimizer, settings, compiler)
        self.whole = compiler(torch.nn.Sequential(encoder, head)) if whole else None
        order = np.random.default_rng(1).permutation(task.patches)
        self.groups = [
            [int(i) for i in order[j :: task.inner_steps]] for j in range(task.inner_steps)
        ]

    def start(self) -> dict[str, Any]:
        """Runs the first step twice: compiled anew, and from the compiler's cache."""
        begun = time.perf_counter()
        self.run()
        first = time.perf_counter() - begun
        if "compile" not in self.task.variant:
            return {"compile_cold_s": 0.0, "compile_warm_s": 0.0}
        begun = time.perf_counter()
        self.run()
        step = time.perf_counter() - begun
        self.torch._dynamo.reset()
        begun = time.perf_counter()
        self.run()
        warm = time.perf_counter() - begun
        return {"compile_cold_s": first - step, "compile_warm_s": warm - step}

    def run(self) -> float:
        """Runs one step and returns its loss."""
        if self.whole is None:
            losses = self.trainer.step(self.images, self.labels, self.groups, self.groups)
            loss = sum(losses) / len(losses)
        else:
            self.optimizer.zero_grad()
            x = self.images.to(self.torch.float32).div_(255).sub_(0.5).div_(0.25)
            x = x.permute(0, 3, 1, 2)
            if "channels_last" not in self.task.variant:
                x = x.contiguous()
            with self.trainer.autocast():
                logits = self.whole(x)
            loss = self.torch.nn.functional.cross_entropy(logits.float(), self.labels)
            loss.backward()
            self.optimizer.step()
        if self.task.device == "gpu":
            self.torch.cuda.synchronize()
        return float(loss)

    def peak_bytes(self) -> int:
        """The allocator's peak since `reset_peak` (GPU)."""
        return self.torch.cuda.max_memory_allocated()

    def reset_peak(self) -> None:
        """Forgets the peak of warming up: cuDNN's search for its fastest algorithms."""
        if self.task.device == "gpu":
            self.torch.cuda.reset_peak_memory_stats()


def resident_bytes(field: str) -> int:
    """`VmHWM` or `VmRSS` of this process."""
    with open("/proc/self/status") as lines:
        line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def reset_resident_peak() -> None:
    """Sets VmHWM back to what is resident now, after giving freed memory back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def serve(task: Task) -> None:
    """Builds the contender and answers requests until `quit`."""
    if task.limit_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (task.limit_bytes, task.limit_bytes))
    contender: Ours | Torch = Ours(task) if task.library == "ours" else Torch(task)
    started = contender.start()
    lifetime = resident_bytes("VmHWM")
    contender.reset_peak()
    reset_resident_peak()
    print(json.dumps({"task": asdict(task), **started}), flush=True)
    for line in sys.stdin:
        match line.split():
            case ["run", count]:
                seconds, loss = [], 0.0
                for _ in range(int(count)):
                    begun = time.perf_counter()
                    loss = contender.run()
                    seconds.append(time.perf_counter() - begun)
                print(json.dumps({"seconds": seconds, "loss": loss}), flush=True)
            case ["peak"]:
                cpu = task.device == "cpu"
                peak = resident_bytes("VmHWM") if cpu else contender.peak_bytes()
                print(json.dumps({"peak_bytes": peak, "with_start_bytes": lifetime}), flush=True)
            case ["matmul"] if isinstance(contender, Ours):
                print(json.dumps({"flops_per_s": contender.matmul()}), flush=True)
            case _:
                return


if __name__ == "__main__":
    serve(Task(**json.loads(sys.argv[1])))
