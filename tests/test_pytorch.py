"""Equal to PyTorch in float64, forward and backward, over shapes, layouts and options."""

import numpy as np
import pytest

import normext

torch = pytest.importorskip("torch")
functional = torch.nn.functional

SHAPES = [
    (1, 1),
    (1, 5),
    (5, 1),
    (7, 3),
    (64, 100),
    (3, 4, 1),
    (2, 6, 9),
    (3, 6, 5, 7),
    (2, 6, 1, 1),
    (2, 4, 3, 4, 5),
    (1, 2, 150, 150),
    (2, 100_000),
    (30_000, 2),
    (1_000_003, 2),
    (1, 1_000_003),
]
LIMIT = {"rtol": 1e-10, "atol": 1e-10}


def cases(shape):
    """x and dy (N, C, ...) for PyTorch, and the same numbers in two memory layouts with their channel axis for us."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(1, 2, shape), rng.normal(size=shape)
    yield x, dy, x, dy, 1
    last = [np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy)]
    yield x, dy, *last, -1


def leaves(*arrays):
    return [None if a is None else torch.from_numpy(a.copy()).requires_grad_() for a in arrays]


def assert_gradients(ours, axis, *tensors):
    for our, tensor in zip(ours, tensors, strict=True):
        if tensor is None:
            assert our is None
        else:
            their = tensor.grad.numpy()
            np.testing.assert_allclose(np.moveaxis(our, axis, 1) if our.ndim > 1 and axis else our, their, **LIMIT)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm(shape, training, affine):
    if training and np.prod(shape) == shape[1]:
        pytest.skip("PyTorch wants more than one value per channel")
    rng = np.random.default_rng(1)
    gamma, beta = rng.normal(size=(2, shape[1])) if affine else (None, None)
    mean, var = rng.normal(size=shape[1]), rng.uniform(0.5, 2, shape[1])
    for x, dy, our_x, our_dy, axis in cases(shape):
        tensors = leaves(x, gamma, beta)
        their_mean, their_var = torch.from_numpy(mean.copy()), torch.from_numpy(var.copy())
        theirs = functional.batch_norm(
            tensors[0], their_mean, their_var, tensors[1], tensors[2], training, momentum=0.1, eps=1e-3
        )
        theirs.backward(torch.from_numpy(dy))
        running_mean, running_var = mean.copy(), var.copy()
        y, cache = normext.batch_norm(
            our_x,
            gamma,
            beta,
            running_mean=running_mean,
            running_var=running_var,
            training=training,
            momentum=0.9,
            eps=1e-3,
            axis=axis,
        )
        np.testing.assert_allclose(np.moveaxis(y, axis, 1), theirs.detach().numpy(), **LIMIT)
        np.testing.assert_allclose(running_mean, their_mean.numpy(), **LIMIT)
        assert_gradients(normext.batch_norm_backward(our_dy, cache), axis, *tensors)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_and_rms_norm(shape, affine):
    rng = np.random.default_rng(1)
    x, dy = rng.normal(1, 2, shape), rng.normal(size=shape)
    for axis in {-1, 1}:
        gamma, beta = rng.normal(size=(2, *shape[axis:])) if affine else (None, None)
        tensors = leaves(x, gamma, beta)
        theirs = functional.layer_norm(tensors[0], shape[axis:], tensors[1], tensors[2], eps=1e-3)
        theirs.backward(torch.from_numpy(dy))
        y, cache = normext.layer_norm(x, gamma, beta, axis=axis, eps=1e-3)
        np.testing.assert_allclose(y, theirs.detach().numpy(), **LIMIT)
        assert_gradients(normext.layer_norm_backward(dy, cache), 0, *tensors)

        tensors = leaves(x, gamma)
        theirs = functional.rms_norm(tensors[0], shape[axis:], tensors[1], eps=1e-3)
        theirs.backward(torch.from_numpy(dy))
        y, cache = normext.rms_norm(x, gamma, axis=axis, eps=1e-3)
        np.testing.assert_allclose(y, theirs.detach().numpy(), **LIMIT)
        assert_gradients(normext.rms_norm_backward(dy, cache), 0, *tensors)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_group_norm(shape, affine):
    rng = np.random.default_rng(1)
    gamma, beta = rng.normal(size=(2, shape[1])) if affine else (None, None)
    # PyTorch refuses groups of one number, where y is beta.
    groups = [g for g in {1, 2, shape[1]} if shape[1] % g == 0 and np.prod(shape[1:]) > g and shape[1] <= 1000]
    for num_groups in groups:
        for x, dy, our_x, our_dy, axis in cases(shape):
            tensors = leaves(x, gamma, beta)
            theirs = functional.group_norm(tensors[0], num_groups, tensors[1], tensors[2], eps=1e-3)
            theirs.backward(torch.from_numpy(dy))
            y, cache = normext.group_norm(our_x, num_groups, gamma, beta, axis=axis, eps=1e-3)
            np.testing.assert_allclose(np.moveaxis(y, axis, 1), theirs.detach().numpy(), **LIMIT)
            assert_gradients(normext.group_norm_backward(our_dy, cache), axis, *tensors)


@pytest.mark.parametrize("shape", [(2, 6, 9), (3, 6, 5, 7), (2, 4, 3, 4, 5), (1, 2, 150, 150)])
def test_instance_norm(shape):
    rng = np.random.default_rng(1)
    gamma, beta = rng.normal(size=(2, shape[1]))
    for x, dy, our_x, our_dy, axis in cases(shape):
        tensors = leaves(x, gamma, beta)
        theirs = functional.instance_norm(tensors[0], weight=tensors[1], bias=tensors[2], eps=1e-3)
        theirs.backward(torch.from_numpy(dy))
        y, cache = normext.instance_norm(our_x, gamma, beta, axis=axis, eps=1e-3)
        np.testing.assert_allclose(np.moveaxis(y, axis, 1), theirs.detach().numpy(), **LIMIT)
        assert_gradients(normext.instance_norm_backward(our_dy, cache), axis, *tensors)
