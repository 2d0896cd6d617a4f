"""How many bytes a traced program holds at once, without compiling it.

A program is walked in the order it was traced. A buffer lives from the operation that makes it to
the last one that reads it; what a compiler fuses has no buffer. The peak of the sum is the estimate
of XLA's temporary memory. Nothing depends on the size of the arrays but the sums.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jax.extend import core

from patchgd_jax.planner.request import leaf_bytes

_ALIASES = {"reshape", "squeeze", "expand_dims", "name", "stop_gradient", "copy_p", "pvary"}
# Read by an index of the output: a consumer that is fused with them writes no buffer between.
_MOVES = {
    "broadcast_in_dim", "slice", "pad", "iota", "rev", "dynamic_slice", "concatenate",
}  # fmt: skip
_CHEAP = {
    "add", "sub", "mul", "max", "min", "neg", "sign", "abs", "select_n", "convert_element_type",
    "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor", "clamp", "square", "add_any",
    "integer_pow", "is_finite", "copy", "shift_right_logical", "shift_left",
}  # fmt: skip
_COSTLY = {
    "div", "exp", "exp2", "log", "log1p", "expm1", "tanh", "rsqrt", "sqrt", "pow", "logistic",
    "erf", "erfc", "erf_inv", "cos", "sin", "rem", "floor", "round", "cbrt",
}  # fmt: skip
_FUSIBLE = _CHEAP | _COSTLY | _MOVES
_REDUCES = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "argmax",
    "argmin",
}  # fmt: skip
_IN_PLACE = {"dynamic_update_slice", "scatter", "scatter-add", "scatter_add"}
_BARRED = {"checkpoint", "remat", "remat2"}
_BARRIERS = {"optimization_barrier"}
# XLA:CPU gives a sum to a library, with the product that it is of, or, along the last axis, with up
# to so many arrays that are added up for it. A slice, which reads by an index, is written before.
_MOST_ADDED = 16
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclass
class _Value:
    """An array of the program; several names of one array are one value."""

    size: int
    elements: int = 0
    grows: bool = False
    """Its size is in proportion to the batch."""
    maker: int = 0
    """The number of the operation that writes it."""
    uses: list[int] = field(default_factory=list)
    kept: bool = False
    """It is there whatever happens: an input of the program."""
    virtual: bool = False
    """It is fused away."""
    summed: bool = False
    """A sum along the last axis reads it, directly or through what is fused; for a slice, a sum
    that it is written for."""
    last: int = -1

    def bytes(self, scale: float) -> int:
        return round(self.size * scale) if self.grows else self.size


@dataclass
class _Op:
    name: str
    reads: list[_Value]
    writes: list[_Value]
    inner: list[tuple[_Program, list[Any], set[int], list[_Value]]] = field(default_factory=list)
    """Bodies: their outputs, which of them are written in place, and what is counted outside."""
    sums_rows: bool = False
    """It is a sum along the last axis."""
    scope: int = 0
    """What is computed again together has one scope; 0: it is computed once."""

    def workspace(self, scale: float) -> int:
        """What its bodies need beside its inputs and outputs."""
        if not self.inner:
            return 0
        needs = [
            program.peak(outputs, in_place, scale) - sum(v.bytes(scale) for v in outside)
            for program, outputs, in_place, outside in self.inner
        ]
        return max(0, *needs)

    @property
    def fusible(self) -> bool:
        return self.name in _FUSIBLE


class TracedProgram:
    """A program whose peak can be asked for, also for another batch than it was traced with.

    Args:
        closed: from `jax.make_jaxpr`.
        platform: which branch of `lax.platform_dependent` is taken: cpu, cuda, rocm or tpu.
        batch: the size of the leading axis; arrays whose number of elements is a multiple of it
            grow with it. To tell them from all others it should be a prime.
    """

    def __init__(self, closed: Any, *, platform: str, batch: int = 1) -> None:
        jaxpr = closed.jaxpr
        self._program = _Program(platform, batch)
        given = (*jaxpr.constvars, *jaxpr.invars)
        inputs = [self._program.value(v, kept=True) for v in given]
        self._outputs = self._program.add(jaxpr, inputs)
        self._batch = batch
        self._peak = cache(lambda scale: self._program.peak(self._outputs, set(), scale))

    def peak_bytes(self, batch: float | None = None) -> int:
        """The most bytes that live at once beside the program's inputs, for a batch."""
        return self._peak(1.0 if batch is None else batch / self._batch)


