"""Whether two builds of normext compute the same bits: one records digests of many random calls, the other compares.

    PYTHONPATH=before python tests/same_bits.py record FILE
    PYTHONPATH=after python tests/same_bits.py compare FILE

The calls are of all norms, forward and backward, on any layout, dtype and option, and on data up to the ends of the
range. Each has a number, from which it is drawn; what differs is named together with it, and ``--only NUMBER`` runs
that one again. NORMEXT_ISA and NORMEXT_NUM_THREADS choose what is compared; the second must not matter.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from norm_cases import DTYPES, NORMS, Case, Layout, Placed, forward_and_backward

import normext
from normext._core.arrays import batch_backward_apply, batch_backward_sums, batch_moments
from normext._core.runtime import config

LARGE = 1 << 22  # elements: the result goes around the caches


class Trial(NamedTuple):
    """A case and where its arrays lie."""

    case: Case
    layouts: dict[str, Layout]  # of the arrays that are not as `Case.draw` gives them; "out" and "dx_out": of results
    running_dtype: str
    out: str  # "new", "out", or "x": in place
    dx_out: str  # "new", "out", or "dy"

    def results(self) -> dict[str, np.ndarray]:
        """What the calls compute, by name; what they raise instead, as an array of text."""
        case, arrays, outs = self.case, self.case.draw(), {}
        for name in ("running_mean", "running_var"):
            arrays[name] = arrays[name].astype(self.running_dtype)
        for name, layout in self.layouts.items():
            arrays[name] = Placed(arrays[name] if name in arrays else np.zeros_like(arrays["x"]), layout).array
        for name, where in (("out", self.out), ("dx_out", self.dx_out)):
            if where != "new" and (case.fused or where != "x"):
                outs[name] = arrays[where if where in arrays else name]
        try:
            results = batch_norm_in_parts(case, arrays) if case.norm == "batch_norm" else {}
            results |= forward_and_backward(case, arrays, **outs)
            if self.out == "x" and not case.fused:  # last, as it leaves nothing to go backward from
                y, cache = getattr(normext, case.norm)(arrays["x"], out=arrays["x"], **case.arguments(arrays))
                results |= {"y in place": y, "mean in place": cache.mean, "rstd in place": cache.rstd}
        except (TypeError, ValueError) as error:
            results = {"error": np.array(f"{type(error).__name__}: {error}")}
        return results | {name: arrays[name] for name in ("running_mean", "running_var")}


def batch_norm_in_parts(case: Case, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `normext.distributed` calls, which leaves all arrays as they are."""
    copies = {name: arrays[name].copy() for name in ("running_mean", "running_var")}
    mean, var = batch_moments(arrays["x"], case.axis)
    _, cache = normext.batch_norm(arrays["x"], **case.arguments(arrays | copies))
    sums = batch_backward_sums(arrays["dy"], cache)
    count = 3.0 * max(1, arrays["x"].size // case.shape[case.axis])
    dx = batch_backward_apply(arrays["dy"], cache, 3 * sums, count)
    return {"moments' mean": mean, "moments' var": var, "sums": sums, "dx of sums": dx}


# What is drawn ------------------------------------------------------------


class Draw:
    """A trial from its number."""

    def __init__(self, seed: int, number: int) -> None:
        self.rng = np.random.default_rng([seed, number])

    def of(self, *options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def upto(self, n: int) -> int:
        """From 1 on, small numbers as often as large ones."""
        return int(math.exp(self.rng.uniform(0, math.log(n + 1))))

    def shape(self) -> tuple[int, ...]:
        pixels = self.of((1,), (2, 2), (7, 7), (14, 14), (5, 13), (60, 60))
        family = self.rng.integers(100)
        if family < 36:
            return tuple(self.rng.integers(1, 8, self.of(1, 2, 2, 3, 3, 4, 4)).tolist())
        if family < 54:  # one long axis: whole vectors and blocks, and remainders of them
            shape = self.rng.integers(1, 6, self.of(2, 3, 4))
            shape[self.rng.integers(len(shape))] = self.of(16, 64, 65, 256, 257, 1000, 4099, self.upto(3000))
            return tuple(shape.tolist())
        if family < 60:  # long rows, or two channels
            return self.of((1, 70_000), (3, 70_000), (70_000,), (2, 70_001), (70_000, 2), (2, 2, 40_000))
        if family < 66:  # many short rows
            return (self.upto(60_000), self.upto(9))
        if family < 74:  # many columns, or few
            return self.of(
                (self.upto(300), 2000), (self.upto(30), 3, 700), (self.upto(30_000), 3), (300, self.upto(1000))
            )
        if family < 97:  # images
            channels = self.of(1, 2, 3, 6, 16, 32, 64, 96, self.upto(400))
            examples = self.upto(max(1, 200_000 // channels // math.prod(pixels)))
            shape = (examples, channels, *pixels)
            return shape if self.chance(0.6) else (examples, *pixels, channels)
        if family < 98:
            return (self.of(0, 3), self.of(0, 2), 4)
        return self.of((4096, LARGE // 4096), (LARGE // 512, 512), (8, 16, LARGE // 128), (2, LARGE // 32, 4, 4))

    def case(self) -> Case:
        norm, dtype, shape = self.of(*NORMS), self.of(*DTYPES, "float32", "float64"), self.shape()
        grouped = norm in ("group_norm", "instance_norm")
        if grouped and len(shape) == 1:
            shape = (self.of(1, 4), *shape)
        axis = int(self.rng.integers(int(grouped), len(shape)))
        if self.chance(0.6):  # where it usually is
            axis = len(shape) - 1 if self.chance(0.5) or len(shape) == 1 else 1
        most = {"float16": 3, "bfloat16": 36, "float32": 36, "float64": 300}[dtype]
        extreme = self.chance(0.3)
        scale = 10.0 ** self.rng.uniform(-most, most) if extreme else self.of(1.0, 1.0, 0.01, 30.0)
        kinds = ["normal"] * 6 + ["lattice", "padded", "constant", "broken"] + ["uneven"] * (dtype != "float16")
        divisors = [g for g in range(1, shape[axis] + 1) if shape[axis] % g == 0] or [1]
        return Case(
            norm,
            shape,
            axis,
            dtype,
            self.of(*divisors),
            gamma=self.chance(0.7),
            beta=self.chance(0.7),
            eps=self.of(0.0, 0.0, 1e-5) if extreme else self.of(1e-5, 1e-5, 1e-3, 1.0, 0.0, 1e-12),
            running=self.chance(0.6),
            unbiased=self.chance(0.3),
            training=self.chance(0.7),
            relu=self.chance(0.3),
            residual=self.chance(0.4),
            kind=self.of(*kinds) if math.prod(shape) else "normal",
            offset=scale * self.of(0.0, 0.0, 1.0, -3.0, 100.0, 1e4) if self.chance(0.9) else 1.0,
            scale=scale,
            dy_offset=self.of(0.0, 0.0, 0.0, 1.0, -1000.0, 1e4),
            seed=int(self.rng.integers(2**32)),
        )

    def layout(self, ndim: int, dtype: np.dtype, large: bool) -> Layout:
        order, steps, shift = list(range(ndim)), [1] * ndim, 0
        family = self.of("plain", "plain", "channels last", "transposed", "sliced", "anything")
        if family == "plain":
            return Layout.plain(ndim, dtype.itemsize * int(self.rng.integers(0, 17)))
        if family == "channels last":
            order.append(order.pop(ndim > 1))
        elif family != "sliced":
            order = self.rng.permutation(ndim).tolist()
        if family in ("sliced", "anything"):
            for i in self.rng.permutation(ndim)[: 1 if large or family == "sliced" else ndim].tolist():
                steps[i] = self.of(1, 2, 3, -1, -2)
        if family == "anything":
            shift = int(self.rng.integers(0, 65))
        # The dtype of ml_dtypes has one order of bytes only.
        return Layout(
            tuple(order), tuple(steps), shift, family == "anything" and dtype.kind == "f" and self.chance(0.4)
        )

    def trial(self) -> Trial:
        case = self.case()
        layouts, running_dtype = {}, self.of("float32", "float64", "float64", "float16")
        out, dx_out = self.of("new", "new", "out", "x"), self.of("new", "new", "out", "dy")
        if not math.prod(case.shape):
            return Trial(case, {}, running_dtype, "new", "new")
        if self.chance(0.6):
            dtype, large = DTYPES[case.dtype], math.prod(case.shape) > 1000
            usual = self.layout(len(case.shape), dtype, large)  # arrays in one layout are walked together
            for name in ("x", "dy", "residual", "dsum", "out", "dx_out"):
                own = self.layout(len(case.shape), dtype, large)
                layouts[name] = own if self.chance(0.15) else usual
        else:
            layouts = {name: Layout.plain(len(case.shape)) for name in ("out", "dx_out")}
        for name in ("running_mean", "running_var"):
            if self.chance(0.2):
                layouts[name] = self.layout(1, np.dtype(running_dtype), False)
        for name in ("gamma", "beta"):
            if self.chance(0.1):
                ndim = len(case.parameter_shape)
                layouts[name] = self.layout(ndim, np.dtype(np.float64 if case.dtype == "float64" else np.float32), True)
        return Trial(case, layouts, running_dtype, out, dx_out)


# Digests ------------------------------------------------------------


def digest(a: np.ndarray) -> str:
    """Of dtype, shape and bits; one NaN is as good as another, for which of two is kept depends on the compiler."""
    a = np.ascontiguousarray(a, a.dtype.newbyteorder("="))
    if a.dtype.kind != "U":
        a = np.where(np.isnan(a), np.full((), np.nan, a.dtype), a)
    return hashlib.sha256(f"{a.dtype} {a.shape}".encode() + a.tobytes()).hexdigest()[:16]


@np.errstate(all="ignore")
def digests(trial: Trial) -> dict[str, str]:
    return {name: digest(result) for name, result in trial.results().items()}


def differences(record: dict[str, Any], numbers: list[int]) -> Iterator[tuple[int, Trial, list[str]]]:
    """Of the trials with these numbers: those that are not as recorded, and the names of what differs."""
    for number in numbers:
        trial = Draw(record["seed"], number).trial()
        here, there = digests(trial), record["digests"][number]
        names = [name for name in here | there if here.get(name) != there.get(name)]
        if names:
            yield number, trial, names


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file")
    parser.add_argument("--cases", type=int, default=3000, help="how many are recorded")
    parser.add_argument("--seed", type=int, default=0, help="of what is recorded")
    parser.add_argument("--only", type=int, nargs="+", help="the numbers of the cases that are compared")
    options = parser.parse_args(arguments)
    build = f"normext in {normext.__path__[0]}, {config()['in use']}, NumPy {np.__version__}"
    if options.what == "record":
        found = [digests(Draw(options.seed, number).trial()) for number in range(options.cases)]
        with open(options.file, "w") as file:
            json.dump({"build": build, "dtypes": list(DTYPES), "seed": options.seed, "digests": found}, file, indent=0)
        say(f"{len(found)} cases recorded: {build}")
        return 0
    with open(options.file) as file:
        record = json.load(file)
    if record["dtypes"] != list(DTYPES):
        parser.error(f"the cases recorded are of {', '.join(record['dtypes'])}; bfloat16 needs ml_dtypes")
    numbers = options.only or list(range(len(record["digests"])))
    differing = 0
    for number, trial, names in differences(record, numbers):
        say(f"case {number} differs in {', '.join(names)}: {trial}")
        differing += 1
    say(f"{len(numbers) - differing} of {len(numbers)} cases agree: {build}; recorded: {record['build']}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
