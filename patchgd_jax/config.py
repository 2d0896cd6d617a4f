"""Every setting of a run: frozen dataclasses, one field one default, checked when made.

This module imports no command-line library; `cli.py` turns the classes into flags and the text
under each field into its help.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from patchgd_jax.errors import ConfigError, unknown_name

_NOT_SETTLED = (
    "{} is auto, which is not a number yet; patchgd_jax.auto_settings.settled makes it one"
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class ColumnsConfig:
    """Names of the columns of `data.csv`."""

    path: str = "path"
    """Image file, relative to data.root."""
    label: str = "label"
    """Class name or number; several names with ; between them for task multi-label; a number for
    regression."""
    group: str | None = None
    """What must not be torn apart by a split: a patient, a slide or a scanner."""
    split: str | None = None
    """train, validation or test for each row, instead of folds."""
    weight: str | None = None
    """Factor on the training loss of a row; not negative."""


@dataclass(frozen=True)
class SplitConfig:
    """How images without a split of their own are divided: folds of like label counts that keep
    groups together.
    """

    folds: int = 5
    """Number of folds."""
    fold: int | None = None
    """Fold that is the validation set. None: the first that is not the test fold."""
    test_fold: int | None = None
    """Fold that neither training nor the choice of the best model sees. None: there is none."""
    seed: int = 0
    """Seed of the folds; apart from the run's, so that runs of several seeds share them."""

    def __post_init__(self) -> None:
        _require(self.folds >= 2, f"data.split.folds is {self.folds}; at least 2")
        for name in ("fold", "test_fold"):
            value = getattr(self, name)
            _require(
                value is None or 0 <= value < self.folds,
                f"data.split.{name} is {value}; it must be in 0..{self.folds - 1}, the folds",
            )
        _require(
            self.test_fold is None or self.test_fold != self.fold,
            f"data.split.fold and data.split.test_fold are both {self.fold}; the test fold must be "
            "another",
        )
        _require(
            self.test_fold is None or self.folds >= 3,
            "data.split.test_fold needs data.split.folds 3 or more: one must be left to train on",
        )

    @property
    def validation_folds(self) -> tuple[int, ...]:
        """The folds that may be the validation set: all but the test fold."""
        return tuple(fold for fold in range(self.folds) if fold != self.test_fold)

    @property
    def validation_fold(self) -> int:
        """The fold that is the validation set."""
        return self.validation_folds[0] if self.fold is None else self.fold


