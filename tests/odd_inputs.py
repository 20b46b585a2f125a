"""Odd inputs, one table for every caller: functions, layers, PyTorch, JAX, C, MPI.

Each is a norm's x (or another argument, by name) in place of an ordinary one, with what is expected: the twin's result,
or an exception. Callers that take less say so themselves.
"""

import array
import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from norm_cases import DTYPES, Case

SHAPE = (6, 4, 5)  # channels along axis 1, rows along axis 2
EPS = 1e-3  # for all norms
WRONG = (TypeError, ValueError)


class Odd(NamedTuple):
    """An argument and what it makes of the call: right results, or these exceptions."""

    value: Any
    error: type[Exception] | tuple[type[Exception], ...] = ()
    argument: str = "x"


def plain(dtype: Any = np.float32, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(7).normal(3, 2, shape).astype(dtype)


def case(norm: str, shape: tuple[int, ...] = SHAPE) -> Case:
    """The call that is made of x in such a shape."""
    axis = len(shape) - 1 if norm in ("layer_norm", "rms_norm") else 1
    return Case(norm, shape, axis, "float64", groups=2, beta=norm != "rms_norm", eps=EPS)


# Where x lies ------------------------------------------------------------


def spread(a: np.ndarray) -> np.ndarray:
    """Every second element of a larger array, along every axis."""
    result = np.zeros([2 * n for n in a.shape], a.dtype)[tuple(slice(None, None, 2) for _ in a.shape)]
    result[...] = a
    return result


def unaligned(a: np.ndarray) -> np.ndarray:
    result = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    result[...] = a
    return result


def far_apart(a: np.ndarray) -> np.ndarray:
    """A page and more between neighbours, of memory that is hardly there."""
    step = 5000 * a.itemsize
    strides = [step * int(np.prod(a.shape[i + 1 :])) for i in range(a.ndim)]
    result = np.lib.stride_tricks.as_strided(np.zeros(5000 * a.size, a.dtype), a.shape, strides)
    result[...] = a
    return result


def read_only(a: np.ndarray) -> np.ndarray:
    a.setflags(write=False)
    return a


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": lambda a: a,
    "Fortran": np.asfortranarray,
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "unaligned": unaligned,
    "spread": spread,
    "rows reversed": lambda a: a[::-1].copy()[::-1],
    "last axis reversed": lambda a: a[..., ::-1].copy()[..., ::-1],
    "all axes reversed": lambda a: np.flip(np.flip(a).copy()),
    "cropped": lambda a: np.pad(a, 1)[tuple(slice(1, -1) for _ in a.shape)],
    "axes swapped": lambda a: np.swapaxes(np.swapaxes(a, 0, -1).copy(), 0, -1),
    "inner axes swapped": lambda a: np.swapaxes(np.swapaxes(a, 0, 1).copy(), 0, 1),
    "read-only": read_only,
}


# The table ------------------------------------------------------------


class Subclass(np.ndarray):
    pass


class HasArray:
    def __array__(self, dtype=None, copy=None):
        return plain()


