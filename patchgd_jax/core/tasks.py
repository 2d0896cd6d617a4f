"""Tasks: the label format, and the loss, prediction and metrics that go with it."""

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
from jax import Array

from patchgd_jax.config import TaskConfig
from patchgd_jax.core import metrics
from patchgd_jax.errors import ConfigError, unknown_name

_CLASSIFICATION = ("accuracy", "balanced_accuracy", "quadratic_weighted_kappa")
_LOWER_IS_BETTER = frozenset({"loss", "mae", "rmse"})


@dataclass(frozen=True)
class Task(ABC):
    """A label format with its loss and metrics. Hashable: static in the jitted step.

    K is the number of classes of the data; O is `num_outputs(K)`. Raises `ConfigError` for a value
    that the task cannot have.

    Args:
        label_smoothing: share of a target that is spread evenly over all classes.
        class_weights: K factors on the loss; see each task. None: 1. A batch's mean is over its
            examples, not over their weights, so that an example counts alike in every batch.
        selection: metric of `summary`, or `loss`, that chooses the best checkpoint. None:
            `best_metric`.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    selection: str | None = None

    name: ClassVar[str]
    training_metric: ClassVar[str] = "accuracy"
    """Name of the mean of `score`."""
    best_metric: ClassVar[str] = "accuracy"
    """Metric of `summary` that chooses the best checkpoint, unless `selection` is set."""
    numbers: ClassVar[tuple[str, ...]] = _CLASSIFICATION
    """Metrics of `summary` that are single numbers, the most important first."""

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
        """Returns the task without smoothing and weights, whose loss compares between runs."""
        return dataclasses.replace(self, label_smoothing=0.0, class_weights=None)

    def check_classes(self, classes: int) -> None:
        """Raises `ConfigError` if there are not as many class weights as classes."""
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise ConfigError(
                f"task.class_weights has {len(self.class_weights)} values, but the data have "
                f"{classes} classes; give one for each"
            )

    @abstractmethod
    def num_outputs(self, classes: int) -> int:
        """Returns O, the length of the head's output, for K classes."""

    @abstractmethod
    def label_spec(self, batch: int, classes: int) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype of the labels of a batch of B."""

    @abstractmethod
    def loss(self, outputs: Array, labels: Array) -> Array:
        """Computes the loss `float [B]` of each example from `outputs float [B, O]`.

        Raises `ConfigError` if the labels are not as in `label_spec`, or class weights differ in
        number.
        """

    @abstractmethod
    def predict(self, outputs: Array) -> Array:
        """Predicts labels from `outputs float [B, O]`."""

    @abstractmethod
    def score(self, outputs: Array, labels: Array) -> Array:
        """Computes the training metric of each example, `bool` or `float [B]`."""

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Computes class probabilities `float64 [B, K]` on the host, if the task has classes."""
        raise ConfigError(f"the task {self.name} gives no probabilities")

    @abstractmethod
    def summary(
        self, *, labels: np.ndarray, predictions: np.ndarray, outputs: np.ndarray, classes: int
    ) -> dict[str, Any]:
        """Computes the metrics of an evaluation on the host; arrays hold all examples."""

    def rank(self, summary: Mapping[str, Any]) -> float:
        """Returns a number that is higher for a better evaluation."""
        metric = self.selection or self.best_metric
        value = summary[metric]
        if value is None:
            return -math.inf
        return float(-value if metric in _LOWER_IS_BETTER else value)

    def _check(self, outputs: Array, labels: Array, wide: bool, kinds: str) -> None:
        """Raises `ConfigError` for labels of another shape, or not of NumPy's `kinds`."""
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
        """Returns K."""
        return classes

    def label_spec(self, batch: int, classes: int) -> jax.ShapeDtypeStruct:
        """`int32 [B]`."""
        return jax.ShapeDtypeStruct((batch,), np.int32)

    def loss(self, outputs: Array, labels: Array) -> Array:
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

    def predict(self, outputs: Array) -> Array:
        """Most probable class, `int [B]`."""
        return outputs.argmax(-1)

    def score(self, outputs: Array, labels: Array) -> Array:
        """Correctness of the class, `bool [B]`."""
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
    """One of K ordered classes: `int [B]` in `0..K-1`. CORN: Shi et al., arXiv 2111.08851.

    Output `j` of K - 1 is the logit of "above `j`, given at least `j`". An example takes part in
    the binary tasks up to its class (section 3.3), so its loss is the negative log-likelihood of
    its class, in nats; the paper divides by the number of binary tasks, this by that of examples.
    Probabilities of being above a class are products (equation 4), so they never rise with it.

    The weight of an example is that of its class. Smoothing moves the binary targets towards 1/2.
    """

    name: ClassVar[str] = "ordinal"
    best_metric: ClassVar[str] = "quadratic_weighted_kappa"
    numbers: ClassVar[tuple[str, ...]] = (*_CLASSIFICATION, "mae")

    def num_outputs(self, classes: int) -> int:
        """Returns K - 1."""
        if classes < 2:
            raise ConfigError(f"the task ordinal needs at least 2 classes, not {classes}")
        return classes - 1

    def label_spec(self, batch: int, classes: int) -> jax.ShapeDtypeStruct:
        """`int32 [B]`."""
        return jax.ShapeDtypeStruct((batch,), np.int32)

    def loss(self, outputs: Array, labels: Array) -> Array:
        """Negative log-likelihood `float [B]`."""
        self._check(outputs, labels, False, "iu")
        self.check_classes(outputs.shape[1] + 1)
        threshold = jnp.arange(outputs.shape[1])
        above = (labels[:, None] > threshold).astype(outputs.dtype)
        reached = labels[:, None] >= threshold
        losses = _binary_cross_entropy(outputs, above, self.label_smoothing)
        total = jnp.where(reached, losses, 0).sum(-1)
        if self.class_weights is None:
            return total
        return total * jnp.asarray(self.class_weights, outputs.dtype)[labels]

    def predict(self, outputs: Array) -> Array:
        """Number of thresholds passed with probability above 0.5, `int [B]`."""
        above = jnp.cumsum(jax.nn.log_sigmoid(outputs), axis=-1)
        return (above > math.log(0.5)).sum(-1)

    def score(self, outputs: Array, labels: Array) -> Array:
        """Correctness of the class, `bool [B]`."""
        return self.predict(outputs) == labels

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Differences of the probabilities of being above each class."""
        above = np.cumprod(1 / (1 + np.exp(-np.asarray(outputs, np.float64))), axis=-1)
        above = np.pad(above, ((0, 0), (1, 0)), constant_values=1)
        return above - np.pad(above[:, 1:], ((0, 0), (0, 1)))

    def summary(
        self, *, labels: np.ndarray, predictions: np.ndarray, outputs: np.ndarray, classes: int
    ) -> dict[str, Any]:
        """See `metrics.classification`; and `mae`, in classes."""
        mae = float(np.abs(labels - predictions).mean())
        return {**metrics.classification(labels, predictions, classes), "mae": mae}


@dataclass(frozen=True)
class MultiLabel(Task):
    """Any of K labels: `bool` or `float [B, K]` in [0, 1]. Mean binary cross-entropy in nats.

    A class's weight is the factor on its positives, as `pos_weight` of torch.nn.BCEWithLogitsLoss.
    Smoothing moves the targets towards 1/2.
    """

    name: ClassVar[str] = "multi-label"
    best_metric: ClassVar[str] = "mean_average_precision"
    numbers: ClassVar[tuple[str, ...]] = ("mean_average_precision", "mean_f1", "accuracy")

    def num_outputs(self, classes: int) -> int:
        """Returns K."""
        return classes

    def label_spec(self, batch: int, classes: int) -> jax.ShapeDtypeStruct:
        """`float32 [B, K]`."""
        return jax.ShapeDtypeStruct((batch, classes), np.float32)

    def loss(self, outputs: Array, labels: Array) -> Array:
        """Binary cross-entropy, the mean over the labels, `float [B]`."""
        self._check(outputs, labels, True, "biuf")
        self.check_classes(outputs.shape[1])
        factors = None
        if self.class_weights is not None:
            factors = jnp.asarray(self.class_weights, outputs.dtype)
        return _binary_cross_entropy(outputs, labels, self.label_smoothing, factors).mean(-1)

    def predict(self, outputs: Array) -> Array:
        """Labels with probability above 0.5, `bool [B, K]`."""
        return outputs > 0

    def score(self, outputs: Array, labels: Array) -> Array:
        """Share of correct labels, `float [B]`."""
        return (self.predict(outputs) == (labels > 0.5)).mean(-1)

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Sigmoid of each output."""
        return 1 / (1 + np.exp(-np.asarray(outputs, np.float64)))

    def summary(
        self, *, labels: np.ndarray, predictions: np.ndarray, outputs: np.ndarray, classes: int
    ) -> dict[str, Any]:
        """See `metrics.multi_label`."""
        return metrics.multi_label(labels > 0.5, predictions, outputs)