@dataclass(frozen=True)
class BackgroundConfig:
    """Which patches hold nothing: they are neither encoded nor seen by the head."""

    method: Literal["none", "otsu", "threshold"] = "none"
    """none: every patch counts. otsu: each image's own threshold. threshold: a fixed one."""
    threshold: int = 220
    """Grey value that parts tissue from background (method threshold): what is nearer to the
    background than this is empty."""
    share: float = 0.05
    """Share of a patch that must be no background for the patch to count."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.threshold <= 255,
            f"data.empty.threshold is {self.threshold}; it must be in 0..255",
        )
        _require(0 < self.share <= 1, f"data.empty.share is {self.share}; it must be in (0, 1]")


@dataclass(frozen=True)
class PandaConfig:
    """Settings of the PANDA prostate biopsies (`data.panda`)."""

    cleaned_list: str | None = None
    """Text or CSV file whose first column names the image ids to use. None: all of train.csv."""
    reference_level: bool = False
    """Resize from the pyramid level that the paper's code took, which is the last one; otherwise
    from the smallest that is large enough."""


@dataclass(frozen=True)
class DataConfig:
    """The images and their labels: your files (`csv`, `root`), a tensorflow-datasets set (`tfds`),
    PANDA (`panda`), or, where none is named, generated images of handwritten digits (UltraMNIST and
    a simpler variant).
    """

    csv: str | None = None
    """Your labels: a CSV file with a row for each image; see data.columns."""
    root: str | None = None
    """Folder of your images. Without csv it holds a folder for each class. None: the CSV's."""
    tfds: str | None = None
    """A prepared tensorflow-datasets set: NAME, NAME/CONFIG, or the folder it was prepared in."""
    panda: str | None = None
    """Folder of the PANDA challenge as Kaggle has it: train.csv and train_images."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    class_names: tuple[str, ...] | None = None
    """The classes of csv in the order of their numbers; another label is an error. None: they are
    found from the labels."""
    split: SplitConfig = field(default_factory=SplitConfig)
    empty: BackgroundConfig = field(default_factory=BackgroundConfig)
    panda_options: PandaConfig = field(default_factory=PandaConfig)
    fit: Literal["resize", "native"] = "resize"
    """resize: shrink every image into size, keeping its shape and filling up with background.
    native: take its pixels as they are; images of different sizes are padded to at most three, and
    the padding is left out."""
    level: int = 0
    """Pyramid level that fit native reads; 0 is the full resolution."""
    background: int | None = None
    """Grey value outside an image and under transparent pixels. None: 255 for slides and PANDA, 0
    for the rest."""
    bad_images: Literal["raise", "substitute"] = "raise"
    """What an unreadable image does. raise: end the run. substitute: another image takes its place;
    bad_images.csv lists them."""
    bad_limit: int = 10
    """Unreadable images that substitute bears before it ends the run after all."""
    task: Literal["most-frequent", "digit-sum"] = "most-frequent"
    """most-frequent: the label is the digit that occurs most often. digit-sum: UltraMNIST, the
    label is the sum of three to five digits."""
    classes: int = 10
    """10, or 28 for the benchmark's sums 0..27 (digit-sum only)."""
    size: tuple[int, int] = (256, 256)
    """Height and width in pixels of generated images, and of your own with fit resize."""
    channels: Literal[1, 3] | None = None
    """1: grey; 3: colour, or a grey image repeated for encoders that expect colour. None: what the
    files have, which must be one kind; 1 for generated images, 3 for PANDA."""
    digits: Literal["sklearn", "mnist", "font"] = "sklearn"
    """Where digits come from: scikit-learn's 1,797 handwritten ones, MNIST files you have, or a
    font."""
    digits_dir: str | None = None
    """Folder of MNIST idx files (or of a prepared tensorflow-datasets `mnist`)."""
    digit_count: int = 8
    """Digits per image (most-frequent only)."""
    label_share: float = 0.625
    """Share of the digits that show the label (most-frequent only)."""
    object_ratio: tuple[float, float] = (0.15625, 0.25)
    """Smallest and largest side of a digit over the image's shorter side (most-frequent only)."""
    scale: Literal["relative", "absolute"] = "relative"
    """Whether digits grow with the image, or keep the pixels they have at the reference side:
    256 px for most-frequent, 512 px for digit-sum (whose official law is absolute)."""
    noise: bool = False
    """Add the UltraMNIST benchmark's background of checkers, discs and triangles."""
    downscale: int = 1
    """Shrink each image by this integer factor (area average) before training on it."""
    train_size: int = 9_600
    """Number of different training images."""
    val_size: int = 1_000
    """Number of validation images, drawn from digits that training never sees."""

    def __post_init__(self) -> None:
        _require(
            self.classes == 10 or (self.classes == 28 and self.task == "digit-sum"),
            f"data.classes is {self.classes}; it must be 10, or 28 with data.task digit-sum",
        )
        named = [n for n in ("csv", "tfds", "panda") if getattr(self, n) is not None]
        if self.root is not None and self.csv is None:
            named.append("root")
        _require(
            len(named) <= 1,
            f"data.{' and data.'.join(named)} each name the images; give one of them",
        )
        _require(
            self.class_names is None or (self.csv is not None and len(self.class_names) >= 2),
            "data.class_names is about the labels of data.csv, and names at least two classes",
        )
        _require(self.level >= 0, f"data.level is {self.level}; it must not be negative")
        _require(
            self.level == 0 or self.fit == "native",
            "data.level is about data.fit native; resize finds the level it needs",
        )
        _require(
            self.background is None or 0 <= self.background <= 255,
            f"data.background is {self.background}; it must be in 0..255",
        )
        _require(self.bad_limit >= 1, f"data.bad_limit is {self.bad_limit}; at least 1")
        generated = not named
        _require(
            generated or self.downscale == 1,
            "data.downscale is about generated images; shrink your own with data.size",
        )
        _require(
            not generated or (self.fit == "resize" and self.empty.method == "none"),
            "data.fit native and data.empty are about image files; name them with data.csv, "
            "data.root, data.tfds or data.panda",
        )
        _require(
            self.tfds is None or (self.fit == "resize" and self.empty.method == "none"),
            "data.fit native and data.empty need image files, which data.tfds has none of",
        )
        _require(
            self.panda is None or self.declared_channels == 3,
            "data.panda is in colour; set data.channels 3",
        )
        _require(
            self.panda is None or self.fit == "native" or self.size[0] == self.size[1],
            f"data.size is {self.size}, but data.panda puts slides into squares",
        )
        _require(min(self.size) >= 1, f"data.size is {self.size}; both sides must be positive")
        _require(self.downscale >= 1, f"data.downscale is {self.downscale}; it must be at least 1")
        _require(
            all(side % self.downscale == 0 for side in self.size),
            f"data.downscale {self.downscale} does not divide data.size {self.size}",
        )
        _require(
            self.train_size >= 1 and self.val_size >= 1,
            f"data.train_size {self.train_size} and data.val_size {self.val_size} must be positive",
        )
        low, high = self.object_ratio
        _require(
            0 < low <= high <= 1,
            f"data.object_ratio is {self.object_ratio}; it must be 0 < smallest <= largest <= 1",
        )
        _require(self.digit_count >= 1, f"data.digit_count is {self.digit_count}; at least 1")
        _require(
            0 < self.label_share <= 1,
            f"data.label_share is {self.label_share}; it must be in (0, 1]",
        )
        _require(
            self.digits != "mnist" or self.digits_dir is not None,
            "data.digits is mnist; say where the files are with data.digits_dir",
        )

    @property
    def generated(self) -> bool:
        """Whether the images are the built-in ones."""
        return all(name is None for name in (self.csv, self.root, self.tfds, self.panda))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images the model sees, unless fit is native."""
        height, width = self.size
        return height // self.downscale, width // self.downscale, self.num_channels

    @property
    def declared_channels(self) -> Literal[1, 3] | None:
        """C as far as the settings alone say it; None: the files do."""
        if self.channels is not None:
            return self.channels
        if self.panda is not None:
            return 3
        return 1 if self.generated else None

    @property
    def num_channels(self) -> Literal[1, 3]:
        """C of the images the model sees.

        Raises:
            ConfigError: if only the files say it; `data.channels.with_channels` looks at them.
        """
        channels = self.declared_channels
        if channels is None:
            raise ConfigError("data.channels must be 1 or 3 where the files are not looked at")
        return channels


@dataclass(frozen=True)
class ModelConfig:
    """The encoder (theta1) and the head (theta2)."""

    encoder: str = "small-cnn"
    """Backbone that turns a patch into a latent vector: small-cnn; resnet18, 34, 50 or 101;
    mobilenet-v2; efficientnet-b0; convnext-v2-atto, femto, pico, nano, tiny or base; deit- or vit-
    tiny, small or base."""
    norm: Literal["group", "batch", "layer"] | None = None
    """Normalisation inside the encoder. None: its architecture's own, layer for ConvNeXt-V2, DeiT
    and ViT, which have no other, and batch for the rest, which can have group. What batch
    statistics do is `patchgd.norm_policy`."""
    latent_dim: int = 128
    """Length D of a patch's latent vector."""
    head: str = "attention"
    """Network that reads Z: attention, transformer, adaptive-cnn or linear (for any grid), or one
    of the paper's, for the grid it was trained on: cnn-original, cnn-smaller, cnn-larger,
    cnn-smaller-feat, cnn-larger-feat."""
    dropout: float | None = None
    """Dropout rate inside the head. None: the head's own (0.2 for the paper's, else 0)."""
    drop_path: float = 0.0
    """Stochastic depth: the share of patches for which the encoder's last residual block is left
    out in training; earlier blocks have less (ResNet, EfficientNet, ConvNeXt-V2, DeiT and ViT)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the encoder's computation; parameters stay float32."""
    remat: Literal["none", "dots", "blocks", "everything"] = "dots"
    """What the encoder computes again in the backward pass instead of keeping it. none: nothing;
    dots: norms and activations, the cheap half; blocks: all but each block's input; everything: all
    of it."""
    weights: str | None = None
    """Pretrained weights to start from: a torchvision .pth, a timm .safetensors, what
    `patchgd-jax export` wrote, a name such as resnet50-imagenet1k-v2, or URL#sha256=HASH. Images
    are scaled as the weights need it."""
    allow_partial: bool = False
    """Start with a new head where that of an export does not fit, for other classes say. Published
    weights have neither head nor latent layer; both are always new."""

    def __post_init__(self) -> None:
        _require(self.latent_dim >= 1, f"model.latent_dim is {self.latent_dim}; at least 1")
        _require(
            self.dropout is None or 0 <= self.dropout < 1,
            f"model.dropout is {self.dropout}; it must be in [0, 1)",
        )
        _require(
            0 <= self.drop_path < 1,
            f"model.drop_path is {self.drop_path}; it must be in [0, 1)",
        )
        policies = ("none", "dots", "blocks", "everything")
        _require(
            self.remat in policies,
            f"model.remat is {self.remat!r}; it must be one of {', '.join(policies)}",
        )
        _require(
            self.weights is not None or not self.allow_partial,
            "model.allow_partial is about model.weights, but none are named",
        )


