"""The convolutional half of normext.cs231n, against plain formulas, numerical gradients and the course's figures."""

import numpy as np
import pytest

from normext.cs231n import fast_layers, im2col, layer_utils, layers
from normext.cs231n.classifiers.cnn import ThreeLayerConvNet
from normext.cs231n.im2col_cython import col2im_cython, im2col_cython
from normext.cs231n.solver import Solver
from normext.gradcheck import numerical_gradient, relative_error

load_digits = pytest.importorskip("sklearn.datasets").load_digits

LIMIT = 1e-7  # for centred differences in float64
NORMALIZATIONS = [None, "batchnorm", "layernorm", "groupnorm", "instancenorm"]


def check_gradients(forward, inputs, backward, rng):
    """`forward(*inputs) -> out, cache` and `backward(dout, cache)`, which gives a gradient for every input."""
    out, cache = forward(*inputs)
    dout = rng.standard_normal(out.shape)
    gradients = backward(dout, cache)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    for x, gradient in zip(inputs, gradients, strict=True):
        numerical = numerical_gradient(lambda _: forward(*inputs)[0], x, dout)
        assert gradient.shape == x.shape
        assert relative_error(numerical, gradient) < LIMIT


def windows_of(x, height, width, stride):
    """(N, C, out_height, out_width, height, width)."""
    return np.lib.stride_tricks.sliding_window_view(x, (height, width), axis=(2, 3))[:, :, ::stride, ::stride]


# --- convolution ------------------------------------------------------------------------------------------------------


def test_conv_forward_gives_the_published_numbers():
    x, w = np.linspace(-0.1, 0.5, 96).reshape(2, 3, 4, 4), np.linspace(-0.2, 0.3, 144).reshape(3, 3, 4, 4)
    out, _ = layers.conv_forward_naive(x, w, np.linspace(-0.1, 0.2, 3), {"stride": 2, "pad": 1})
    published = [
        [[-0.08759809, -0.10987781, -0.18387192, -0.2109216], [0.21027089, 0.21661097, 0.22847626, 0.23004637]],
        [[-0.98053589, -1.03143541, -1.19128892, -1.24695841], [0.69108355, 0.66880383, 0.59480972, 0.56776003]],
    ]
    assert out.shape == (2, 3, 2, 2)
    np.testing.assert_allclose(out[:, :2].reshape(2, 2, 4), published, atol=1e-8)


CONVOLUTIONS = [
    # H, W, HH, WW, stride, pad
    (5, 5, 3, 3, 1, 1),
    (4, 7, 2, 3, 1, 0),
    (5, 7, 3, 3, 2, 1),
    (7, 4, 3, 3, 3, 1),
    (4, 4, 1, 1, 1, 0),
    (2, 3, 6, 5, 1, 2),
    (3, 3, 3, 3, 5, 0),
]


@pytest.mark.parametrize("H, W, HH, WW, stride, pad", CONVOLUTIONS)
@pytest.mark.parametrize("forward", [layers.conv_forward_naive, fast_layers.conv_forward_fast])
def test_conv_forward_is_a_product_with_every_window(forward, H, W, HH, WW, stride, pad, rng):
    x, w, b = rng.standard_normal((3, 2, H, W)), rng.standard_normal((4, 2, HH, WW)), rng.standard_normal(4)
    padded = np.zeros((3, 2, H + 2 * pad, W + 2 * pad))
    padded[:, :, pad : pad + H, pad : pad + W] = x
    expected = np.einsum("ncijhw,fchw->nfij", windows_of(padded, HH, WW, stride), w) + b[:, None, None]
    out, _ = forward(x, w, b, {"stride": stride, "pad": pad})
    np.testing.assert_allclose(out, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("H, W, HH, WW, stride, pad", CONVOLUTIONS)
def test_conv_gradients(H, W, HH, WW, stride, pad, rng):
    inputs = rng.standard_normal((2, 2, H, W)), rng.standard_normal((3, 2, HH, WW)), rng.standard_normal(3)
    conv_param = {"stride": stride, "pad": pad}
    check_gradients(lambda *xwb: layers.conv_forward_naive(*xwb, conv_param), inputs, layers.conv_backward_naive, rng)
    out, cache = layers.conv_forward_naive(*inputs, conv_param)
    _, fast_cache = fast_layers.conv_forward_fast(*inputs, conv_param)
    for naive, fast in zip(layers.conv_backward_naive(out, cache), fast_layers.conv_backward_fast(out, fast_cache)):
        np.testing.assert_allclose(naive, fast, rtol=1e-11, atol=1e-11)


def test_conv_keeps_the_dtype_and_takes_whole_numbers(rng):
    x, w, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 2, 4, 4), (3, 2, 3, 3), (3,)))
    out, cache = layers.conv_forward_naive(x, w, b, {"stride": 1, "pad": 1})
    assert {a.dtype for a in (out, *layers.conv_backward_naive(out, cache))} == {np.dtype(np.float32)}
    out, _ = layers.conv_forward_naive([[[[1, 2]]]], [[[[3]]]], [128], {"stride": 1, "pad": 0})
    np.testing.assert_array_equal(out, [[[[131.0, 134.0]]]])


