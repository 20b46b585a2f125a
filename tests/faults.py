"""What is left when memory runs out: run by ``python tests/instrument.py faults``, under the preloaded `faults.c`.

Every call is made again and again, with the k-th allocation failing, for every k until no allocation is left to fail;
then with less and less memory to be had. It must raise MemoryError, or give the results that it gives otherwise; what
it reads must be as it was, and so must what it updates where it raises; the next call must be right; and a norm must
have given back the memory that it had got.

``python faults.py CALL STEP PROGRESS`` goes on after a step of a call, by their numbers, and keeps those of the step
that it is at in the file PROGRESS, for whoever finds the process gone.
"""

import ctypes
import json
import mmap
import resource
import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from norm_cases import NORMS, Case

import normext
from normext._core.arrays import Cache
from normext.cs231n import fast_layers, optim

LIBRARY = ctypes.CDLL(None)


class Call(NamedTuple):
    """A call, what it may not change, and what it changes in place when it does not raise."""

    call: Callable[[], Any]
    read: list[np.ndarray]
    updated: list[np.ndarray] = []  # noqa: RUF012 - never changed
    restore: Callable[[], Any] = lambda: None  # what is not an array
    is_norm: bool = False  # the others have functions of CPython and NumPy in them that lose memory when they fail


LAYOUTS = {
    "": lambda a: a.copy(),
    "strided": lambda a: np.repeat(a, 2, -1)[..., ::2],
    "swapped": lambda a: a.astype(a.dtype.newbyteorder()),
}
OPTIONS = {
    "batch_norm": ({}, {"running": True}, {"running": True, "training": False, "relu": True}),
    "layer_norm": ({}, {"residual": True}),
    "rms_norm": ({}, {"residual": True}),
    "group_norm": ({"groups": 2},),
    "instance_norm": ({},),
}


def calls() -> Iterator[tuple[str, Callable[[], Call]]]:
    """By name; each is made ready when it is its turn."""
    for norm in NORMS:
        axis = 1 if norm in ("batch_norm", "group_norm", "instance_norm") else -1 % 3
        for options in OPTIONS[norm]:
            for dtype in ("float32", "float16"):
                for layout in LAYOUTS:
                    case = Case(norm, (5, 4, 6), axis, dtype, **options)
                    words = [norm, dtype, layout, *(f"{option}={value}" for option, value in options.items())]
                    name = " ".join(word for word in words if word)
                    yield name, partial(forward, case, layout)
                    yield f"{name}, backward", partial(backward, case, layout)
        yield f"{norm} of many", partial(forward, Case(norm, (64, 64, 40), axis, "float32", running=True), "")
        yield f"{norm} of many, backward", partial(backward, Case(norm, (64, 64, 40), axis, "float32"), "")
    tiny = Case("batch_norm", (5, 4), 1, "float32", scale=1e-13, eps=0.0)
    yield "batch_norm of tiny numbers, backward", partial(backward, tiny, "")
    for kind, size in (("BatchNorm", 4), ("LayerNorm", (4, 6)), ("RMSNorm", (4, 6)), ("InstanceNorm", 4)):
        yield kind, partial(layer, kind, size)
        yield f"{kind}.backward", partial(layer_backward, kind, size)
    yield "second order", second_order
    yield "fold_batch_norm", fold
    yield "population_stats", population
    yield "im2col", im2col
    yield "col2im", col2im
    # Convolution is these and products, in which OpenBLAS does not ask whether it got memory, and crashes.
    yield "max_pool_forward_fast", partial(pooling, False)
    yield "max_pool_backward_fast", partial(pooling, True)
    yield "adam", adam


def forward(case: Case, layout: str) -> Call:
    arrays = case.draw()
    running = [arrays.pop(name) for name in ("running_mean", "running_var")]
    arrays = {name: LAYOUTS[layout](a) if a.shape == case.shape else a for name, a in arrays.items()}
    if layout:  # statistics of another layout than the loops take
        running = [LAYOUTS[layout](r) for r in running]
    given = case.arguments(arrays | dict(zip(("running_mean", "running_var"), running)))
    updated = running if case.running and case.training and case.norm == "batch_norm" else []
    call = partial(getattr(normext, case.norm), arrays["x"], **given)
    return Call(call, [*arrays.values(), *([] if updated else running)], updated, is_norm=True)