@dataclass(frozen=True)
class PatchGDConfig:
    """The patch grid and how the model is updated from it."""

    patch: int = 64
    """Side p of a patch in pixels."""
    stride: int | None = None
    """Pixels between neighbouring patches; less than the patch side makes them overlap. None:
    the patch side."""
    fraction: float | Literal["auto"] = 0.25
    """Sampling fraction: the share of an image's patches one inner step re-encodes. auto: the
    largest that fits the memory; `train` makes it a number. --fraction for short."""
    inner_steps: int | None = None
    """Inner steps J per outer step. None: ceil(1 / fraction), so that each patch gets exactly
    one gradient."""
    mode: Literal["patchgd", "accumulate", "exact", "full"] = "accumulate"
    """Gradient. patchgd: the paper's algorithm, an update every epsilon inner steps. accumulate:
    one update per outer step (the papers' default setting). exact: the whole-image gradient at
    the memory of one chunk. full: plain autodiff through all patches at once."""
    epsilon: int = 1
    """Inner steps per update in mode patchgd; must divide J."""
    sampling: Literal["partition", "uniform"] = "partition"
    """partition: each patch once per outer step (the paper). uniform: with replacement."""
    sample_per: Literal["batch", "image"] = "batch"
    """Whether all images of a batch share the sampled positions."""
    strata: int = 1
    """Parts of the grid, equal runs of patches, that each sample takes an equal share of. Devices
    share an image by strata: their number along the mesh's patch axis must divide this."""
    norm_policy: Literal["inner", "paper", "frozen"] = "inner"
    """When the encoder's batch statistics move: in inner steps, in the fill as well, or never.
    paper fills Z in train mode, in shuffled groups of the inner steps' size as the official code
    does; frozen runs the encoder in eval mode, so its dropout is off, too."""
    encoder_grad_scale: float | Literal["unbiased"] = 1.0
    """Factor on the encoder's gradient. unbiased: one over the share of inner steps a patch is in,
    which undoes the paper's 1 / J."""
    fill_chunk: int = 4
    """Grid positions encoded at a time where no gradient is kept (but for norm_policy paper), and
    in mode exact."""
    remat: bool = False
    """Mode full: recompute activations chunk by chunk instead of keeping them."""

    def __post_init__(self) -> None:
        _require(self.patch >= 1, f"patchgd.patch is {self.patch}; at least 1")
        _require(
            self.stride is None or 1 <= self.stride <= self.patch,
            f"patchgd.stride is {self.stride}; it must be in 1..{self.patch}, the patch side",
        )
        if isinstance(self.fraction, str):
            _require(
                self.inner_steps is None,
                f"patchgd.inner_steps {self.inner_steps} says how many patches are sampled, and so "
                "does patchgd.fraction auto; give one of them",
            )
            _require(
                self.mode in ("patchgd", "accumulate"),
                f"patchgd.mode {self.mode} samples no patches, so patchgd.fraction cannot be auto; "
                "set batch_size auto",
            )
        else:
            _require(
                0 < self.fraction <= 1,
                f"patchgd.fraction is {self.fraction}; it must be in (0, 1]",
            )
        _require(
            self.inner_steps is None or self.inner_steps >= 1,
            f"patchgd.inner_steps is {self.inner_steps}; at least 1",
        )
        _require(self.strata >= 1, f"patchgd.strata is {self.strata}; at least 1")
        _require(self.fill_chunk >= 1, f"patchgd.fill_chunk is {self.fill_chunk}; at least 1")
        _require(self.epsilon >= 1, f"patchgd.epsilon is {self.epsilon}; at least 1")
        if self.mode == "patchgd" and self.fraction != "auto":
            _require(
                self.num_inner_steps % self.epsilon == 0,
                f"patchgd.epsilon {self.epsilon} does not divide the {self.num_inner_steps} inner "
                f"steps that fraction {self.fraction} gives",
            )

    @property
    def num_inner_steps(self) -> int:
        """J, the number of inner steps of one outer step.

        Raises:
            ConfigError: if the fraction is still auto.
        """
        if isinstance(self.fraction, str):
            raise ConfigError(_NOT_SETTLED.format("patchgd.fraction"))
        # 1 / (1 / 49) is 49.00000000000001 in floating point; the ceiling must be 49.
        return self.inner_steps or math.ceil(1 / self.fraction - 1e-9)

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates of one outer step."""
        return self.num_inner_steps // self.epsilon if self.mode == "patchgd" else 1


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule, which counts outer steps."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """Update rule."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Decay after the warm-up: linear is the paper's and ends near 1 - 1 / decay_factor of the
    peak; cosine ends at zero."""
    decay_factor: float = 2.0
    """Linear: the run's length is multiplied by this before the rate would reach zero."""
    warmup_epochs: float = 0.05
    """Epochs of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay (adamw only)."""
    momentum: float = 0.9
    """Momentum (sgd only)."""
    clip_norm: float | None = None
    """Clip the gradient to this global norm."""
    encoder_learning_rate: float | None = None
    """Peak learning rate of the encoder. None: learning_rate, which is always the head's."""
    layer_decay: float = 1.0
    """Factor on the encoder's learning rate for each block that lies between a layer and the
    latents: 1 for the last layer, the decay for the last block, its square for the one before."""
    freeze_stages: int = 0
    """Stages of the encoder, from the input on and with the stem, whose parameters stay as they
    are. Their batch statistics follow patchgd.norm_policy."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the parameters, this share of which stays at each
    update; it is what is evaluated. None: the parameters themselves are."""

    def __post_init__(self) -> None:
        _require(
            self.learning_rate > 0 and math.isfinite(self.learning_rate),
            f"optimizer.learning_rate is {self.learning_rate}; it must be positive and finite",
        )
        _require(
            self.decay_factor >= 1, f"optimizer.decay_factor is {self.decay_factor}; at least 1"
        )
        _require(self.warmup_epochs >= 0, "optimizer.warmup_epochs must not be negative")
        _require(
            self.weight_decay == 0 or self.name == "adamw",
            f"optimizer.weight_decay needs optimizer.name adamw, not {self.name}",
        )
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optimizer.clip_norm is {self.clip_norm}; it must be positive",
        )
        rate = self.encoder_learning_rate
        _require(
            rate is None or (rate > 0 and math.isfinite(rate)),
            f"optimizer.encoder_learning_rate is {rate}; it must be positive and finite; "
            "to keep an encoder as it is, freeze its stages",
        )
        _require(
            0 < self.layer_decay <= 1,
            f"optimizer.layer_decay is {self.layer_decay}; it must be in (0, 1]",
        )
        _require(
            self.freeze_stages >= 0,
            f"optimizer.freeze_stages is {self.freeze_stages}; it must not be negative",
        )
        _require(
            self.ema_decay is None or 0 <= self.ema_decay < 1,
            f"optimizer.ema_decay is {self.ema_decay}; it must be in [0, 1)",
        )