@pytest.mark.parametrize(
    "x, w, b, stride, pad, message",
    [
        ((2, 3, 4, 4), (5, 2, 3, 3), (5,), 1, 1, r"must fit, got \(2, 3, 4, 4\), \(5, 2, 3, 3\) and \(5,\)"),
        ((2, 3, 4, 4), (5, 3, 3, 3), (4,), 1, 1, "must fit"),
        ((2, 3, 4, 4), (3, 3, 3), (3,), 1, 1, "must fit"),
        ((3, 4, 4), (5, 3, 3, 3), (5,), 1, 1, r"^x .* got (shape )?\(3, 4, 4\)"),
        ((2, 3, 5, 6), (5, 3, 3, 3), (5,), 2, 1, r"width 6 .* 6 \+ 2 \* 1 - 3 is not a multiple of 2"),
        ((2, 3, 6, 5), (5, 3, 3, 3), (5,), 2, 1, r"height 6 .* 6 \+ 2 \* 1 - 3 is not a multiple of 2"),
        ((2, 3, 4, 4), (5, 3, 5, 5), (5,), 1, 0, r"\(5, 5\) .* does not fit images of 4 x 4 with padding \(0, 0\)"),
        ((2, 3, 4, 4), (5, 3, 3, 3), (5,), 0, 1, "^stride must be from 1 .*, got 0"),
        ((2, 3, 4, 4), (5, 3, 3, 3), (5,), 1, -1, "^padding must be from 0 .*, got -1"),
    ],
)
@pytest.mark.parametrize("forward", [layers.conv_forward_naive, fast_layers.conv_forward_fast])
def test_conv_refuses_what_does_not_fit(forward, x, w, b, stride, pad, message):
    with pytest.raises(ValueError, match=message):
        forward(np.zeros(x), np.zeros(w), np.zeros(b), {"stride": stride, "pad": pad})


# --- max pooling ------------------------------------------------------------------------------------------------------

POOLINGS = [
    # H, W, pool_height, pool_width, stride
    (4, 6, 2, 2, 2),
    (5, 5, 3, 3, 2),
    (4, 5, 2, 3, 1),
    (7, 7, 1, 1, 3),
    (3, 4, 3, 4, 1),
]


def pool_param(height, width, stride):
    return {"pool_height": height, "pool_width": width, "stride": stride}


def test_max_pool_gives_the_published_numbers():
    x = np.linspace(-0.3, 0.4, 96).reshape(2, 3, 4, 4)
    out, _ = layers.max_pool_forward_naive(x, pool_param(2, 2, 2))
    np.testing.assert_allclose(out[0, 0], [[-0.26315789, -0.24842105], [-0.20421053, -0.18947368]], atol=1e-8)
    np.testing.assert_allclose(out[1, 2], [[0.32631579, 0.34105263], [0.38526316, 0.4]], atol=1e-8)


@pytest.mark.parametrize("H, W, height, width, stride", POOLINGS)
def test_max_pool_takes_the_largest_of_every_window(H, W, height, width, stride, rng):
    x = rng.standard_normal((2, 3, H, W))
    out, _ = layers.max_pool_forward_naive(x, pool_param(height, width, stride))
    np.testing.assert_array_equal(out, windows_of(x, height, width, stride).max(axis=(4, 5)))