def backward(case: Case, layout: str) -> Call:
    arrays = case.draw()
    arrays = {name: LAYOUTS[layout](a) if a.shape == case.shape else a for name, a in arrays.items()}
    *_, cache = getattr(normext, case.norm)(arrays["x"], **case.arguments(arrays))
    given = {"dsum": arrays["dsum"]} if case.fused else {}
    call = partial(getattr(normext, case.norm + "_backward"), arrays["dy"], cache, **given)
    kept = [a for a in (cache.x, cache.gamma, cache.beta, cache.mean, cache.rstd) if a is not None]
    return Call(call, [*arrays.values(), *kept], is_norm=True)


X = np.random.default_rng(0).normal(3, 2, (5, 4, 6)).astype(np.float32)
IMAGES = np.random.default_rng(1).normal(size=(2, 3, 6, 6))


def layer(kind: str, size: Any) -> Call:
    norm = getattr(normext, kind)(size)
    updated = [norm.running_mean, norm.running_var] if kind == "BatchNorm" else []
    return Call(lambda: norm(X), [X, *norm.params.values()], updated)


def layer_backward(kind: str, size: Any) -> Call:
    norm = getattr(normext, kind)(size)
    norm(X)
    return Call(lambda: (norm.backward(X), *norm.grads.values()), [X, *norm.params.values()], restore=lambda: norm(X))


def second_order() -> Call:
    _, cache = normext.batch_norm(X, np.ones(4), np.ones(4))
    return Call(lambda: normext.batch_norm_backward_backward(X, X, cache), [X])


def fold() -> Call:
    norm, w = normext.BatchNorm(4).eval(), IMAGES[0, :, :4, 0].copy()
    return Call(lambda: normext.fold_batch_norm(w, None, norm, output_axis=-1), [w, *norm.params.values()])


def population() -> Call:
    norm, batches = normext.BatchNorm(4), [X, X + 1]
    return Call(lambda: normext.population_stats(norm, batches), [X], [norm.running_mean, norm.running_var])


def im2col() -> Call:
    return Call(lambda: normext.im2col(IMAGES, 3, padding=1), [IMAGES])


def col2im() -> Call:
    columns = normext.im2col(IMAGES, 3, padding=1)
    return Call(lambda: normext.col2im(columns, IMAGES.shape, 3, padding=1), [columns])


def pooling(back: bool) -> Call:
    run = partial(fast_layers.max_pool_forward_fast, IMAGES, {"pool_height": 2, "pool_width": 2, "stride": 2})
    if back:
        out, cache = run()
        return Call(partial(fast_layers.max_pool_backward_fast, out, cache), [IMAGES, out])
    return Call(lambda: run()[0], [IMAGES])


def adam() -> Call:
    w, config = X.copy(), {"learning_rate": 0.1, "m": X * 0, "v": X * 0 + 1, "t": 3}
    whole = dict(config)

    def restore():
        config.clear()
        config.update(whole)

    return Call(lambda: optim.adam(w, X, config)[0], [w, X, whole["m"], whole["v"]], restore=restore)


# Trials ------------------------------------------------------------


def flat(results: Any) -> list[bytes]:
    """The numbers of all arrays among results, and of a cache's statistics, to be compared."""
    results = results if isinstance(results, tuple) else (results,)
    if isinstance(results[-1], Cache):
        *results, cache = results
        results += [cache.mean, cache.rstd]
    return [b"" if a is None else np.asarray(a).tobytes() for a in results]