@dataclass(frozen=True)
class TaskConfig:
    """What the labels are, and the loss that goes with them."""

    name: Literal["single-label", "multi-label", "regression", "ordinal"] = "single-label"
    """single-label: one of several classes. multi-label: any of them. regression: a number.
    ordinal: one of several grades in order (CORN)."""
    label_smoothing: float = 0.0
    """Share of each training target that is spread over all answers."""
    class_weights: tuple[float, ...] | None = None
    """Factors on the training loss, one for each class: larger ones for rare classes."""
    best_metric: str | None = None
    """Validation metric that names the best checkpoint, such as accuracy, balanced_accuracy,
    quadratic_weighted_kappa, mean_f1, rmse or loss. None: the task's own."""


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of single patches while training; their places in Z stay."""

    flips: bool = False
    """Flip patches, each way with a chance of a half."""
    turns: bool = False
    """Turn patches by 0, 90, 180 or 270 degrees."""
    brightness: float = 0.0
    """Multiply a patch by a factor in 1 - this .. 1 + this."""
    contrast: float = 0.0
    """The same for the distance of its pixels from its mean grey."""
    saturation: float = 0.0
    """The same for the distance of its colours from grey (three channels only)."""
    same_draw: bool = False
    """Change a patch in the fill and in the inner step of an outer step in the same way, so that
    its entry in Z is renewed by nothing but the parameters. Otherwise each draws anew."""

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"augment.{name} is {value}; it must be in [0, 1]")

    @property
    def jitters(self) -> bool:
        """Whether colours change."""
        return max(self.brightness, self.contrast, self.saturation) > 0

    @property
    def active(self) -> bool:
        """Whether anything changes."""
        return self.flips or self.turns or self.jitters


@dataclass(frozen=True)
class StreamConfig:
    """Images that stay in their files, or are generated piece by piece: only chunks of patches come
    to the device.
    """

    enabled: bool = False
    """Read patches as they are needed, instead of whole images beforehand: for images that exceed
    the device's memory, or the host's. Needs data.fit native, or generated images."""
    buffers: int = 3
    """Chunks of patches that are read, travel or are computed on at once."""
    readers: int = 4
    """Threads that read patches."""
    micro_batch: int | None = None
    """Images whose chunks travel together; it divides batch_size, and gradients are added up. None:
    the whole batch."""
    max_age: int = 0
    """Outer steps for which an entry of Z is reused when its image comes again, instead of encoded
    anew. A resumed run begins without such entries. 0: the fill encodes all."""
    store_mib: int = 1024
    """Most memory in MiB that the entries of Z between visits take (max_age)."""
    store_dir: str | None = None
    """Folder in which they are kept on disk. None: they are kept in memory."""

    def __post_init__(self) -> None:
        _require(self.buffers >= 2, f"stream.buffers is {self.buffers}; at least 2")
        for name in ("readers", "store_mib"):
            value = getattr(self, name)
            _require(value >= 1, f"stream.{name} is {value}; at least 1")
        _require(
            self.micro_batch is None or self.micro_batch >= 1,
            f"stream.micro_batch is {self.micro_batch}; at least 1",
        )
        _require(self.max_age >= 0, f"stream.max_age is {self.max_age}; it must not be negative")
        _require(
            self.enabled or (self.micro_batch is None and self.max_age == 0),
            "stream.micro_batch and stream.max_age are about streamed images; add --stream.enabled",
        )


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    patchgd: PatchGDConfig = field(default_factory=PatchGDConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    batch_size: int | Literal["auto"] = 16
    """Images per outer step. auto: the most that fit the memory; `train` makes it a number, which
    eval_batch_size does not exceed then. --batch for short."""
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
    """Device to train on; anything but auto is an error where it is missing."""
    mesh: str | None = None
    """How all devices share the work: data=2,patch=4 (images, and parts of each image; and rows=2
    for parts of each patch), or auto. None: one device trains; in a run of several processes,
    auto."""
    param_rules: tuple[str, ...] = ()
    """Parameters that the devices of a mesh divide among them, each a regular expression for their
    paths and an axis for each dimension: kernel$=-,-,-,data (- leaves a dimension whole). The first
    that is found in a path, and has as many dimensions, counts; the rest is whole on every
    device."""
    reader_threads: int = 1
    """Threads that prepare images ahead of the training step."""
    reader_workers: int = 0
    """Processes that do so instead, for decoders that hold Python up."""
    reader_mib: int = 256
    """Most memory in MiB that prepared images may wait in."""

    def __post_init__(self) -> None:
        _require(
            isinstance(self.batch_size, str) or self.batch_size >= 1,
            f"batch_size is {self.batch_size}; at least 1",
        )
        for name in ("eval_batch_size", "epochs", "reader_threads"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} is {value}; at least 1")
        for name in ("eval_every", "save_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} is {value}; at least 1")
        _require(
            self.seed >= 0 and self.seed < 2**31, f"seed is {self.seed}; it must be in [0, 2^31)"
        )
        _require(self.reader_workers >= 0, f"reader_workers is {self.reader_workers}; at least 0")
        _require(self.reader_mib >= 1, f"reader_mib is {self.reader_mib}; at least 1")
        stream, micro = self.stream, self.stream.micro_batch or 1
        auto = "auto" in (self.batch_size, self.patchgd.fraction)
        _require(
            not auto or (self.mesh is None and not stream.enabled),
            "batch_size auto and patchgd.fraction auto are for one device that holds whole images; "
            "with mesh or stream.enabled, give numbers",
        )
        for name in ("batch_size", "eval_batch_size"):
            _require(
                auto or getattr(self, name) % micro == 0,
                f"stream.micro_batch {micro} does not divide {name} {getattr(self, name)}",
            )
        _require(
            not stream.enabled or (self.data.tfds is None and self.data.panda is None),
            "stream.enabled needs image files or generated images, not data.tfds or data.panda",
        )
        _require(
            not stream.enabled or self.data.generated or self.data.fit == "native",
            "stream.enabled reads parts of images as they are in their files; add --data.fit "
            "native (and --data.level for a smaller level)",
        )
        _require(
            not stream.enabled or self.patchgd.mode != "full",
            "patchgd.mode full keeps all patches on the device at once, so images cannot be "
            "streamed; mode exact has the same gradient",
        )
        _require(
            stream.max_age == 0
            or (self.patchgd.mode != "exact" and self.patchgd.norm_policy != "paper"),
            "stream.max_age reuses old latents; patchgd.mode exact needs all of them fresh, and "
            "patchgd.norm_policy paper takes batch statistics of all of them",
        )
        _require(
            not stream.enabled or self.data.bad_images == "raise",
            "stream.enabled meets unreadable patches in the middle of a step, where no other image "
            "can take their place; use --data.bad-images raise",
        )
        _require(
            not stream.enabled or self.mesh is None,
            "stream.enabled is for one device; leave mesh out, or keep the images on the devices "
            "of the mesh (patch=N divides each image)",
        )
        _require(
            self.init_encoder is None or self.model.weights is None,
            "init_encoder and model.weights both say what the encoder starts from; name one",
        )
        _require(
            self.task.name not in ("multi-label", "regression") or self.data.csv is not None,
            f"task.name is {self.task.name}, but these images have one class each; use "
            "single-label or ordinal, or name a CSV file with data.csv",
        )
        _require(
            self.augment.saturation == 0 or self.data.declared_channels != 1,
            "augment.saturation needs data.channels 3: grey images have no colours",
        )

    @property
    def images_per_step(self) -> int:
        """The batch size as a number.

        Raises:
            ConfigError: if it is still auto.
        """
        if isinstance(self.batch_size, str):
            raise ConfigError(_NOT_SETTLED.format("batch_size"))
        return self.batch_size

    def steps_per_epoch(self, examples: int) -> int:
        """Whole batches in an epoch of so many training images; a batch may straddle two."""
        return max(1, examples // self.images_per_step)

    def total_steps(self, examples: int) -> int:
        """Outer steps of the whole run."""
        return examples * self.epochs // self.images_per_step


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON types."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, named as their flags are: `data.size`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def from_dict(cls: type[Any], values: dict[str, Any], where: str = "config") -> Any:
    """The inverse of `to_dict`; unknown keys and wrong types raise `ConfigError`."""
    hints = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be an object, not {type(values).__name__}")
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise unknown_name("setting", f"{where}.{key}", (f"{where}.{h}" for h in hints))
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            arguments[key] = from_dict(typing.cast(type, hint), value, f"{where}.{key}")
            continue
        arguments[key] = tuple(value) if isinstance(value, list) else value
        if not _matches(arguments[key], hint):
            raise ConfigError(f"{where}.{key} is {value!r}; expected {_type_name(hint)}")
    return cls(**arguments)


def _matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if origin is tuple:
        options = typing.get_args(hint)
        if options[1:] == (...,):
            return isinstance(value, tuple) and all(_matches(x, options[0]) for x in value)
        return (
            isinstance(value, tuple)
            and len(value) == len(options)
            and all(map(_matches, value, options))
        )
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type_name, typing.get_args(hint)))
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
