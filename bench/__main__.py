"""Times normext and its peers turn by turn on the same arrays and threads, and prints medians and ratios.

    python -m bench            # norms and windows, on one thread and on all
    python -m bench norms      # one part

Peers: PyTorch's own operators without autograd, plain loops (compiled here), NumPy. A ratio is the peer's time over
ours.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator

# The threads of normext's and PyTorch's OpenMP and of NumPy's BLAS take turns here; one that goes on spinning after its
# turn would be measured in the next one's. Set before any of them is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import threadpoolctl

import normext
from normext.cs231n import fast_layers
from normext.cs231n.im2col_cython import col2im_6d_cython, col2im_cython, im2col_cython

try:
    import torch
except ImportError:
    torch = None

Case = tuple[str, dict[str, Callable[[], object]]]  # name; ours first, then the peers, by name

NORM_SHAPES = [(32, 64), (512, 768), (4096, 1024), (32, 64, 56, 56)]
WINDOW_SHAPES = [
    ((100, 3, 31, 31), 25, 2),
    ((32, 64, 56, 56), 64, 1),
]  # images, filters, stride; windows of 3 x 3, pad 1


def norm_cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for shape in NORM_SHAPES:
        x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
        for name, size in (("batch_norm", shape[1]), ("layer_norm", shape[-1])):
            gamma, beta = np.ones(size, np.float32), np.zeros(size, np.float32)
            running = {"running_mean": np.zeros(size, np.float32), "running_var": np.ones(size, np.float32)}
            if name == "batch_norm":
                _, cache = normext.batch_norm(x, gamma, beta)
                ours = {
                    "forward": lambda x=x, g=gamma, b=beta, r=running: normext.batch_norm(x, g, b, **r),
                    "backward": lambda dy=dy, c=cache: normext.batch_norm_backward(dy, c),
                    "evaluation": lambda x=x, g=gamma, b=beta, r=running: normext.batch_norm(
                        x, g, b, training=False, **r
                    ),
                }
            else:
                _, cache = normext.layer_norm(x, gamma, beta)
                ours = {
                    "forward": lambda x=x, g=gamma, b=beta: normext.layer_norm(x, g, b),
                    "backward": lambda dy=dy, c=cache: normext.layer_norm_backward(dy, c),
                }
            theirs = {} if torch is None else torch_norms(name, x, dy, gamma, beta)
            for what in ours:
                peers = {"PyTorch": theirs[what]} if theirs else {}
                yield f"{name} {what} {'x'.join(map(str, shape))}", {"normext": ours[what], **peers}


def torch_norms(name, x, dy, gamma, beta):
    aten = torch.ops.aten
    x, dy, gamma, beta = (torch.from_numpy(a) for a in (x, dy, gamma, beta))
    mean, var = torch.zeros_like(gamma), torch.ones_like(gamma)
    if name == "batch_norm":
        _, m, r = torch.native_batch_norm(x, gamma, beta, mean, var, True, 0.1, 1e-5)
        return {
            "forward": lambda: torch.native_batch_norm(x, gamma, beta, mean, var, True, 0.1, 1e-5),
            "backward": lambda: aten.native_batch_norm_backward(
                dy, x, gamma, mean, var, m, r, True, 1e-5, [True, True, True]
            ),
            "evaluation": lambda: torch.native_batch_norm(x, gamma, beta, mean, var, False, 0.1, 1e-5),
        }
    _, m, r = torch.native_layer_norm(x, gamma.shape, gamma, beta, 1e-5)
    return {
        "forward": lambda: torch.native_layer_norm(x, gamma.shape, gamma, beta, 1e-5),
        "backward": lambda: aten.native_layer_norm_backward(dy, x, gamma.shape, m, r, gamma, beta, [True, True, True]),
    }


def window_cases() -> Iterator[Case]:
    import pyximport

    pyximport.install(language_level=3)
    from bench import plain_loops

    rng = np.random.default_rng(0)
    for shape, filters, stride in WINDOW_SHAPES:
        N, C, H, W = shape
        x = rng.standard_normal(shape, np.float32)
        cols = im2col_cython(x, 3, 3, 1, stride)
        spare, out_h, out_w = np.empty_like(cols), (H - 1) // stride + 1, (W - 1) // stride + 1
        six = rng.standard_normal((C, 3, 3, N, out_h, out_w), np.float32)
        unfolded = normext.im2col(x, 3, stride=stride, padding=1)
        w, b = rng.standard_normal((filters, C, 3, 3), np.float32), np.zeros(filters, np.float32)
        conv_param, pool_param = {"stride": stride, "pad": 1}, {"pool_height": 2, "pool_width": 2, "stride": 2}
        out, cache = fast_layers.conv_forward_fast(x, w, b, conv_param)
        even = np.ascontiguousarray(x[:, :, : H // 2 * 2, : W // 2 * 2])
        pooled, pool_cache = fast_layers.max_pool_forward_fast(even, pool_param)
        copies = {"np.copyto": lambda cols=cols, spare=spare: np.copyto(spare, cols), "a new copy": cols.copy}
        plain, size = "plain loops", "x".join(map(str, shape))
        theirs = torch_windows(x, w, b, out, even, pooled, unfolded, stride) if torch is not None else {}

        def peers(what, theirs=theirs):
            return {"PyTorch": theirs[what]} if theirs else {}

        def strided(x=x, w=w, b=b, N=N, C=C, stride=stride, out_h=out_h, out_w=out_w):
            padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
            n, c, h, v = padded.strides
            windows = np.lib.stride_tricks.as_strided(
                padded, (C, 3, 3, N, out_h, out_w), (c, h, v, n, stride * h, stride * v)
            )
            product = w.reshape(len(w), -1).dot(np.ascontiguousarray(windows).reshape(C * 9, -1)) + b[:, None]
            return np.ascontiguousarray(product.reshape(len(w), N, out_h, out_w).transpose(1, 0, 2, 3))

        yield (
            f"im2col_cython {size}",
            {
                "normext": lambda x=x, s=stride: im2col_cython(x, 3, 3, 1, s),
                plain: lambda x=x, s=stride: plain_loops.im2col(x, 3, 1, s),
                **copies,
            },
        )
        yield (
            f"col2im_cython {size}",
            {
                "normext": lambda cols=cols, shape=shape, s=stride: col2im_cython(cols, *shape, 3, 3, 1, s),
                plain: lambda cols=cols, shape=shape, s=stride: plain_loops.col2im(cols, *shape, 3, 1, s),
                **copies,
            },
        )
        yield (
            f"col2im_6d_cython {size}",
            {
                "normext": lambda six=six, shape=shape, s=stride: col2im_6d_cython(six, *shape, 3, 3, 1, s),
                plain: lambda six=six, shape=shape, s=stride: plain_loops.col2im_6d(six, *shape, 3, 1, s),
                **copies,
            },
        )
        yield (
            f"im2col {size}",
            {"normext": lambda x=x, s=stride: normext.im2col(x, 3, stride=s, padding=1), **peers("unfold")},
        )
        yield (
            f"col2im {size}",
            {
                "normext": lambda u=unfolded, x=x, s=stride: normext.col2im(u, x.shape, 3, stride=s, padding=1),
                **peers("fold"),
            },
        )
        yield (
            f"conv forward {size}",
            {
                "normext": lambda x=x, w=w, b=b, p=conv_param: fast_layers.conv_forward_fast(x, w, b, p),
                "as_strided and dot": strided,
                **peers("conv"),
            },
        )
        yield (
            f"conv backward {size}",
            {"normext": lambda out=out, c=cache: fast_layers.conv_backward_fast(out, c), **peers("conv backward")},
        )
        yield (
            f"max pool forward {size}",
            {"normext": lambda x=even, p=pool_param: fast_layers.max_pool_forward_fast(x, p), **peers("pool")},
        )
        yield (
            f"max pool backward {size}",
            {
                "normext": lambda dy=pooled, c=pool_cache: fast_layers.max_pool_backward_fast(dy, c),
                **peers("pool backward"),
            },
        )


def torch_windows(x, w, b, out, even, pooled, unfolded, stride):
    functional, aten = torch.nn.functional, torch.ops.aten
    x, w, b, out, even, pooled, unfolded = (torch.from_numpy(a) for a in (x, w, b, out, even, pooled, unfolded))
    size = x.shape[2:]
    _, index = functional.max_pool2d(even, 2, 2, return_indices=True)
    return {
        "unfold": lambda: functional.unfold(x, 3, padding=1, stride=stride),
        "fold": lambda: functional.fold(unfolded, size, 3, padding=1, stride=stride),
        "conv": lambda: functional.conv2d(x, w, b, stride=stride, padding=1),
        "conv backward": lambda: aten.convolution_backward(
            out, x, w, [len(b)], [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]
        ),
        "pool": lambda: functional.max_pool2d(even, 2, 2, return_indices=True),
        "pool backward": lambda: aten.max_pool2d_with_indices_backward(
            pooled, even, [2, 2], [2, 2], [0, 0], [1, 1], False, index
        ),
    }


def medians(functions: list[Callable[[], object]], budget: float = 0.5) -> list[float]:
    """The median time of each in seconds, measured in turns; what takes microseconds is called often enough a turn."""
    times: list[list[float]] = [[] for _ in functions]
    start = time.perf_counter()
    for f in functions:
        f()
    repeats = max(1, int(2e-4 * len(functions) / (time.perf_counter() - start)))
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times[0]) < 5:
        for f, record in zip(functions, times):
            start = time.perf_counter()
            for _ in range(repeats):
                f()
            record.append((time.perf_counter() - start) / repeats)
    return [statistics.median(record) for record in times]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=["norms", "windows"])
    part = parser.parse_args().part
    if torch is None:
        print("PyTorch is not installed, and left out")
    for threads in sorted({1, normext.get_num_threads()}):
        if torch is not None:
            torch.set_num_threads(threads)
        print(f"\nfloat32, threads: {threads}")
        with normext.threads(threads), threadpoolctl.threadpool_limits(threads):
            for name, cases in (("norms", norm_cases), ("windows", window_cases)):
                if part not in (None, name):
                    continue
                for case, functions in cases():
                    ours, *theirs = medians(list(functions.values()))
                    peers = [f"{p} {t / ours:.2f}x" for p, t in zip(list(functions)[1:], theirs)]
                    print(f"{case:38} {ours * 1e6:11.1f} us   {', '.join(peers)}", flush=True)


if __name__ == "__main__":
    main()