class Trials:
    """One call, over and over."""

    def __init__(self, call: Call):
        self.call = call
        self.start = [a.copy() for a in (*call.read, *call.updated)]
        self.before = self.state()
        self.results = flat(call.call())
        self.after = self.state()
        self.reset()

    def state(self) -> list[bytes]:
        return [a.tobytes() for a in (*self.call.read, *self.call.updated)]

    def reset(self) -> None:
        self.call.restore()
        if self.state() != self.before:
            for a, start in zip((*self.call.read, *self.call.updated), self.start):
                if a.flags.writeable:
                    a[...] = start

    def attempt(self) -> None:
        """Call, with no allocation of this function's own after it that could fail in its place."""
        self.error = self.returned = None
        try:
            self.returned = self.call.call()
        except BaseException as e:
            self.error = e.with_traceback(None)

    def wrong(self) -> Iterator[str]:
        """What is wrong after an attempt that ran out of memory; then all is as it was before it."""
        state, n, error = self.state(), len(self.call.read), self.error
        if error is None and flat(self.returned) != self.results:
            yield "returned wrong results"
        # NumPy's own functions, and CPython's, leave it out to say what went wrong when memory did.
        silent = isinstance(error, SystemError) and "without" in str(error) and "exception" in str(error)
        if error is not None and not isinstance(error, MemoryError) and not silent:
            yield f"raised {type(error).__name__}: {error}"
        if state[:n] != self.before[:n]:
            yield "changed what it only reads"
        changed = [a != b for a, b in zip(state[n:], self.before[n:])]
        if error is not None and any(changed):
            yield f"raised, and updated {'all' if all(changed) else 'a part'} of what it updates"
        if error is None and state[n:] != self.after[n:]:
            yield "returned, and did not update what it updates"
        self.reset()
        if flat(self.call.call()) != self.results or self.state() != self.after:
            yield "left the next call wrong"
        self.reset()


def attempt_without(trials: Trials, k: int) -> bool:
    """Whether there was a k-th allocation, which then failed."""
    fired = None
    try:
        LIBRARY.faults_arm(k)
        trials.attempt()
    except MemoryError as e:  # of what is around the call
        trials.error = e
    while fired is None:
        try:
            fired = LIBRARY.faults_disarm()
        except MemoryError:
            pass
    return bool(fired)


def fail_the_kth(trials: Trials, k: int) -> list[str] | None:
    """What is wrong where the k-th allocation fails; None if there are not so many."""
    if not attempt_without(trials, k):
        trials.reset()
        return None
    wrong = list(trials.wrong())
    blocks = array("l", bytes(48))  # of its own: its numbers are no objects, which would count
    for i in range(len(blocks)):
        attempt_without(trials, k)
        trials.error = trials.returned = None
        trials.reset()
        blocks[i] = LIBRARY.faults_live()
    if trials.call.is_norm and all(after > before for before, after in zip(blocks[2:], blocks[3:])):
        wrong.append("kept memory, each time")
    return wrong


def limit_memory(trials: Trials, room: int) -> list[str]:
    """What is wrong where no more than so many bytes can be mapped besides what is mapped: ``ulimit -v``."""
    unlimited, most = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + room, most))
    trials.attempt()
    resource.setrlimit(resource.RLIMIT_AS, (unlimited, most))
    return list(trials.wrong())


ROOMS = [*range(0, 1 << 20, 1 << 17), *range(1 << 20, 12 << 20, 1 << 20)]


def main() -> None:
    first, step, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    LIBRARY.faults_arm.argtypes, LIBRARY.faults_arm.restype = [ctypes.c_long], None
    LIBRARY.faults_live.restype = ctypes.c_long
    normext.set_num_threads(4)
    with open(path, "r+b") as file:
        progress = mmap.mmap(file.fileno(), 16)
    for number, (name, make) in enumerate(calls()):
        if number < first:
            continue
        trials = Trials(make())
        print(json.dumps(["call", number, name]), flush=True)
        # Steps from 1 on are allocations, those from -1 down are amounts of memory.
        while step >= 0:
            progress[:] = struct.pack("qq", number, step := step + 1)
            wrong = fail_the_kth(trials, step)
            if wrong is None:
                step = 0
                break
            print(json.dumps(["step", step, wrong]), flush=True)
        while step > -len(ROOMS):
            progress[:] = struct.pack("qq", number, step := step - 1)
            print(json.dumps(["step", step, limit_memory(trials, ROOMS[step])]), flush=True)
        step = 0


if __name__ == "__main__":
    main()