@pytest.mark.parametrize("H, W, height, width, stride", POOLINGS)
def test_max_pool_gradient(H, W, height, width, stride, rng):
    x, param = rng.standard_normal((2, 3, H, W)), pool_param(height, width, stride)
    check_gradients(lambda x: layers.max_pool_forward_naive(x, param), (x,), layers.max_pool_backward_naive, rng)


@pytest.mark.parametrize("H, W, height, width, stride", POOLINGS)
def test_max_pool_naive_and_fast_are_equal_with_ties_and_nan(H, W, height, width, stride, rng):
    x = rng.integers(0, 3, (3, 2, H, W)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    param = pool_param(height, width, stride)
    out, cache = layers.max_pool_forward_naive(x, param)
    fast_out, fast_cache = fast_layers.max_pool_forward_fast(x, param)
    np.testing.assert_array_equal(out, fast_out)
    dout = rng.integers(1, 9, out.shape).astype(np.float32)
    dx = layers.max_pool_backward_naive(dout, cache)
    np.testing.assert_array_equal(dx, fast_layers.max_pool_backward_fast(dout, fast_cache))
    assert dx.dtype == out.dtype == np.float32


def test_max_pool_sends_the_gradient_to_the_first_of_equals_and_to_nan():
    x = np.array([[[[5, 5, 1, np.nan], [5, 5, np.nan, 2]]]], float)
    out, cache = layers.max_pool_forward_naive(x, pool_param(2, 2, 2))
    np.testing.assert_array_equal(out, [[[[5, np.nan]]]])
    dx = layers.max_pool_backward_naive([[[[3.0, 4.0]]]], cache)
    np.testing.assert_array_equal(dx, [[[[3, 0, 0, 4], [0, 0, 0, 0]]]])


def test_max_pool_adds_up_what_overlapping_windows_send():
    x = np.array([[[[0, 9, 0]]]], float)
    out, cache = layers.max_pool_forward_naive(x, pool_param(1, 2, 1))
    np.testing.assert_array_equal(layers.max_pool_backward_naive([[[[1.0, 10.0]]]], cache), [[[[0, 11, 0]]]])


@pytest.mark.parametrize(
    "shape, param, message",
    [
        ((4, 4), (2, 2, 2), "^x must have four axes"),
        ((1, 1, 5, 4), (2, 2, 2), r"height 5 .* 5 \+ 2 \* 0 - 2 is not a multiple of 2"),
        ((1, 1, 4, 5), (2, 2, 2), r"width 5 .* 5 \+ 2 \* 0 - 2 is not a multiple of 2"),
        ((1, 1, 4, 4), (5, 2, 1), "does not fit images of 4 x 4"),
        ((1, 1, 4, 4), (2, 2, 0), "^stride must be from 1 .*, got 0"),
    ],
)
@pytest.mark.parametrize("forward", [layers.max_pool_forward_naive, fast_layers.max_pool_forward_fast])
def test_max_pool_refuses_what_does_not_fit(forward, shape, param, message):
    with pytest.raises(ValueError, match=message):
        forward(np.zeros(shape), pool_param(*param))


@pytest.mark.parametrize(
    "forward, backward",
    [
        (lambda x: layers.conv_forward_naive(x, x[:1], [0], {"stride": 1, "pad": 0}), layers.conv_backward_naive),
        (lambda x: layers.max_pool_forward_naive(x, pool_param(2, 2, 2)), layers.max_pool_backward_naive),
        (
            lambda x: layers.spatial_batchnorm_forward(x, np.ones(3), np.zeros(3), {"mode": "train"}),
            layers.spatial_batchnorm_backward,
        ),
        (
            lambda x: layers.spatial_groupnorm_forward(x, np.ones((1, 3, 1, 1)), np.zeros((1, 3, 1, 1)), 3, {}),
            layers.spatial_groupnorm_backward,
        ),
    ],
    ids=["conv", "max_pool", "batchnorm", "groupnorm"],
)
def test_backward_refuses_a_gradient_of_another_shape(forward, backward, rng):
    out, cache = forward(rng.standard_normal((2, 3, 4, 4)))
    with pytest.raises(ValueError, match="^dout must have the shape of out"):
        backward(out[:1], cache)


# --- windows as columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("H, W, HH, WW, stride, pad", CONVOLUTIONS)
def test_im2col_indices_are_the_reference_of_the_compiled_functions(H, W, HH, WW, stride, pad, rng):
    x = rng.standard_normal((3, 2, H, W))
    cols = im2col.im2col_indices(x, HH, WW, padding=pad, stride=stride)
    np.testing.assert_array_equal(cols, im2col_cython(x, HH, WW, pad, stride))
    other = rng.integers(-9, 9, cols.shape).astype(float)  # whole numbers: sums are exact in any order
    back = im2col.col2im_indices(other, x.shape, HH, WW, padding=pad, stride=stride)
    np.testing.assert_array_equal(back, col2im_cython(other, *x.shape, HH, WW, pad, stride))
    assert np.vdot(cols, other) == pytest.approx(np.vdot(x, back), rel=1e-12)  # the adjoint


def test_im2col_indices_lay_windows_out_by_place_then_image(rng):
    x = rng.standard_normal((4, 2, 5, 6))
    cols = im2col.im2col_indices(x, 3, 2, padding=0, stride=1)
    assert cols.shape == (2 * 3 * 2, 3 * 5 * 4)
    cols = cols.reshape(2, 3, 2, 3, 5, 4)
    for c, h, w, i, j, n in np.ndindex(cols.shape):
        assert cols[c, h, w, i, j, n] == x[n, c, i + h, j + w]


def test_im2col_has_the_courses_defaults(rng):
    x = rng.standard_normal((2, 3, 4, 4))
    k, i, j = im2col.get_im2col_indices(x.shape, 3, 3)
    assert k.shape == (27, 1) and i.shape == j.shape == (27, 16)
    assert (i.min(), i.max(), j.min(), j.max()) == (0, 5, 0, 5)
    assert im2col.col2im_indices(im2col.im2col_indices(x, 3, 3), x.shape).shape == x.shape


def test_im2col_of_no_images():
    assert im2col.im2col_indices(np.zeros((0, 2, 4, 4)), 3, 3).shape == (18, 0)
    assert im2col.col2im_indices(np.zeros((18, 0)), (0, 2, 4, 4)).shape == (0, 2, 4, 4)


def test_im2col_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"6 \+ 2 \* 1 - 3 is not a multiple of 2"):
        im2col.get_im2col_indices((1, 1, 6, 5), 3, 3, stride=2)
    with pytest.raises(ValueError, match=r"^x_shape must have four numbers \(N, C, H, W\), got \(4, 4\)"):
        im2col.im2col_indices(np.zeros((4, 4)), 3, 3)
    with pytest.raises(ValueError, match=r"^cols must have the shape \(9, 16\), got \(16, 9\)"):
        im2col.col2im_indices(np.zeros((16, 9)), (1, 1, 4, 4))