@dataclass(frozen=True)
class Regression(Task):
    """A number: `float [B]`. Squared error, without class weights and smoothing."""

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
        """Returns 1."""
        return 1

    def label_spec(self, batch: int, classes: int) -> jax.ShapeDtypeStruct:
        """`float32 [B]`."""
        return jax.ShapeDtypeStruct((batch,), np.float32)

    def loss(self, outputs: Array, labels: Array) -> Array:
        """Squared error `float [B]`."""
        self._check(outputs, labels, False, "f")
        return jnp.square(self.predict(outputs) - labels)

    def predict(self, outputs: Array) -> Array:
        """Predicted number, `float [B]`."""
        return outputs[:, 0]

    def score(self, outputs: Array, labels: Array) -> Array:
        """Absolute error, `float [B]`."""
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
    """Makes the task of a config for data of K classes; ConfigError if the two do not fit."""
    if config.name not in TASKS:
        raise unknown_name("task", config.name, TASKS)
    task = TASKS[config.name](config.label_smoothing, config.class_weights, config.best_metric)
    task.num_outputs(classes)
    task.check_classes(classes)
    return task


def _binary_cross_entropy(
    logits: Array, targets: Array, smoothing: float, factors: Array | None = None
) -> Array:
    """Computes it elementwise, in nats; `factors` scale the positive part."""
    targets = targets.astype(logits.dtype) * (1 - smoothing) + smoothing / 2
    positive = targets * jax.nn.log_sigmoid(logits)
    if factors is not None:
        positive *= factors
    return -positive - (1 - targets) * jax.nn.log_sigmoid(-logits)
