"""A run, with all of its settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from patchgd_jax.config.baseline import BaselineConfig, MethodName
from patchgd_jax.config.checks import UNRESOLVED, require
from patchgd_jax.config.data import DataConfig
from patchgd_jax.config.model import AugmentConfig, ModelConfig, TaskConfig
from patchgd_jax.config.optimizer import OptimizerConfig
from patchgd_jax.config.patchgd import PatchGDConfig
from patchgd_jax.errors import ConfigError


@dataclass(frozen=True)
class StreamConfig:
    """Streaming: images stay in their files, or are generated in pieces; the device holds chunks of
    patches only.
    """

    enabled: bool = False
    """Read patches as they are needed instead of whole images: for images that exceed the memory
    of the device or the host. Needs data.fit native, or generated images."""
    buffers: int = 3
    """Chunks of patches in memory at once: being read, sent or computed on."""
    readers: int = 4
    """Threads that read patches."""
    micro_batch: int | None = None
    """Images whose chunks are sent together; it divides batch_size, and gradients are added up.
    None: the whole batch."""
    max_age: int = 0
    """Outer steps for which an entry of Z is reused when its image comes again, instead of encoded
    anew. A resumed run begins without such entries. Needs enabled, also where whole images fit:
    their fill is one program for all patches, which saves nothing by leaving some out. 0: the fill
    encodes all."""
    store_mib: int = 1024
    """Memory in MiB for entries of Z between visits, at most (max_age, and method mil)."""
    store_dir: str | None = None
    """Folder that stores them on disk. None: in memory."""

    def __post_init__(self) -> None:
        require(self.buffers >= 2, f"stream.buffers is {self.buffers}; at least 2")
        for name in ("readers", "store_mib"):
            value = getattr(self, name)
            require(value >= 1, f"stream.{name} is {value}; at least 1")
        require(
            self.micro_batch is None or self.micro_batch >= 1,
            f"stream.micro_batch is {self.micro_batch}; at least 1",
        )
        require(self.max_age >= 0, f"stream.max_age is {self.max_age}; it must not be negative")
        require(
            self.enabled or (self.micro_batch is None and self.max_age == 0),
            "stream.micro_batch and stream.max_age need streamed images; add --stream.enabled",
        )


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    method: MethodName = "patchgd"
    """How the model is trained. patchgd: see patchgd.mode. gd: the encoder sees the whole image,
    and a dense layer its latent. gd-extended: the same with PatchGD's head. downscale: gd on the
    image shrunk to baseline.side. patchwise: each patch is trained with its image's label.
    fully-conv: one pass over the whole image, a loss at every position of the encoder's map. mil:
    the encoder is frozen, and the head learns from stored features. ips: only the patches with the
    most attention are trained."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    patchgd: PatchGDConfig = field(default_factory=PatchGDConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    batch_size: int | Literal["auto"] = 16
    """Images per outer step. auto: the most that fit the memory; eval_batch_size is then at most
    that. --batch for short."""
    eval_batch_size: int = 16
    """Images per evaluation step."""
    epochs: int = 1
    """Passes over the training images."""
    eval_every: int | None = None
    """Outer steps between evaluations. None: once an epoch."""
    save_every: int | None = None
    """Outer steps between checkpoints. None: with every evaluation."""
    init_encoder: str | None = None
    """Run folder whose best checkpoint's encoder this run starts from."""
    seed: int = 0
    """Seed of the parameters, the data and the sampling."""
    run_dir: str | None = None
    """Folder of the run; must not hold another. None: runs/<date>-<preset>."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Device to train on. auto: the best one there is; a missing device is an error otherwise."""
    mesh: str | None = None
    """How all devices share the work, such as data=2,patch=4: images, and parts of each image;
    rows=2 (experimental) divides each patch. auto: by images as far as they go. None: one device;
    in a run of several processes, auto."""
    param_rules: tuple[str, ...] = ()
    """Parameter sharding on a mesh: regular expressions for paths, each with an axis for every
    dimension, such as kernel$=-,-,-,data (- leaves a dimension whole). The first that matches a
    path, and has as many dimensions, counts; other parameters are whole on every device."""
    reader_threads: int = 1
    """Threads that read images ahead of the training step."""
    reader_mib: int = 256
    """Memory in MiB for images that wait for their step, at most."""

    def __post_init__(self) -> None:
        require(
            isinstance(self.batch_size, str) or self.batch_size >= 1,
            f"batch_size is {self.batch_size}; at least 1",
        )
        for name in ("eval_batch_size", "epochs", "reader_threads"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; at least 1")
        for name in ("eval_every", "save_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}; at least 1")
        require(
            self.seed >= 0 and self.seed < 2**31, f"seed is {self.seed}; it must be in [0, 2^31)"
        )
        require(self.reader_mib >= 1, f"reader_mib is {self.reader_mib}; at least 1")
        stream, micro = self.stream, self.stream.micro_batch or 1
        auto = "auto" in (self.batch_size, self.patchgd.fraction)
        require(
            not auto or (self.mesh is None and not stream.enabled),
            "batch_size auto and patchgd.fraction auto are for one device that holds whole images; "
            "with mesh or stream.enabled, give numbers",
        )
        for name in ("batch_size", "eval_batch_size"):
            require(
                auto or getattr(self, name) % micro == 0,
                f"stream.micro_batch {micro} does not divide {name} {getattr(self, name)}",
            )
        require(
            self.method == "patchgd" or (not stream.enabled and self.mesh is None),
            f"method {self.method} keeps whole images on one device; leave stream.enabled and mesh "
            "out, which are of method patchgd",
        )
        require(
            self.method != "mil" or not self.augment.active,
            "method mil keeps the features of each image, so augment.* would change nothing; leave "
            "it out",
        )
        require(
            not stream.enabled or (self.data.tfds is None and self.data.panda is None),
            "stream.enabled needs image files or generated images, not data.tfds or data.panda",
        )
        require(
            not stream.enabled or self.data.generated or self.data.fit == "native",
            "stream.enabled reads parts of images as they are in their files; add --data.fit "
            "native (and --data.level for a smaller level)",
        )
        require(
            not stream.enabled or self.patchgd.mode != "full",
            "patchgd.mode full keeps all patches on the device at once, so images cannot be "
            "streamed; mode exact has the same gradient",
        )
        require(
            not stream.enabled or self.patchgd.importance == "none",
            f"patchgd.importance {self.patchgd.importance} draws patches when Z is filled, but "
            "stream.enabled reads ahead by a plan of the whole step; leave one of them out",
        )
        require(
            self.method == "patchgd" or self.patchgd.importance == "none",
            f"patchgd.importance {self.patchgd.importance} draws inner steps, but method "
            f"{self.method} has none; use --method patchgd, or leave it out",
        )
        require(
            stream.max_age == 0
            or (self.patchgd.mode != "exact" and self.patchgd.norm_policy != "paper"),
            "stream.max_age reuses old latents; patchgd.mode exact needs all of them fresh, and "
            "patchgd.norm_policy paper takes batch statistics of all of them",
        )
        require(
            not stream.enabled or self.data.bad_images == "raise",
            "stream.enabled meets unreadable patches in the middle of a step, where no other image "
            "can take their place; use --data.bad-images raise",
        )
        require(
            not stream.enabled or self.mesh is None,
            "stream.enabled is for one device; leave mesh out, or keep the images on the devices "
            "of the mesh (patch=N divides each image)",
        )
        require(
            self.init_encoder is None or self.model.weights is None,
            "init_encoder and model.weights both set the encoder's start; name one",
        )
        require(
            self.baseline.pooling == "mean" or self.task.name == "single-label",
            f"baseline.pooling vote is for task.name single-label, not {self.task.name}; use mean",
        )
        require(
            self.task.name not in ("multi-label", "regression") or self.data.csv is not None,
            f"task.name is {self.task.name}, but these images have one class each; use "
            "single-label or ordinal, or name a CSV file with data.csv",
        )
        require(
            self.augment.saturation == 0 or self.data.declared_channels != 1,
            "augment.saturation needs data.channels 3: grey images have no colours",
        )

    @property
    def images_per_step(self) -> int:
        """The batch size as a number; raises `ConfigError` while it is auto."""
        if isinstance(self.batch_size, str):
            raise ConfigError(UNRESOLVED.format("batch_size"))
        return self.batch_size

    def steps_per_epoch(self, examples: int) -> int:
        """Whole batches in an epoch of so many training images; a batch may straddle two."""
        return max(1, examples // self.images_per_step)

    def total_steps(self, examples: int) -> int:
        """Outer steps of the whole run."""
        return examples * self.epochs // self.images_per_step
