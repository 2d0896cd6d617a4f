"""The settings of the images and their labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from patchgd_jax.config.checks import require
from patchgd_jax.errors import ConfigError


@dataclass(frozen=True)
class ColumnsConfig:
    """Names of the columns of `data.csv`."""

    path: str = "path"
    """Image file, relative to data.root."""
    label: str = "label"
    """Class name or number; several names with ; between them for task multi-label; a number for
    regression."""
    group: str | None = None
    """Column of units that a split keeps together, such as patients, slides or scanners."""
    split: str | None = None
    """train, validation or test for each row, instead of folds."""
    weight: str | None = None
    """Factor on the training loss of a row; not negative."""


@dataclass(frozen=True)
class SplitConfig:
    """How images without a split of their own are divided: stratified folds that keep groups
    together.
    """

    folds: int = 5
    """Number of folds."""
    fold: int | None = None
    """Fold that is the validation set. None: the first that is not the test fold."""
    test_fold: int | None = None
    """Fold that is used neither for training nor to select the best model. None: there is none."""
    seed: int = 0
    """Seed of the folds; separate from the run's, so that runs of several seeds share them."""

    def __post_init__(self) -> None:
        require(self.folds >= 2, f"data.split.folds is {self.folds}; at least 2")
        for name in ("fold", "test_fold"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < self.folds,
                f"data.split.{name} is {value}; it must be in 0..{self.folds - 1}, the folds",
            )
        require(
            self.test_fold is None or self.test_fold != self.fold,
            f"data.split.fold and data.split.test_fold are both {self.fold}; the test fold must be "
            "another",
        )
        require(
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
    """Which patches are background: they are neither encoded nor seen by the head."""

    method: Literal["none", "otsu", "threshold"] = "none"
    """none: every patch is used. otsu: each image's own threshold. threshold: a fixed one."""
    threshold: int = 220
    """Grey value between tissue and background (method threshold); pixels nearer to the background
    are empty."""
    share: float = 0.05
    """Smallest share of foreground in a patch that is used."""

    def __post_init__(self) -> None:
        require(
            0 <= self.threshold <= 255,
            f"data.empty.threshold is {self.threshold}; it must be in 0..255",
        )
        require(0 < self.share <= 1, f"data.empty.share is {self.share}; it must be in (0, 1]")


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
    """resize: shrink every image into size, keeping its aspect ratio, and pad it with background.
    native: keep its pixels; images of different sizes are bucketed into at most three padded sizes,
    and the padding is left out, unless method sees whole images."""
    level: int = 0
    """Pyramid level that fit native reads; 0 is the full resolution."""
    background: int | None = None
    """Grey value outside an image and under transparent pixels. None: 255 for slides and PANDA, 0
    for the rest."""
    bad_images: Literal["raise", "substitute"] = "raise"
    """What an unreadable image does. raise: end the run. substitute: another image replaces it;
    bad_images.csv lists them."""
    bad_limit: int = 10
    """Most unreadable images that substitute tolerates before it ends the run."""
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
    object_ratio: tuple[float, float] | None = None
    """Smallest and largest side of a digit over the image's shorter side. None: 0.15625 and 0.25,
    or for digit-sum UltraMNIST's own law of sizes."""
    scale: Literal["relative", "absolute"] = "relative"
    """Whether digits grow with the image, or keep the pixels they have at the reference side:
    256 px for most-frequent and object_ratio, 512 px for digit-sum (whose official law is
    absolute)."""
    noise: bool = False
    """Add the UltraMNIST benchmark's background of checkers, discs and triangles."""
    downscale: int = 1
    """Shrink each image by this integer factor (area average) before training on it."""
    train_size: int = 9_600
    """Number of different training images."""
    val_size: int = 1_000
    """Number of validation images, drawn from digits that training never sees."""

    def __post_init__(self) -> None:
        require(
            self.classes == 10 or (self.classes == 28 and self.task == "digit-sum"),
            f"data.classes is {self.classes}; it must be 10, or 28 with data.task digit-sum",
        )
        named = [n for n in ("csv", "tfds", "panda") if getattr(self, n) is not None]
        if self.root is not None and self.csv is None:
            named.append("root")
        require(
            len(named) <= 1,
            f"data.{' and data.'.join(named)} each name the images; give one of them",
        )
        require(
            self.class_names is None or (self.csv is not None and len(self.class_names) >= 2),
            "data.class_names is about the labels of data.csv, and names at least two classes",
        )
        require(self.level >= 0, f"data.level is {self.level}; it must not be negative")
        require(
            self.level == 0 or self.fit == "native",
            "data.level is about data.fit native; resize finds the level it needs",
        )
        require(
            self.background is None or 0 <= self.background <= 255,
            f"data.background is {self.background}; it must be in 0..255",
        )
        require(self.bad_limit >= 1, f"data.bad_limit is {self.bad_limit}; at least 1")
        generated = not named
        require(
            generated or self.downscale == 1,
            "data.downscale is about generated images; shrink your own with data.size",
        )
        require(
            not generated or (self.fit == "resize" and self.empty.method == "none"),
            "data.fit native and data.empty are about image files; name them with data.csv, "
            "data.root, data.tfds or data.panda",
        )
        require(
            self.tfds is None or (self.fit == "resize" and self.empty.method == "none"),
            "data.fit native and data.empty need image files, which data.tfds has none of",
        )
        require(
            self.panda is None or self.declared_channels == 3,
            "data.panda is in colour; set data.channels 3",
        )
        require(
            self.panda is None or self.fit == "native" or self.size[0] == self.size[1],
            f"data.size is {self.size}, but data.panda puts slides into squares",
        )
        require(min(self.size) >= 1, f"data.size is {self.size}; both sides must be positive")
        require(self.downscale >= 1, f"data.downscale is {self.downscale}; it must be at least 1")
        require(
            all(side % self.downscale == 0 for side in self.size),
            f"data.downscale {self.downscale} does not divide data.size {self.size}",
        )
        require(
            self.train_size >= 1 and self.val_size >= 1,
            f"data.train_size {self.train_size} and data.val_size {self.val_size} must be positive",
        )
        low, high = self.object_ratio or (1, 1)
        require(
            0 < low <= high <= 1,
            f"data.object_ratio is {self.object_ratio}; it must be 0 < smallest <= largest <= 1",
        )
        require(self.digit_count >= 1, f"data.digit_count is {self.digit_count}; at least 1")
        require(
            0 < self.label_share <= 1,
            f"data.label_share is {self.label_share}; it must be in (0, 1]",
        )
        require(
            self.digits != "mnist" or self.digits_dir is not None,
            "data.digits is mnist; name their folder with data.digits_dir",
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
        """C as far as the settings alone determine it; None: the files do."""
        if self.channels is not None:
            return self.channels
        if self.panda is not None:
            return 3
        return 1 if self.generated else None

    @property
    def num_channels(self) -> Literal[1, 3]:
        """C of the images the model sees; raises `ConfigError` if only the files determine it."""
        channels = self.declared_channels
        if channels is None:
            raise ConfigError("data.channels must be 1 or 3 where the files are not looked at")
        return channels