# --- spatial normalization --------------------------------------------------------------------------------------------


def test_spatial_batchnorm_centres_and_scales_every_channel(rng):
    x = 4 * rng.standard_normal((2, 3, 4, 5)) + 10
    out, _ = layers.spatial_batchnorm_forward(x, np.ones(3), np.zeros(3), {"mode": "train"})
    np.testing.assert_allclose(out.mean(axis=(0, 2, 3)), 0, atol=1e-12)
    np.testing.assert_allclose(out.std(axis=(0, 2, 3)), 1, atol=1e-6)
    out, _ = layers.spatial_batchnorm_forward(x, np.asarray([3, 4, 5]), np.asarray([6, 7, 8]), {"mode": "train"})
    np.testing.assert_allclose(out.mean(axis=(0, 2, 3)), [6, 7, 8])
    np.testing.assert_allclose(out.std(axis=(0, 2, 3)), [3, 4, 5], rtol=1e-6)


@pytest.mark.parametrize("mode", ["train", "test"])
def test_spatial_batchnorm_is_batchnorm_of_the_pixels(mode, rng):
    x, dout = rng.standard_normal((2, 3, 2, 4, 5))
    gamma, beta = rng.standard_normal((2, 2))
    spatial_param, flat_param = ({"mode": mode, "momentum": 0.7, "eps": 1e-3, "running_var": np.ones(2)} for _ in "12")

    def flat(x):
        return x.transpose(0, 2, 3, 1).reshape(-1, 2)

    out, cache = layers.spatial_batchnorm_forward(x, gamma, beta, spatial_param)
    flat_out, flat_cache = layers.batchnorm_forward(flat(x), gamma, beta, flat_param)
    np.testing.assert_allclose(flat(out), flat_out, rtol=1e-10, atol=1e-12)
    assert spatial_param.keys() == flat_param.keys()
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(spatial_param[name], flat_param[name], rtol=1e-12)
    dx, *gradients = layers.spatial_batchnorm_backward(dout, cache)
    flat_dx, *flat_gradients = layers.batchnorm_backward_alt(flat(dout), flat_cache)
    np.testing.assert_allclose(flat(dx), flat_dx, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(gradients, flat_gradients, rtol=1e-10, atol=1e-12)


def test_spatial_batchnorm_after_many_batches_normalizes_new_images_at_test_time(rng):
    bn_param = {"mode": "train"}
    for _ in range(50):
        x = 2.3 * rng.standard_normal((10, 4, 11, 12)) + 13
        layers.spatial_batchnorm_forward(x, np.ones(4), np.zeros(4), bn_param)
    bn_param["mode"] = "test"
    out, _ = layers.spatial_batchnorm_forward(x, np.ones(4), np.zeros(4), bn_param)
    np.testing.assert_allclose(out.mean(axis=(0, 2, 3)), 0, atol=0.1)
    np.testing.assert_allclose(out.std(axis=(0, 2, 3)), 1, atol=0.05)


@pytest.mark.parametrize("mode", ["train", "test"])
def test_spatial_batchnorm_gradients(mode, rng):
    inputs = 5 * rng.standard_normal((2, 3, 4, 5)) + 12, rng.standard_normal(3), rng.standard_normal(3)
    statistics = {"running_mean": 12 + rng.standard_normal(3), "running_var": 20 + rng.random(3)}

    def forward(x, gamma, beta):
        return layers.spatial_batchnorm_forward(x, gamma, beta, {"mode": mode, **statistics})

    check_gradients(forward, inputs, layers.spatial_batchnorm_backward, rng)


def test_spatial_batchnorm_refuses_another_mode_or_shape_and_leaves_bn_param_alone():
    x, bn_param = np.zeros((2, 3, 4, 4)), {"mode": "train"}
    with pytest.raises(ValueError, match='^Invalid forward batchnorm mode "None"$'):
        layers.spatial_batchnorm_forward(x, np.ones(3), np.zeros(3), {})
    with pytest.raises(ValueError, match=r"^x must have four axes \(N, C, H, W\), got shape \(3, 4, 4\)"):
        layers.spatial_batchnorm_forward(x[0], np.ones(3), np.zeros(3), bn_param)
    with pytest.raises(ValueError, match="gamma"):
        layers.spatial_batchnorm_forward(x, np.ones(4), np.zeros(3), bn_param)
    assert bn_param == {"mode": "train"}


@pytest.mark.parametrize("G", [1, 2, 3, 6])
def test_spatial_groupnorm_centres_and_scales_every_group_of_an_image(G, rng):
    x = 4 * rng.standard_normal((2, 6, 4, 5)) + 10
    one = np.ones((1, 6, 1, 1))
    out, _ = layers.spatial_groupnorm_forward(x, one, 0 * one, G, {"mode": "train"})
    groups = out.reshape(2 * G, -1)
    np.testing.assert_allclose(groups.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(groups.std(axis=1), 1, atol=1e-6)
    gamma, beta = rng.standard_normal((2, 1, 6, 1, 1))
    scaled, _ = layers.spatial_groupnorm_forward(x, gamma, beta, G, {"eps": 0.5})
    groups = x.reshape(2, G, -1)
    xhat = (groups - groups.mean(axis=2, keepdims=True)) / np.sqrt(groups.var(axis=2, keepdims=True) + 0.5)
    np.testing.assert_allclose(scaled, gamma * xhat.reshape(x.shape) + beta, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("G", [1, 2, 6])
def test_spatial_groupnorm_gradients_have_the_shape_of_gamma_and_beta(G, rng):
    inputs = 5 * rng.standard_normal((2, 6, 4, 5)) + 12, *rng.standard_normal((2, 1, 6, 1, 1))

    def forward(x, gamma, beta):
        return layers.spatial_groupnorm_forward(x, gamma, beta, G, {"eps": 1e-3})

    check_gradients(forward, inputs, layers.spatial_groupnorm_backward, rng)


def test_spatial_groupnorm_refuses_what_does_not_fit():
    x, one = np.zeros((2, 6, 4, 4)), np.ones((1, 6, 1, 1))
    with pytest.raises(ValueError, match=r"^gamma must have the shape \(1, C, 1, 1\) = \(1, 6, 1, 1\), got \(6,\)"):
        layers.spatial_groupnorm_forward(x, np.ones(6), one, 2, {})
    with pytest.raises(ValueError, match=r"^beta must have the shape .*, got \(1, 3, 1, 1\)"):
        layers.spatial_groupnorm_forward(x, one, one[:, :3], 2, {})
    with pytest.raises(ValueError, match="^x must have four axes"):
        layers.spatial_groupnorm_forward(x[0], one, one, 2, {})
    with pytest.raises(ValueError, match="num_groups.*6.*4"):
        layers.spatial_groupnorm_forward(x, one, one, 4, {})


# --- sandwiches -------------------------------------------------------------------------------------------------------

CONV_PARAM = {"stride": 1, "pad": 1}


def sandwich(name):
    return getattr(layer_utils, f"{name}_forward"), getattr(layer_utils, f"{name}_backward")


@pytest.mark.parametrize(
    "name, settings",
    [("conv_relu", (CONV_PARAM,)), ("conv_relu_pool", (CONV_PARAM, pool_param(2, 2, 2)))],
)
def test_sandwich_gradients(name, settings, rng):
    forward, backward = sandwich(name)
    inputs = rng.standard_normal((2, 3, 6, 8)), rng.standard_normal((3, 3, 3, 3)), rng.standard_normal(3)
    check_gradients(lambda *inputs: forward(*inputs, *settings), inputs, backward, rng)


def test_sandwich_gradients_with_batchnorm(rng):
    forward, backward = sandwich("conv_bn_relu")
    x, w, b, gamma, beta = (
        rng.standard_normal((2, 3, 6, 8)),
        rng.standard_normal((3, 3, 3, 3)),
        *rng.standard_normal((3, 3)),
    )

    def without_bias(x, w, gamma, beta):
        return forward(x, w, b, gamma, beta, CONV_PARAM, {"mode": "train"})

    def backward_without_bias(dout, cache):
        dx, dw, db, dgamma, dbeta = backward(dout, cache)
        np.testing.assert_allclose(db, 0, atol=1e-12)  # the norm takes the mean off again
        return dx, dw, dgamma, dbeta

    check_gradients(without_bias, (x, w, gamma, beta), backward_without_bias, rng)


def test_sandwiches_are_their_layers_one_after_another(rng):
    x, w, b = rng.standard_normal((2, 3, 6, 8)), rng.standard_normal((3, 3, 3, 3)), rng.standard_normal(3)
    gamma, beta = rng.standard_normal((2, 3))
    conv = layers.conv_forward_naive(x, w, b, CONV_PARAM)[0]
    normalized = layers.spatial_batchnorm_forward(conv, gamma, beta, {"mode": "train"})[0]
    pooled = layers.max_pool_forward_naive(np.maximum(conv, 0), pool_param(2, 2, 2))[0]
    bn_param = {"mode": "train"}
    for expected, (out, _) in (
        (np.maximum(conv, 0), layer_utils.conv_relu_forward(x, w, b, CONV_PARAM)),
        (np.maximum(normalized, 0), layer_utils.conv_bn_relu_forward(x, w, b, gamma, beta, CONV_PARAM, bn_param)),
        (pooled, layer_utils.conv_relu_pool_forward(x, w, b, CONV_PARAM, pool_param(2, 2, 2))),
    ):
        np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-12)
    assert bn_param.keys() == {"mode", "running_mean", "running_var"}


# --- the network ------------------------------------------------------------------------------------------------------


def small_net(**settings):
    return ThreeLayerConvNet(
        **{"input_dim": (2, 6, 4), "num_filters": 4, "filter_size": 3, "hidden_dim": 5, **settings}
    )


def test_weights_come_from_the_global_generator_in_order_and_are_cast():
    np.random.seed(7)
    net = small_net(num_classes=3, weight_scale=0.5, normalization="batchnorm")
    np.random.seed(7)
    for name, shape in {"W1": (4, 2, 3, 3), "W2": (4 * 3 * 2, 5), "W3": (5, 3)}.items():
        np.testing.assert_array_equal(net.params[name], (0.5 * np.random.randn(*shape)).astype(np.float32))
    for name, size in {"b1": 4, "b2": 5, "b3": 3, "beta1": 4}.items():
        np.testing.assert_array_equal(net.params[name], np.zeros(size))
    np.testing.assert_array_equal(net.params["gamma1"], np.ones(4))
    assert len(net.params) == 8
    assert {p.dtype for p in net.params.values()} == {np.dtype(np.float32)}


def test_defaults_are_the_courses():
    net = ThreeLayerConvNet()
    assert {name: p.shape for name, p in net.params.items()} == {
        "W1": (32, 3, 7, 7),
        "b1": (32,),
        "W2": (32 * 16 * 16, 100),
        "b2": (100,),
        "W3": (100, 10),
        "b3": (10,),
    }
    assert net.params["W2"].std() == pytest.approx(1e-3, rel=0.01)


def test_initial_losses_are_the_published_ones():
    """As the course's notebook prints them, which draws an example for a sandwich first."""
    np.random.seed(231)
    for shape in ((2, 3, 8, 8), (3, 3, 3, 3), (3,), (2, 3, 8, 8)):
        np.random.randn(*shape)
    net = ThreeLayerConvNet()
    X, y = np.random.randn(50, 3, 32, 32), np.random.randint(10, size=50)
    assert net.loss(X, y)[0] == pytest.approx(2.302586071243987, rel=1e-11)
    net.reg = 0.5
    assert net.loss(X, y)[0] == pytest.approx(2.50825564, rel=1e-6)  # the published one was summed in float32


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("reg", [0, 3.14])
def test_gradients_of_every_parameter(normalization, reg):
    np.random.seed(231)
    X, y = np.random.randn(3, 2, 6, 4), np.random.randint(10, size=3)
    net = small_net(
        num_filters=12, hidden_dim=3, weight_scale=0.3, reg=reg, dtype=np.float64, normalization=normalization
    )
    # Away from where it starts: off the kink of the relu, and with gamma and beta that matter.
    for name, p in net.params.items():
        if name[0] != "W":
            p += 0.3 * np.random.randn(*p.shape)
    _, grads = net.loss(X, y)
    assert grads.keys() == net.params.keys()
    for name, p in net.params.items():
        numerical = numerical_gradient(lambda _: net.loss(X, y)[0], p)
        assert grads[name].shape == p.shape
        np.testing.assert_allclose(grads[name], numerical, rtol=1e-5, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_scores_are_those_of_test_mode(normalization, rng):
    np.random.seed(0)
    net = small_net(num_filters=12, weight_scale=1, dtype=np.float64, normalization=normalization)
    X = rng.standard_normal((20, 2, 6, 4))
    for _ in range(3):
        net.loss(X, np.arange(20) % 10)
    p = net.params
    a, _ = layers.conv_forward_naive(X, p["W1"], p["b1"], {"stride": 1, "pad": 1})
    if normalization == "batchnorm":  # the running statistics of three batches like X, from zero
        weight = 1 - 0.9**3
        mean, var = (weight * statistic(a, axis=(0, 2, 3), keepdims=True) for statistic in (np.mean, np.var))
        a = (a - mean) / np.sqrt(var + 1e-5)
    if normalization in ("layernorm", "groupnorm", "instancenorm"):
        groups = a.reshape(20, {"layernorm": 1, "groupnorm": 4, "instancenorm": 12}[normalization], -1)
        groups = (groups - groups.mean(axis=2, keepdims=True)) / np.sqrt(groups.var(axis=2, keepdims=True) + 1e-5)
        a = groups.reshape(a.shape)
    a = windows_of(np.maximum(a, 0), 2, 2, 2).max(axis=(4, 5)).reshape(20, -1)
    expected = np.maximum(a @ p["W2"] + p["b2"], 0) @ p["W3"] + p["b3"]
    np.testing.assert_allclose(net.loss(X), expected, rtol=1e-9, atol=1e-12)
    assert net.loss(X[:0]).shape == (0, 10)
    assert [bn_param["mode"] for bn_param in net.bn_params] == ["test"] * (normalization is not None)


@pytest.mark.parametrize("filters, groups", [(32, 8), (12, 4), (6, 2), (7, 1)])
def test_groupnorm_has_a_number_of_groups_that_divides_the_filters(filters, groups, rng):
    net = small_net(num_filters=filters, dtype=np.float64, weight_scale=1, normalization="groupnorm")
    X, p = rng.standard_normal((3, 2, 6, 4)), net.params
    conv, _ = layers.conv_forward_naive(X, p["W1"], p["b1"], {"stride": 1, "pad": 1})
    a, _ = layers.spatial_groupnorm_forward(conv, p["gamma1"], p["beta1"], groups, {})
    a = windows_of(np.maximum(a, 0), 2, 2, 2).max(axis=(4, 5)).reshape(3, -1)
    np.testing.assert_allclose(net.loss(X), np.maximum(a @ p["W2"], 0) @ p["W3"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_network_computes_in_its_dtype_whatever_the_data(normalization, dtype, rng):
    X, y = rng.integers(0, 256, (6, 2, 6, 4)).astype(np.uint8), np.arange(6)
    net = small_net(normalization=normalization, dtype=dtype, reg=0.1)
    loss, grads = net.loss(X, y)
    assert isinstance(loss, float)
    assert {g.dtype for g in grads.values()} == {np.dtype(dtype)}
    assert net.loss(X).dtype == dtype


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_network_overfits_a_few_digits(normalization):
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8) - images.mean()
    data = {"X_train": images[:50], "y_train": labels[:50], "X_val": images[50:150], "y_val": labels[50:150]}
    np.random.seed(231)
    net = ThreeLayerConvNet((1, 8, 8), 8, 3, 50, weight_scale=0.1, normalization=normalization)
    solver = Solver(
        net, data, "adam", {"learning_rate": 3e-3}, batch_size=25, num_epochs=25, verbose=False, num_val_samples=100
    )
    solver.train()
    assert max(solver.train_acc_history) == 1.0
    assert solver.best_val_acc > 0.6
    # The running statistics that belong to the best parameters are back with them.
    assert solver.check_accuracy(data["X_val"], data["y_val"]) == solver.best_val_acc


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"normalization": "rmsnorm"},
            "^normalization must be one of 'batchnorm', 'layernorm', 'groupnorm', 'instancenorm' or None, got 'rmsno",
        ),
        ({"normalization": ""}, "^normalization must"),
        ({"input_dim": (2, 5, 4)}, r"^height and width must be even, .*, got input_dim \(2, 5, 4\)"),
        ({"input_dim": (64,)}, r"^input_dim must be \(channels, height, width\), got \(64,\)"),
        ({"filter_size": 4}, "^filter_size must be odd, .*, got 4"),
        ({"num_filters": 0}, "must be positive, got"),
        ({"hidden_dim": 0}, "must be positive, got"),
        ({"dtype": np.float16}, "^dtype must be float32 or float64, got float16"),
    ],
)
def test_network_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        small_net(**settings)


def test_network_refuses_bad_data():
    net = small_net()
    with pytest.raises(ValueError, match=r"^X must have the shape \(N, 2, 6, 4\), got \(3, 2, 4, 6\)"):
        net.loss(np.zeros((3, 2, 4, 6)))
    with pytest.raises(ValueError, match="^y must hold labels from 0 to 9, got 3 to 10"):
        net.loss(np.zeros((2, 2, 6, 4)), [3, 10])
    with pytest.raises(TypeError):
        net.loss(np.zeros((2, 2, 6, 4), complex))