def odd_inputs(norm: str) -> dict[str, Odd]:
    """By name, made anew, for a call of that norm with gamma and beta."""
    x, channels = plain(), case(norm).parameter_shape[0]
    table = {name: Odd(lay(x.copy())) for name, lay in LAYOUTS.items()}
    table |= {f"{name} {layout}": Odd(LAYOUTS[layout](plain(dtype)))
              for name, dtype in DTYPES.items() for layout in ("C", "spread", "last axis reversed")}  # fmt: skip
    table |= {f"dtype {name}": Odd(plain(name)) for name in "bhilqBHILQ?"}
    table |= {
        f"dtype {name}": Odd(plain().astype(name), TypeError) for name in ("F", "D", "O", "U", "S", "V8", "m8[s]")
    }
    if np.dtype(np.longdouble) != np.float64:
        table["dtype longdouble"] = Odd(plain(np.longdouble), TypeError)
    if "bfloat16" in DTYPES:
        from ml_dtypes import float8_e4m3fn

        table["dtype float8"] = Odd(plain(float8_e4m3fn), TypeError)

    for shape in ((1, 4, 5), (6, 4, 1), (1, 4, 1), (6, 4), (2, 4, 1, 1, 1, 1, 3), (0, 4, 5)):
        nothing = 0 in shape and norm == "batch_norm"
        table[f"shape {shape}"] = Odd(plain(shape=shape), ValueError if nothing else ())
    for shape in ((6, 4, 0), (6, 0, 5), ()):
        rows_without_numbers = shape != (6, 0, 5) or norm not in ("layer_norm", "rms_norm")
        table[f"shape {shape}"] = Odd(plain(shape=shape), WRONG if rows_without_numbers else ())
    table["far apart"] = Odd(far_apart(x))
    for name, value in (("NaN", np.nan), ("infinity", np.inf), ("-infinity", -np.inf)):
        with_it = x.copy()
        with_it[2, 1, 3] = value
        table[name] = Odd(with_it)
    table |= {
        "one number": Odd(np.broadcast_to(np.float32(7.25), SHAPE)),
        "one row": Odd(np.broadcast_to(x[:1, :1], SHAPE)),
        "subclass": Odd(x.view(Subclass)),
        "masked array": Odd(np.ma.masked_array(x, x > 5), TypeError),
        "gamma masked": Odd(np.ma.masked_array(np.ones(channels), [True] * channels), TypeError, "gamma"),
        "record of fields": Odd(np.zeros(SHAPE, [("a", "f4")]), TypeError),
        "field of a record": Odd(np.rec.fromarrays([x, x], names="a,b").a),
        "list": Odd(x.tolist()),
        "tuple": Odd(tuple(x)),
        "ragged list": Odd([[1.0, 2.0], [3.0]], WRONG),
        "an object with __array__": Odd(HasArray()),
        "memoryview": Odd(memoryview(x)),
        "array of bytes": Odd(array.array("d", [1.0, 2.0]), WRONG),
        "number": Odd(3.0, WRONG),
        "None": Odd(None, WRONG),
        "text": Odd("x", WRONG),
        "dict": Odd({}, WRONG),
        "deque": Odd(collections.deque([1.0]), WRONG),
        "gamma list": Odd([2] * channels, argument="gamma"),
        "gamma of integers": Odd(np.arange(channels), argument="gamma"),
        "gamma float16": Odd(np.ones(channels, np.float16), argument="gamma"),
        "gamma swapped and reversed": Odd(np.arange(channels, dtype=">f8")[::-1], argument="gamma"),
        "gamma of another length": Odd(np.ones(channels + 1), ValueError, "gamma"),
        "gamma of one number": Odd(np.ones(1), ValueError, "gamma"),
        "gamma as a number": Odd(2.0, ValueError, "gamma"),
        "gamma of two axes": Odd(np.ones((channels, 1)), ValueError, "gamma"),
        "gamma of nothing": Odd(np.ones(0), ValueError, "gamma"),
        "gamma complex": Odd(np.ones(channels, complex), TypeError, "gamma"),
        "gamma of text": Odd(["a"] * channels, TypeError, "gamma"),
        "gamma of objects": Odd(np.ones(channels, object), TypeError, "gamma"),
        "dy list": Odd(x.tolist(), argument="dy"),
        "dy of integers": Odd(np.arange(120).reshape(SHAPE), argument="dy"),
        "dy of another shape": Odd(x[:, :, :4], WRONG, "dy"),
        "dy that would broadcast": Odd(x[:1], WRONG, "dy"),
        "dy complex": Odd(x.astype(complex), TypeError, "dy"),
    }  # fmt: skip
    table |= {f"dy {name}": Odd(lay(x.copy()), argument="dy") for name, lay in LAYOUTS.items()}
    # Where to write y: of x, as some lie in its memory.
    table |= {
        f"out {name}": Odd(
            lambda x, lay=lay: lay(np.full_like(x, np.nan)), ValueError if name == "read-only" else (), "out"
        )
        for name, lay in LAYOUTS.items()
    }
    table |= {
        "out that overlaps x": Odd(lambda x: x[::-1], ValueError, "out"),
        "out of another shape": Odd(lambda x: np.empty(x.shape[::-1], x.dtype), ValueError, "out"),
        "out of another dtype": Odd(lambda x: np.empty(x.shape), WRONG, "out"),
        "out of one number": Odd(
            lambda x: np.lib.stride_tricks.as_strided(x.copy(), x.shape, (0, 0, 0)), ValueError, "out"
        ),
        "out a list": Odd(lambda x: x.tolist(), WRONG, "out"),
    }
    return table


