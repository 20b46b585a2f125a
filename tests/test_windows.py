"""Columns out of windows and back, and the fast layers built on them, against plain formulas."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import normext
from normext.cs231n import fast_layers
from normext.cs231n.fast_layers import (
    conv_backward_fast,
    conv_forward_fast,
    max_pool_backward_fast,
    max_pool_forward_fast,
)
from normext.cs231n.im2col_cython import col2im_6d_cython, col2im_cython, im2col_cython


def plain_im2col(x, kernel, stride, padding, dilation):
    """(N, C, kh, kw, out_h, out_w), from a padded copy."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel, stride, padding, dilation
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    out_h = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    out_w = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    cols = np.empty((*x.shape[:2], kh, kw, out_h, out_w), x.dtype)
    for i, j in np.ndindex(kh, kw):
        rows = slice(i * dh, i * dh + (out_h - 1) * sh + 1, sh)
        columns = slice(j * dw, j * dw + (out_w - 1) * sw + 1, sw)
        cols[:, :, i, j] = padded[:, :, rows, columns]
    return cols


pairs = {
    "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
    "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "padding": st.tuples(st.integers(0, 3), st.integers(0, 3)),
    "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
}


@settings(max_examples=200, deadline=None)
@given(
    dtype=st.sampled_from([np.float32, np.float64]),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(7, 12), st.integers(7, 12)),
    **pairs,
)
def test_im2col_and_its_adjoint(dtype, shape, kernel, stride, padding, dilation):
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, shape).astype(dtype)  # whole numbers: sums are exact
    expected = plain_im2col(x, kernel, stride, padding, dilation)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    cols = normext.im2col(x, kernel, **options)
    rows, windows = shape[1] * kernel[0] * kernel[1], expected.shape[4] * expected.shape[5]
    assert cols.dtype == dtype
    np.testing.assert_array_equal(cols, expected.reshape(shape[0], rows, windows))

    other = rng.integers(-9, 9, cols.shape).astype(dtype)
    image = normext.col2im(other, x.shape, kernel, **options)
    assert image.dtype == dtype
    assert np.vdot(cols, other) == np.vdot(x, image)


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from([np.float32, np.float64]),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(4, 12), st.integers(4, 12)),
    kernel=pairs["kernel"],
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
)
def test_the_course_layouts(dtype, shape, kernel, stride, padding):
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, shape).astype(dtype)
    six = plain_im2col(x, kernel, (stride, stride), (padding, padding), (1, 1)).transpose(1, 2, 3, 0, 4, 5)
    cols = im2col_cython(x, *kernel, padding, stride)
    np.testing.assert_array_equal(cols, six.transpose(0, 1, 2, 4, 5, 3).reshape(cols.shape))

    other = rng.integers(-9, 9, cols.shape).astype(dtype)
    image = col2im_cython(other, *shape, *kernel, padding, stride)
    assert np.vdot(cols, other) == np.vdot(x, image)
    other = rng.integers(-9, 9, six.shape).astype(dtype)
    image = col2im_6d_cython(other, *shape, *kernel, padding, stride)
    assert np.vdot(six, other) == np.vdot(x, image)


def test_tiles_of_wide_rows(rng):
    """A row of many images is cut into tiles where it would not fit the cache."""
    x = rng.integers(-9, 9, (700, 2, 3, 101)).astype(np.float64)
    for stride in (1, 2):
        cols = im2col_cython(x, 3, 5, 2, stride)
        expected = plain_im2col(x, (3, 5), (stride, stride), (2, 2), (1, 1)).transpose(1, 2, 3, 4, 5, 0)
        np.testing.assert_array_equal(cols, expected.reshape(cols.shape))
        other = rng.integers(-9, 9, cols.shape).astype(np.float64)
        assert np.vdot(cols, other) == np.vdot(x, col2im_cython(other, *x.shape, 3, 5, 2, stride))


