"""Parses labels from text into a task's arrays."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from patchgd_jax.errors import ConfigError
from patchgd_jax.io.text import printable

_DIGITS = re.compile(r"([0-9]{1,18})(\.0+)?")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_MOST_GRADES = 1000

Problem = tuple[int | None, str]
"""Index of a label, or None for all of them, and its error."""


class ParsedLabels(NamedTuple):
    """Labels as arrays."""

    labels: np.ndarray
    """`int64 [n]` class index; `float32 [n, K]` of 0 and 1 for multi-label; `float32 [n]` for
    regression."""
    class_names: tuple[str, ...]
    """Names by class index; empty for regression."""
    problems: tuple[Problem, ...]
    """The arrays are valid only if there are none."""


def natural_key(text: str) -> tuple[object, ...]:
    """Returns a key that sorts numbers within text by value: `a2` before `a10`."""
    parts = re.split(r"([0-9]+)", text)
    # Compares the digits, as int() refuses very long numbers.
    numbers = [(len(part.lstrip("0")), part.lstrip("0")) for part in parts[1::2]]
    return tuple(zip(parts[::2], [*numbers, (0, "")], strict=True)), text


def parse_labels(
    texts: Sequence[str], task_name: str, class_names: Sequence[str] | None = None
) -> ParsedLabels:
    """Parses labels into arrays.

    single-label: names, in natural order (`a2` before `a10`); or, if all are integers without
    leading zeros, these are the class indices, and each from 0 to the highest must occur.
    ordinal: integers, the grades; some below the highest may be missing. multi-label: the names or
    integers of an image, separated by `;`; a lone `;` for none. regression: a decimal number.

    Args:
        texts: one label for each image, without surrounding space.
        task_name: a name of `tasks.TASKS`.
        class_names: the classes in the order of their indices, such as a trained model's. None:
            found from the labels, which must then differ.

    Raises:
        ConfigError: for a task without a text format of labels.
    """
    if task_name == "regression":
        return _numbers(texts)
    if task_name not in ("single-label", "multi-label", "ordinal"):
        raise ConfigError(f"labels of the task {task_name!r} cannot be read from a file")
    several = task_name == "multi-label"
    names = [_split(text) if several else (text,) for text in texts]
    each = [(index, name) for index, row in enumerate(names) for name in row]
    used: dict[str, int] = {}
    for index, name in each:
        if name:
            used.setdefault(name, index)
    problems: list[Problem] = [
        (index, "the label is empty" + ("; write ; if none applies" if several else ""))
        for index, row in enumerate(names)
        if "" in row
    ]
    if class_names is None:
        classes, wrong = _find_classes(used, task_name)
        problems += wrong
        if not problems and len(set(map(frozenset, names))) == 1:
            problems.append((None, _all_equal(texts[0])))
    else:
        classes = tuple(class_names)
    index_of = {name: index for index, name in enumerate(classes)}
    for name in used:
        if name not in index_of and (integer := str(_integer(name))) in index_of:
            index_of[name] = index_of[integer]
    if class_names is not None:
        unknown = [(index, name) for index, name in each if name and name not in index_of]
        problems += [(index, _unknown(name, classes)) for index, name in unknown]
    if not several:
        indices = [index_of.get(name, 0) for (name,) in names]
        return ParsedLabels(np.array(indices, np.int64), classes, tuple(problems))
    labels = np.zeros((len(names), len(classes)), np.float32)
    for vector, row in zip(labels, names, strict=True):
        vector[[index_of[name] for name in row if name in index_of]] = 1
    return ParsedLabels(labels, classes, tuple(problems))


def _split(text: str) -> tuple[str, ...]:
    return () if text == ";" else tuple(name.strip() for name in text.split(";"))


def _quoted(text: str) -> str:
    return repr(printable(text))


def _all_equal(label: str) -> str:
    return f"every label is {_quoted(label)}: there is nothing to learn"


def _integer(name: str) -> int | None:
    """Value of a non-negative integer label such as `2` or `2.0`; None for others."""
    match = _DIGITS.fullmatch(name)
    return int(match[1]) if match else None


def _find_classes(used: Mapping[str, int], task_name: str) -> tuple[tuple[str, ...], list[Problem]]:
    """Classes of the labels, given by name with the index of an image each; and problems."""
    integers = {name: _integer(name) for name in used}
    others = [name for name, integer in integers.items() if integer is None]
    values = {integer: name for name, integer in integers.items() if integer is not None}
    if task_name == "ordinal" and others:
        return (), [
            (used[name], f"the label {_quoted(name)} is no grade; write grades as integers from 0")
            for name in others
        ]
    if others and values:
        rest = _quoted(next(iter(values.values())))
        return (), [
            (
                used[name],
                f"the label {_quoted(name)} is no integer, but others are, such as {rest}; use "
                "one kind",
            )
            for name in others
        ]
    padded = any(name.split(".")[0] != str(integer) for name, integer in integers.items())
    if others or (padded and task_name != "ordinal"):
        return tuple(sorted(used, key=natural_key)), []
    highest = max(values, default=-1)
    if task_name == "ordinal":
        if highest >= _MOST_GRADES:
            reason = f"the label {_quoted(values[highest])} is above the highest possible grade"
            return (), [(used[values[highest]], f"{reason}, {_MOST_GRADES - 1}")]
    elif highest >= len(values):
        missing = list(itertools.islice((i for i in range(highest) if i not in values), 4))
        few = ", ".join(map(str, missing[:3])) + (", ..." if len(missing) > 3 else "")
        reason = f"the labels are integers up to {highest}, but no image has {few}; number the "
        return (), [(None, reason + "classes from 0 without gaps, or give them names with letters")]
    return tuple(map(str, range(highest + 1))), []


def _unknown(name: str, classes: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
    known = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    hint = f"did you mean {near[0]!r}?" if near else f"they are {known}"
    return f"the label {_quoted(name)} is none of the {len(classes)} classes; {hint}"


def parse_number(text: str) -> float | None:
    """Parses a decimal number that is finite in float32; None for any other text."""
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if abs(value) <= float(np.finfo(np.float32).max) else None


def _numbers(texts: Sequence[str]) -> ParsedLabels:
    labels = np.zeros(len(texts), np.float32)
    problems: list[Problem] = []
    for index, text in enumerate(texts):
        value = parse_number(text)
        if not text:
            problems.append((index, "the label is empty"))
        elif value is None:
            problems.append((index, f"the label {_quoted(text)} is no decimal number, such as 1.5"))
        else:
            labels[index] = value
    if not problems and len(set(labels.tolist())) == 1:
        problems.append((None, _all_equal(texts[0])))
    return ParsedLabels(labels, (), tuple(problems))