def arguments(norm: str, odd: Odd) -> dict[str, Any]:
    """x, gamma, beta and dy, all ordinary but for the odd one; and an odd out."""
    x = odd.value if odd.argument == "x" else plain()
    try:
        shape = np.shape(x)
    except ValueError:
        shape = SHAPE
    if len(shape) < 2:
        shape = SHAPE
    rng = np.random.default_rng(0)
    given = {"x": x, "dy": rng.normal(size=shape)}
    given |= {name: rng.normal(1, 0.5, case(norm, shape).parameter_shape) for name in ("gamma", "beta")}
    return given | {odd.argument: odd.value(given["x"]) if odd.argument == "out" else odd.value}


Caller = Callable[..., tuple[Any, ...]]


def check(caller: Caller, norm: str, odd: Odd) -> None:
    """Call with the odd argument; ``caller(norm, x, gamma, beta, dy)``, with an out if odd, gives y and gradients."""
    given = arguments(norm, odd)
    if odd.error:
        try:
            caller(norm, **given)
        except odd.error:
            return
        raise AssertionError("it should have been refused")
    before = {name: np.array(a) for name, a in given.items()}
    results = caller(norm, **given)
    assert_right(norm, before, results)
    for name, a in before.items():
        if name != "out":
            np.testing.assert_array_equal(np.asarray(given[name]), a, err_msg=f"{name} was changed")


LIMITS = collections.defaultdict(lambda: 1e-9, float32=3e-5, float16=0.01, bfloat16=0.1)


def assert_right(norm: str, given: dict[str, np.ndarray], results: tuple[Any, ...]) -> None:
    """Results as the twin's in float64, but for statistics of which a number of x is not finite; the twin's dtypes."""
    from normext import reference

    kind = case(norm, given["x"].shape)
    wide = {name: a.astype(np.float64) for name, a in given.items()}
    gamma, beta = wide["gamma"], wide["beta"] if kind.beta else None
    if given["x"].size == 0:
        wanted = [wide["x"], wide["dy"], 0 * gamma, None if beta is None else 0 * beta]
    else:
        with np.errstate(invalid="ignore"):
            y, cache = getattr(reference, norm)(
                wide["x"], **kind.arguments(wide | {"running_mean": 0, "running_var": 1})
            )
            wanted = [y, *getattr(reference, norm + "_backward")(wide["dy"], cache)]
        wanted += [None] * (4 - len(wanted))
    finite = np.isfinite(wide["x"])
    if finite.size:
        numbers = kind.statistics(finite)
        finite = kind.put_back(np.repeat(numbers.all(1, keepdims=True), numbers.shape[1], 1))
    for name, result, right in zip(("y", "dx", "dgamma", "dbeta"), results, wanted, strict=True):
        assert (result is None) == (right is None), name
        if result is None or not (finite.all() or name in ("y", "dx")):
            continue
        result = np.asarray(result)
        assert result.shape == right.shape, name
        limit = max(LIMITS[given["x"].dtype.name], LIMITS[result.dtype.name])
        limit *= max(1, abs(right[finite] if name in ("y", "dx") else right).max(initial=0))
        error = abs(result.astype(np.float64) - right)
        error = error[finite] if name in ("y", "dx") else error
        assert (error <= limit).all(), (name, error.max())


def check_all(
    caller: Caller,
    norm: str,
    *,
    skip: Callable[[str, Odd], bool] = lambda name, odd: False,
    refuse: Callable[[str, Odd], bool] = lambda name, odd: False,
) -> None:
    """The whole table, but for what does not apply to a caller, and for what it refuses; all that is wrong at once."""
    wrong = []
    for name, odd in odd_inputs(norm).items():
        if skip(name, odd):
            continue
        try:
            check(caller, norm, odd._replace(error=WRONG) if refuse(name, odd) else odd)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