def test_threads_change_nothing(rng):
    x = rng.normal(size=(8, 16, 40, 40)).astype(np.float32)
    results = []
    for threads in (1, 2, 3):
        with normext.threads(threads):
            cols, batch_innermost = normext.im2col(x, 3, padding=1), im2col_cython(x, 3, 3, 1, 1)
            back = normext.col2im(cols, x.shape, 3, padding=1), col2im_cython(batch_innermost, *x.shape, 3, 3, 1, 1)
            pooled, cache = max_pool_forward_fast(x, {"pool_height": 2, "pool_width": 2, "stride": 2})
            results.append([cols, batch_innermost, *back, pooled, max_pool_backward_fast(pooled, cache)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_out_is_used(rng):
    x = rng.normal(size=(2, 3, 6, 6))
    out = np.full((2, 27, 16), np.nan)
    assert normext.im2col(x, 3, out=out) is out
    np.testing.assert_array_equal(out, normext.im2col(x, 3))
    image = np.full(x.shape, np.nan)
    assert normext.col2im(out, x.shape, 3, out=image) is image
    np.testing.assert_array_equal(image, normext.col2im(out, x.shape, 3))


def test_any_layout_of_x(rng):
    x = rng.normal(size=(2, 3, 6, 8))
    expected = normext.im2col(x, 3)
    for same in (np.asfortranarray(x), x.astype(">f8"), np.flip(np.flip(x).copy())):
        np.testing.assert_array_equal(normext.im2col(same, 3), expected)


X = np.ones((2, 3, 5, 6))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: normext.im2col(X[0], 3), ValueError, r"x must have four axes .*\(3, 5, 6\)"),
        (
            lambda: normext.im2col(X, 7),
            ValueError,
            r"kernel_size \(7, 7\) .* does not fit images of 5 x 6 with padding",
        ),
        (lambda: normext.im2col(X, 3, dilation=3), ValueError, "does not fit"),
        (lambda: normext.im2col(X, 0), ValueError, "kernel_size must be from 1 .*, got 0"),
        (lambda: normext.im2col(X, 3, stride=0), ValueError, "stride must be from 1"),
        (lambda: normext.im2col(X, 3, padding=-1), ValueError, "padding must be from 0"),
        (lambda: normext.im2col(X, 3, padding=2**40), ValueError, "padding must be from 0"),
        (lambda: normext.im2col(X, (3, 3, 3)), ValueError, "kernel_size must be an integer or a pair"),
        (lambda: normext.im2col(X, 2.5), TypeError, "kernel_size must be of integers, got 2.5"),
        (lambda: normext.im2col(X.astype(complex), 3), TypeError, "x must be an array of float32 or float64"),
        (lambda: normext.im2col(X, 3, out=np.empty((2, 27, 11))), ValueError, r"out must have shape \(2, 27, 12\)"),
        (lambda: normext.im2col(X, 3, out=np.empty((2, 27, 12), "f")), TypeError, "out must be an ndarray of float64"),
        (lambda: normext.im2col(X, 3, out=np.empty((27, 2, 12)).swapaxes(0, 1)), ValueError, "out must be contiguous"),
        (lambda: normext.im2col(X, 1, out=X.reshape(2, 3, 30)), ValueError, "out must share no memory with x"),
        (lambda: normext.col2im(np.ones((2, 27, 11)), X.shape, 3), ValueError, r"cols must have shape \(2, 27, 12\)"),
        (lambda: normext.col2im(np.ones((2, 27, 12)), (2, 3, 5), 3), ValueError, "x_shape must have four numbers"),
        (lambda: im2col_cython(X, 7, 7, 0, 1), ValueError, "does not fit"),
        (
            lambda: col2im_cython(np.ones((27, 23)), *X.shape, 3, 3, 0, 1),
            ValueError,
            r"cols must have shape \(27, 24\)",
        ),
        (
            lambda: col2im_6d_cython(np.ones((3, 3, 3, 2, 3, 3)), *X.shape, 3, 3, 0, 1),
            ValueError,
            "cols must have shape",
        ),
    ],
)
def test_bad_windows(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Fast layers -------------------------------------------------------------------------------------


def plain_conv(x, w, b, stride, pad):
    cols = plain_im2col(x, w.shape[2:], (stride, stride), (pad, pad), (1, 1))
    return np.einsum("ncijyx,fcij->nfyx", cols, w) + b[:, None, None]


@pytest.mark.parametrize("block_bytes", [1 << 20, 2000, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("kernel", "stride", "pad"), [((3, 3), 1, 1), ((3, 3), 2, 1), ((1, 1), 1, 0), ((1, 1), 2, 0), ((5, 3), 1, 2)]
)
def test_convolution(rng, monkeypatch, kernel, stride, pad, dtype, block_bytes):
    """Also where a block is some images, some rows of one, or one row."""
    monkeypatch.setattr(fast_layers, "BLOCK_BYTES", block_bytes)
    limit = 1e-4 if dtype == np.float32 else 1e-11
    x, w, b = (rng.normal(size=s).astype(dtype) for s in ((5, 3, 9, 11), (4, 3, *kernel), 4))
    out, cache = conv_forward_fast(x, w, b, {"stride": stride, "pad": pad})
    assert out.dtype == dtype
    np.testing.assert_allclose(out, plain_conv(x, w, b, stride, pad), rtol=limit, atol=limit)
    # A convolution is linear in x and in w: its gradients are its adjoints.
    dout = rng.normal(size=out.shape).astype(dtype)
    dx, dw, db = conv_backward_fast(dout, cache)
    assert dx.dtype == dw.dtype == db.dtype == dtype
    none, *others = conv_backward_fast(dout, cache, input_gradient=False)
    assert none is None and all(np.array_equal(a, b) for a, b in zip(others, (dw, db), strict=True))
    other_x, other_w = rng.normal(size=x.shape), rng.normal(size=w.shape)
    np.testing.assert_allclose(
        np.vdot(dx, other_x), np.vdot(dout, plain_conv(other_x, w, 0 * b, stride, pad)), rtol=limit * 100
    )
    np.testing.assert_allclose(
        np.vdot(dw, other_w), np.vdot(dout, plain_conv(x, other_w, 0 * b, stride, pad)), rtol=limit * 100
    )
    np.testing.assert_allclose(db, dout.sum(axis=(0, 2, 3)), rtol=limit, atol=limit)


def test_convolution_of_no_images():
    out, cache = conv_forward_fast(np.ones((0, 3, 5, 5)), np.ones((4, 3, 3, 3)), np.ones(4), {"stride": 1, "pad": 1})
    assert out.shape == (0, 4, 5, 5)
    dx, dw, db = conv_backward_fast(out, cache)
    assert dx.shape == (0, 3, 5, 5) and not dw.any() and not db.any()


def test_memory_of_a_convolution_is_bounded_by_the_block(rng):
    """Beside the result, not by the batch: the columns of this one would take 75 MB."""
    x = rng.normal(size=(64, 16, 32, 32)).astype(np.float32)
    w, b, conv_param = rng.normal(size=(8, 16, 3, 3)).astype(np.float32), np.zeros(8), {"stride": 1, "pad": 1}
    tracemalloc.start()
    try:
        out, cache = conv_forward_fast(x, w, b.astype(np.float32), conv_param)
        assert tracemalloc.get_traced_memory()[1] - out.nbytes < 2 * fast_layers.BLOCK_BYTES
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        dx, _, _ = conv_backward_fast(out, cache)
        assert tracemalloc.get_traced_memory()[1] - before - dx.nbytes < 2 * fast_layers.BLOCK_BYTES
    finally:
        tracemalloc.stop()


def plain_pool(x, kernel, stride):
    cols = plain_im2col(x, kernel, (stride, stride), (0, 0), (1, 1))
    cols = cols.reshape(*x.shape[:2], -1, *cols.shape[4:])
    return cols.max(axis=2), cols.argmax(axis=2)  # argmax gives the first of equals, and the first NaN


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("size", "kernel", "stride"),
    [
        ((8, 8), (2, 2), 2),
        ((9, 9), (3, 3), 2),
        ((7, 9), (1, 3), 3),
        ((6, 300), (2, 2), 2),
        ((7, 8), (3, 2), 1),
        ((5, 5), (1, 1), 2),
        ((20, 20), (20, 20), 1),
        ((4, 9), (2, 2), 1),
    ],
)
def test_max_pooling(rng, size, kernel, stride, dtype):
    for x in (rng.normal(size=(2, 3, *size)), rng.integers(0, 3, (2, 3, *size))):  # the latter with many ties
        x = x.astype(dtype)
        x[rng.random(x.shape) < 0.02] = np.nan
        out, cache = max_pool_forward_fast(x, {"pool_height": kernel[0], "pool_width": kernel[1], "stride": stride})
        expected, winner = plain_pool(x, kernel, stride)
        np.testing.assert_array_equal(out, expected)
        dout = rng.integers(-9, 9, out.shape).astype(dtype)
        dx = np.zeros_like(x)
        for n, c, i, j in np.ndindex(out.shape):
            y, z = divmod(winner[n, c, i, j], kernel[1])
            dx[n, c, i * stride + y, j * stride + z] += dout[n, c, i, j]
        np.testing.assert_array_equal(max_pool_backward_fast(dout, cache), dx)


def test_shapes_of_fast_layers_that_do_not_fit():
    x, w, b = np.ones((2, 3, 8, 8)), np.ones((4, 3, 3, 3)), np.ones(4)
    for arguments, message in (
        (
            (x, w, b, {"stride": 2, "pad": 1}),
            r"windows of height 3 at stride 2 .* 8 \+ 2 \* 1 - 3 is not a multiple of 2",
        ),
        ((x, np.ones((4, 2, 3, 3)), b, {"stride": 1, "pad": 1}), r"must fit, got \(2, 3, 8, 8\), \(4, 2, 3, 3\)"),
        ((x, w, np.ones(3), {"stride": 1, "pad": 1}), "must fit"),
        ((x, np.ones((4, 3, 9, 9)), b, {"stride": 1, "pad": 0}), "does not fit images of 8 x 8"),
    ):
        with pytest.raises(ValueError, match=message):
            conv_forward_fast(*arguments)
    with pytest.raises(ValueError, match="windows of width 3 at stride 2"):
        max_pool_forward_fast(x, {"pool_height": 2, "pool_width": 3, "stride": 2})
    out, cache = conv_forward_fast(x, w, b, {"stride": 1, "pad": 1})
    with pytest.raises(ValueError, match="dout must have the shape of out"):
        conv_backward_fast(out[:, :2], cache)
    out, cache = max_pool_forward_fast(x, {"pool_height": 2, "pool_width": 2, "stride": 2})
    with pytest.raises(ValueError, match="dout must have the shape of out"):
        max_pool_backward_fast(out[:1], cache)


def test_equal_to_pytorch(rng):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    for kernel, stride, padding, dilation in itertools.product([2, (3, 1)], [1, (2, 3)], [0, (1, 2)], [1, 2]):
        x = rng.normal(size=(2, 3, 9, 10))
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        unfolded = functional.unfold(torch.from_numpy(x), kernel, **options).numpy()
        np.testing.assert_array_equal(normext.im2col(x, kernel, **options), unfolded)
        folded = functional.fold(torch.from_numpy(unfolded), x.shape[2:], kernel, **options).numpy()
        np.testing.assert_allclose(normext.col2im(unfolded, x.shape, kernel, **options), folded, rtol=1e-13)
