"""What a head's outputs mean: their number, the loss, the prediction and the metrics of a task."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from patchgd_jax.config import TaskConfig
from patchgd_jax.core import metrics
from patchgd_jax.errors import ConfigError, unknown_name

_CLASSIFICATION = ("accuracy", "balanced_accuracy", "quadratic_weighted_kappa")
_LOWER_IS_BETTER = frozenset({"loss", "mae", "rmse"})


@dataclass(frozen=True)
class Task(ABC):
    """One kind of label. Hashable and without arrays: a static argument of the jitted step.

    K is the number of classes, labels or grades of the data; O is `num_outputs(K)`.

    Args:
        label_smoothing: share of a target that is spread evenly over all answers.
        class_weights: K factors on the loss; see each task. None: 1. The mean over a batch is over
            its examples, not over their weights, so that an example counts alike in every batch.
        selection: metric of `summary`, or `loss`, by which the best checkpoint is chosen. None:
            `best_metric`.

    Raises:
        ConfigError: for a value that the task cannot have.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    selection: str | None = None

    name: ClassVar[str]
    training_metric: ClassVar[str] = "accuracy"
    """What the mean of `score` is called."""
    best_metric: ClassVar[str] = "accuracy"
    """The metric of `summary` by which the best checkpoint is chosen, unless `selection` is set."""
    numbers: ClassVar[tuple[str, ...]] = _CLASSIFICATION
    """The metrics of `summary` that are single numbers, the most telling first."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(
                f"task.label_smoothing is {self.label_smoothing}; it must be in [0, 1)"
            )
        if self.selection not in (None, "loss", *self.numbers):
            raise ConfigError(
                f"task.best_metric is {self.selection!r}; the task {self.name} has "
                f"{', '.join(self.numbers)} and loss"
            )
        weights = self.class_weights
        if weights is not None and not (
            weights and all(math.isfinite(w) and w >= 0 for w in weights) and max(weights) > 0
        ):
            raise ConfigError(
                f"task.class_weights is {weights}; they must be finite, not negative, and not all 0"
            )

    def for_evaluation(self) -> Task:
        """The task without smoothing and weights, whose loss compares between runs."""
        return dataclasses.replace(self, label_smoothing=0.0, class_weights=None)

    def check_classes(self, classes: int) -> None:
        """Checks the settings against the data.

        Raises:
            ConfigError: if there are not as many class weights as classes.
        """
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise ConfigError(
                f"task.class_weights has {len(self.class_weights)} values, but the data have "
                f"{classes} classes; give one for each"
            )

    @abstractmethod
    def num_outputs(self, classes: int) -> int:
        """O, the length of the head's output, for K classes."""

    @abstractmethod
    def label_spec(self, batch: int, classes: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the labels of a batch of B."""

    @abstractmethod
    def loss(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
        """The loss of each example.

        Args:
            outputs: `float [B, O]`.
            labels: as in `label_spec`.

        Returns:
            `float [B]`.

        Raises:
            ConfigError: if the labels have another shape or kind, or there is not a class weight
                for each class.
        """

    @abstractmethod
    def predict(self, outputs: jax.Array) -> jax.Array:
        """The answers to `outputs float [B, O]`, which compare with labels."""

    @abstractmethod
    def score(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
        """The training metric of each example, `bool` or `float [B]`."""

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """The probability of each class: `float64 [B, K]` of `outputs float [B, O]`, on the host.

        Raises:
            ConfigError: if the task has no classes.
        """
        raise ConfigError(f"the task {self.name} gives no probabilities")

    @abstractmethod
    def summary(
        self, *, labels: np.ndarray, predictions: np.ndarray, outputs: np.ndarray, classes: int
    ) -> dict[str, Any]:
        """The metrics of an evaluation, on the host; arrays hold all examples."""

    def rank(self, summary: Mapping[str, Any]) -> float:
        """A number that is higher for a better evaluation."""
        metric = self.selection or self.best_metric
        value = summary[metric]
        if value is None:
            return -math.inf
        return float(-value if metric in _LOWER_IS_BETTER else value)

    def _check(self, outputs: jax.Array, labels: jax.Array, wide: bool, kinds: str) -> None:
        """Refuses labels of another shape, or of a kind that is not among NumPy's `kinds`."""
        wanted = outputs.shape if wide else outputs.shape[:1]
        if labels.shape == wanted and np.dtype(labels.dtype).kind in kinds:
            return
        words = {"iu": "integers", "biuf": "0 and 1, or numbers in between", "f": "floats"}[kinds]
        raise ConfigError(
            f"the task {self.name} needs labels of shape {list(wanted)}, {words}; these are "
            f"{labels.dtype} of shape {list(labels.shape)}"
        )


@dataclass(frozen=True)
class SingleLabel(Task):
    """One of K classes: `int [B]` in `0..K-1`. Softmax cross-entropy in nats.

    The weight of an example is that of its class; with smoothing, each class's share of the target
    has its own, as in torch.nn.CrossEntropyLoss. Smoothing: Szegedy et al., arXiv 1512.00567,
    section 7.
    """

    name: ClassVar[str] = "single-label"

    def num_outputs(self, classes: int) -> int:
        """K."""
        return classes

    def label_spec(self, batch: int, classes: int) -> jax.ShapeDtypeStruct:
        """`int32 [B]`."""
        return jax.ShapeDtypeStruct((batch,), np.int32)

    def loss(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
        """Cross-entropy `float [B]`."""
        self._check(outputs, labels, False, "iu")
        self.check_classes(outputs.shape[1])
        if self.label_smoothing == 0 and self.class_weights is None:
            return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        classes = outputs.shape[1]
        target = jax.nn.one_hot(labels, classes, dtype=outputs.dtype)
        target = (1 - self.label_smoothing) * target + self.label_smoothing / classes
        if self.class_weights is not None:
            target *= jnp.asarray(self.class_weights, outputs.dtype)
        return -(target * jax.nn.log_softmax(outputs)).sum(-1)

    def predict(self, outputs: jax.Array) -> jax.Array:
        """The likeliest class, `int [B]`."""
        return outputs.argmax(-1)

    def score(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
        """Whether the class is right, `bool [B]`."""
        return self.predict(outputs) == labels

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Softmax."""
        outputs = np.asarray(outputs, np.float64)
        odds = np.exp(outputs - outputs.max(-1, keepdims=True))
        return odds / odds.sum(-1, keepdims=True)

    def summary(
        self, *, labels: np.ndarray, predictions: np.ndarray, outputs: np.ndarray, classes: int
    ) -> dict[str, Any]:
        """See `metrics.classification`."""
        return metrics.classification(labels, predictions, classes)


@dataclass(frozen=True)
class Ordinal(Task):
    """One of K grades in order: `int [B]` in `0..K-1`. CORN: Shi et al., arXiv 2111.08851.

    Output `j` of K - 1 is the logit of "above `j`, given that it is at least `j`". An example takes
    part in the questions up to its grade (section 3.3), so its loss is the negative log-likelihood
    of its grade, in nats; the paper divides by the number of questions, this by that of examples.
    Chances of being above a grade are products (equation 4), so they never rise with the grade.

    The weight of an example is that of its grade. Smoothing moves the answers to the yes-or-no
    questions towards a half.
    """

    name: ClassVar[str] = "ordinal"
    best_metric: ClassVar[str] = "quadratic_weighted_kappa"
    numbers: ClassVar[tuple[str, ...]] = (*_CLASSIFICATION, "mae")

    def num_outputs(self, classes: int) -> int:
        """K - 1."""
        if classes < 2:
            raise ConfigError(f"the task ordinal needs at least 2 grades, not {classes}")
        return classes - 1

    def label_spec(self, batch: int, classes: int) -> jax.ShapeDtypeStruct:
        """`int32 [B]`."""
        return jax.ShapeDtypeStruct((batch,), np.int32)

    def loss(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
        """Negative log-likelihood `float [B]`."""
        self._check(outputs, labels, False, "iu")
        self.check_classes(outputs.shape[1] + 1)
        question = jnp.arange(outputs.shape[1])
        above = (labels[:, None] > question).astype(outputs.dtype)
        asked = labels[:, None] >= question
        losses = _binary_cross_entropy(outputs, above, self.label_smoothing)
        total = jnp.where(asked, losses, 0).sum(-1)
        if self.class_weights is None:
            return total
        return total * jnp.asarray(self.class_weights, outputs.dtype)[labels]

    def predict(self, outputs: jax.Array) -> jax.Array:
        """The number of grades that it is above with a chance of over a half, `int [B]`."""
        above = jnp.cumsum(jax.nn.log_sigmoid(outputs), axis=-1)
        return (above > math.log(0.5)).sum(-1)

    def score(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
        """Whether the grade is right, `bool [B]`."""
        return self.predict(outputs) == labels

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Differences of the chances of being above each grade."""
        above = np.cumprod(1 / (1 + np.exp(-np.asarray(outputs, np.float64))), axis=-1)
        above = np.pad(above, ((0, 0), (1, 0)), constant_values=1)
        return above - np.pad(above[:, 1:], ((0, 0), (0, 1)))

    def summary(
        self, *, labels: np.ndarray, predictions: np.ndarray, outputs: np.ndarray, classes: int
    ) -> dict[str, Any]:
        """See `metrics.classification`; and `mae`, in grades."""
        mae = float(np.abs(labels - predictions).mean())
        return {**metrics.classification(labels, predictions, classes), "mae": mae}


@dataclass(frozen=True)
class MultiLabel(Task):
    """Any of K labels: `bool` or `float [B, K]` in [0, 1]. Mean binary cross-entropy in nats.

    A class's weight is the factor on its positives, as `pos_weight` of torch.nn.BCEWithLogitsLoss.
    Smoothing moves the targets towards a half.
    """

    name: ClassVar[str] = "multi-label"
    best_metric: ClassVar[str] = "mean_average_precision"
    numbers: ClassVar[tuple[str, ...]] = ("mean_average_precision", "mean_f1", "accuracy")

    def num_outputs(self, classes: int) -> int:
        """K."""
        return classes

    def label_spec(self, batch: int, classes: int) -> jax.ShapeDtypeStruct:
        """`float32 [B, K]`."""
        return jax.ShapeDtypeStruct((batch, classes), np.float32)

    def loss(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
        """Binary cross-entropy, the mean over the labels, `float [B]`."""
        self._check(outputs, labels, True, "biuf")
        self.check_classes(outputs.shape[1])
        factors = None
        if self.class_weights is not None:
            factors = jnp.asarray(self.class_weights, outputs.dtype)
        return _binary_cross_entropy(outputs, labels, self.label_smoothing, factors).mean(-1)

    def predict(self, outputs: jax.Array) -> jax.Array:
        """The labels with a chance of over a half, `bool [B, K]`."""
        return outputs > 0

    def score(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
        """The share of the labels that are right, `float [B]`."""
        return (self.predict(outputs) == (labels > 0.5)).mean(-1)

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Logistic, each label by itself."""
        return 1 / (1 + np.exp(-np.asarray(outputs, np.float64)))

    def summary(
        self, *, labels: np.ndarray, predictions: np.ndarray, outputs: np.ndarray, classes: int
    ) -> dict[str, Any]:
        """See `metrics.multi_label`."""
        return metrics.multi_label(labels > 0.5, predictions, outputs)


@dataclass(frozen=True)
class Regression(Task):
    """A number: `float [B]`. Squared error; there are no classes to weigh or to smooth."""

    name: ClassVar[str] = "regression"
    training_metric: ClassVar[str] = "mae"
    best_metric: ClassVar[str] = "mae"
    numbers: ClassVar[tuple[str, ...]] = ("mae", "rmse")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing or self.class_weights is not None:
            raise ConfigError(
                "task.label_smoothing and task.class_weights are for classes; the task regression "
                "has none"
            )

    def num_outputs(self, classes: int) -> int:
        """1."""
        return 1

    def label_spec(self, batch: int, classes: int) -> jax.ShapeDtypeStruct:
        """`float32 [B]`."""
        return jax.ShapeDtypeStruct((batch,), np.float32)

    def loss(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
        """Squared error `float [B]`."""
        self._check(outputs, labels, False, "f")
        return jnp.square(self.predict(outputs) - labels)

    def predict(self, outputs: jax.Array) -> jax.Array:
        """The number, `float [B]`."""
        return outputs[:, 0]

    def score(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
        """The absolute error, `float [B]`."""
        return jnp.abs(self.predict(outputs) - labels)

    def summary(
        self, *, labels: np.ndarray, predictions: np.ndarray, outputs: np.ndarray, classes: int
    ) -> dict[str, Any]:
        """See `metrics.regression`."""
        return metrics.regression(labels, predictions)


SINGLE_LABEL = SingleLabel()
"""The default of every function that takes a task."""

TASKS: Mapping[str, type[Task]] = {
    task.name: task for task in (SingleLabel, MultiLabel, Regression, Ordinal)
}


def make_task(config: TaskConfig, classes: int) -> Task:
    """The task of a config, for data of K classes.

    Raises:
        ConfigError: for an unknown name, or settings that the task or the data cannot have.
    """
    if config.name not in TASKS:
        raise unknown_name("task", config.name, TASKS)
    task = TASKS[config.name](config.label_smoothing, config.class_weights, config.best_metric)
    task.num_outputs(classes)
    task.check_classes(classes)
    return task


def _binary_cross_entropy(
    logits: jax.Array, targets: jax.Array, smoothing: float, factors: jax.Array | None = None
) -> jax.Array:
    """Elementwise, in nats; `factors` stand before the positive part."""
    targets = targets.astype(logits.dtype) * (1 - smoothing) + smoothing / 2
    positive = targets * jax.nn.log_sigmoid(logits)
    if factors is not None:
        positive *= factors
    return -positive - (1 - targets) * jax.nn.log_sigmoid(-logits)