class _Program:
    """Operations in order, with all calls written out."""

    def __init__(self, platform: str, batch: int) -> None:
        self.platform = platform
        self.batch = batch
        self.ops: list[_Op] = [_Op("start", [], [])]
        self.known: dict[Any, list[Any]] = {}
        self.scope = 0
        # By scope, the number of the operation it begins with.
        self.begins = [0]
        # By the value that it is of, an error function's number.
        self.error_functions: dict[int, int] = {}
        # Filled when it is first asked for; nothing is added after that.
        self._lives: list[tuple[int, _Op, list[_Value]]] | None = None

    def value(self, var: Any, kept: bool = False) -> _Value:
        size = leaf_bytes(var.aval)
        if self.platform == "cpu" and not kept and var.aval.dtype == "bfloat16":
            size *= 2
        grows = var.aval.size > 0 and var.aval.size % self.batch == 0
        return _Value(size, var.aval.size, grows=grows, kept=kept)

    def add(self, jaxpr: Any, inputs: list[Any]) -> list[Any]:
        """Appends a jaxpr's operations; returns its outputs, None for literals."""
        env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=True))
        platforms: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            return None if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            values = [read(atom) for atom in eqn.invars]
            if name == "platform_index":
                platforms[eqn.outvars[0]] = eqn.params["platforms"]
                env[eqn.outvars[0]] = None
            elif name in _ALIASES:
                env[eqn.outvars[0]] = values[0]
            elif name == "cond":
                index = eqn.invars[0]
                outs = self._cond(eqn, platforms.get(index), values[1:])
                env.update(zip(eqn.outvars, outs, strict=True))
            elif name in ("scan", "while"):
                self._loop(eqn, values, env)
            elif inner := next((eqn.params[c] for c in _CALLS if c in eqn.params), None):
                closed = hasattr(inner, "consts")
                body = inner.jaxpr if closed else inner
                consts = [self.value(v, kept=True) for v in body.constvars]
                outer = self.scope
                if name in _BARRED:
                    self.scope = len(self.begins)
                    self.begins.append(len(self.ops))
                outs = self.add(body, [*consts, *values])
                self.scope = outer
                env.update(zip(eqn.outvars, outs, strict=True))
            else:
                key = self._key(eqn, values)
                if key in self.known:
                    env.update(zip(eqn.outvars, self.known[key], strict=True))
                    continue
                outs = [self.value(var) for var in eqn.outvars]
                self.known[key] = outs
                read_values = [v for v in values if v is not None]
                if name == "select_and_scatter_add" and self.platform == "cpu":
                    read_values.append(self._pixel_numbers(outs[0]))
                rows = name == "reduce_sum" and (
                    tuple(eqn.params["axes"]) == (len(eqn.invars[0].aval.shape) - 1,)
                )
                self._append(_Op(name, read_values, outs, sums_rows=rows))
                self._share_exponential(name, read_values, outs)
                env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _key(self, eqn: Any, values: list[Any]) -> Any:
        """The same for operations that a compiler finds to be one."""
        read = tuple(
            str(atom.val) if value is None and isinstance(atom, core.Literal) else id(value)
            for atom, value in zip(eqn.invars, values, strict=True)
        )
        try:
            key = (self.scope, eqn.primitive, tuple(sorted(eqn.params.items())), read)
            hash(key)
        except TypeError:
            return object()
        return key

    def _pixel_numbers(self, out: _Value) -> _Value:
        """What XLA:CPU makes of the gradient of a max pooling, at the start of the program.

        It becomes a scatter, for which it writes four numbers and a zero for every pixel.
        """
        numbers = _Value(out.size + 16 * out.elements, grows=out.grows)
        self.ops[0].writes.append(numbers)
        return numbers

    def _append(self, op: _Op) -> None:
        number = len(self.ops)
        op.scope = self.scope
        self.ops.append(op)
        for value in op.writes:
            value.maker = number
        for value in op.reads:
            value.uses.append(number)

    def _share_exponential(self, name: str, reads: list[_Value], outs: list[_Value]) -> None:
        """Notes that an error function reads the exponential that its gradient is made of.

        XLA works erfc(x) out from exp(-x^2), and finds that to be the one in its derivative.
        """
        if name == "erfc" and reads:
            self.error_functions[id(reads[0])] = len(self.ops) - 1
        elif name == "exp":
            square = [v for negative in reads for v in self._made_of(negative, "neg")]
            of = [v for value in square for v in self._made_of(value, "square")]
            shared = [self.error_functions[id(v)] for v in of if id(v) in self.error_functions]
            outs[0].uses.extend(shared)

    def _made_of(self, value: _Value, name: str) -> list[_Value]:
        """What a value is made of by an operation of that name; nothing if by another."""
        maker = self.ops[value.maker]
        return maker.reads if maker.name == name else []

    def _cond(self, eqn: Any, platforms: Any, values: list[Any]) -> list[Any]:
        branches = eqn.params["branches"]
        if platforms is not None:
            chosen = next(
                i for i, names in enumerate(platforms) if names is None or self.platform in names
            )
            body = branches[chosen]
            consts = [self.value(v, kept=True) for v in body.jaxpr.constvars]
            return self.add(body.jaxpr, [*consts, *values])
        outs = [self.value(var) for var in eqn.outvars]
        op = _Op("cond", [v for v in values if v is not None], outs)
        for body in branches:
            inner = _Program(self.platform, self.batch)
            names = (*body.jaxpr.constvars, *body.jaxpr.invars)
            results = inner.add(body.jaxpr, [inner.value(v, kept=True) for v in names])
            op.inner.append((inner, results, set(), outs))
        self._append(op)
        return outs

    def _loop(self, eqn: Any, values: list[Any], env: dict[Any, Any]) -> None:
        """A loop is one operation whose workspace is the peak of its body."""
        params = eqn.params
        if eqn.primitive.name == "scan":
            body = params["jaxpr"]
            # By shapes: jax names the counts differently from version to version.
            outer, inside = eqn.outvars, body.jaxpr.outvars
            carried = sum(o.aval.shape == i.aval.shape for o, i in zip(outer, inside, strict=True))
            outer, inside = eqn.invars, body.jaxpr.invars
            sliced = sum(o.aval.shape != i.aval.shape for o, i in zip(outer, inside, strict=True))
            consts = len(inside) - carried - sliced
        else:
            body = params["body_jaxpr"]
            values = values[params["cond_nconsts"] :]
            consts = params["body_nconsts"]
            carried = len(eqn.outvars)
        inner = _Program(self.platform, self.batch)
        variables = body.jaxpr.invars
        inputs = [inner.value(v, kept=True) for v in body.jaxpr.constvars]
        inputs += [inner.value(v, kept=True) for v in variables[:consts]]
        carry = [inner.value(v) for v in variables[consts : consts + carried]]
        inner._append(_Op("carry", [], carry))
        slices = [inner.value(v) for v in variables[consts + carried :]]
        for value in slices:
            inner._append(_Op("dynamic_slice", [], [value]))
        results = inner.add(body.jaxpr, [*inputs, *carry, *slices])
        # What is stacked is written in its place by the operation that makes it.
        stacked = {id(v) for v in results[carried:] if v is not None}
        outs = [self.value(var) for var in eqn.outvars]
        read = [v for v in values if v is not None]
        self._append(_Op("loop", read, outs, [(inner, results, stacked, carry)]))
        env.update(zip(eqn.outvars, outs, strict=True))

    def peak(self, outputs: list[Any], in_place: set[int], scale: float) -> int:
        """The peak of the bytes that live at once; `in_place` outputs take none."""
        if self._lives is None:
            self._lives = self._find_lives(outputs, in_place)
        dying: list[list[_Value]] = [[] for _ in range(len(self.ops) + 1)]
        live = best = 0
        for number, op, made in self._lives:
            size = sum(v.bytes(scale) for v in made)
            gone = sum(v.bytes(scale) for v in dying[number])
            in_its_place = op.fusible or op.name in _IN_PLACE or op.name == "loop"
            reused = min(size, gone) if in_its_place else 0
            best = max(best, live + size - reused + op.workspace(scale))
            live += size - gone
            for value in made:
                if value.last <= number:
                    live -= value.bytes(scale)
                else:
                    dying[value.last].append(value)
        return best

    def _find_lives(
        self, outputs: list[Any], in_place: set[int]
    ) -> list[tuple[int, _Op, list[_Value]]]:
        """The operations that are needed, and what each of them writes; no size matters for it."""
        end = len(self.ops)
        wanted = {id(v) for v in outputs if v is not None}
        needed = [False] * end
        for number in range(end - 1, -1, -1):
            needed[number] = any(
                id(v) in wanted or any(needed[use] for use in v.uses)
                for v in self.ops[number].writes
            )
        self._fuse(wanted, needed)
        self._find_last_reads(wanted, needed)
        together = self._together(needed)
        elsewhere = {id(v) for values in together.values() for v in values}
        lives = []
        for number, op in enumerate(self.ops):
            if needed[number]:
                own = [v for v in op.writes if not v.virtual and not v.kept]
                made = [v for v in own if id(v) not in elsewhere] + together.get(number, [])
                lives.append((number, op, [v for v in made if id(v) not in in_place]))
        return lives

    def _find_last_reads(self, wanted: set[int], needed: list[bool]) -> None:
        end = len(self.ops)
        for number in range(end - 1, -1, -1):
            if not needed[number]:
                continue
            for value in self.ops[number].writes:
                value.last = end if id(value) in wanted else number
                for use in value.uses:
                    if needed[use]:
                        # Through what is fused, a value is read where the fusion is computed.
                        fused = [w.last for w in self.ops[use].writes if w.virtual]
                        value.last = max(value.last, use, *fused)

    def _together(self, needed: list[bool]) -> dict[int, list[_Value]]:
        """What is made at other operations than its own.

        XLA:CPU sums no slices as it reads them: it writes all those of one array first, where it
        is computed again as soon as it is there.
        """
        end = len(self.ops)
        groups: dict[int, list[int]] = {}
        for number, op in enumerate(self.ops):
            if op.name != "slice" or not needed[number]:
                continue
            if op.writes[0].summed and not op.writes[0].virtual:
                groups.setdefault(id(op.reads[0]), []).append(number)
        made: dict[int, list[_Value]] = {}
        for numbers in groups.values():
            at = next(n for n in range(self._ready(numbers[0]), end) if needed[n])
            made.setdefault(at, []).extend(self.ops[number].writes[0] for number in numbers)
        return made

    def _ready(self, number: int) -> int:
        """The first operation of its scope after which an operation could be."""
        op = self.ops[number]
        if op.scope == 0:
            return number
        earliest, seen, pending = self.begins[op.scope], set[int](), list(op.reads)
        while pending:
            value = pending.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if value.virtual:
                # It is read where the fusion is computed.
                pending += self.ops[value.maker].reads
            else:
                earliest = max(earliest, value.maker + 1)
        return min(earliest, number)

    def _fuse(self, wanted: set[int], needed: list[bool]) -> None:
        for number in range(len(self.ops) - 1, -1, -1):
            op = self.ops[number]
            for value in op.writes:
                uses = [use for use in value.uses if needed[use]]
                readers = [self.ops[use] for use in uses]
                fused = all(r.fusible or r.name in _REDUCES for r in readers)
                cheap = op.name not in _COSTLY or len(readers) <= 1
                value.summed = any(
                    r.sums_rows or any(w.virtual and w.summed for w in r.writes) for r in readers
                )
                if self.platform == "cpu" and op.name == "slice":
                    value.summed = self._is_written(number, readers, needed)
                    if value.summed:
                        continue
                value.virtual = op.name in _BARRIERS or (
                    op.fusible and id(value) not in wanted and fused and cheap
                )

    def _is_written(self, number: int, readers: list[_Op], needed: list[bool]) -> bool:
        """Whether a slice is written for a sum that would otherwise read it as it is fused."""
        op = self.ops[number]
        products = [r.writes[0] for r in readers if r.name == "mul"]
        sums = [self.ops[use] for w in products for use in w.uses if needed[use]]
        if any(r.name == "reduce_sum" for r in (*readers, *sums)):
            return True
        # Of many slices that are added up first, the last are.
        after = [self.ops[use] for use in op.reads[0].uses if use > number]
        last = sum(other.name == "slice" for other in after) < _MOST_ADDED - 1
        return op.writes[0].summed and last
