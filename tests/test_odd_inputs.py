"""Callers of every kind with the odd inputs of `odd_inputs`; C goes through them in test_api, MPI in mpi_programs."""

import os
import warnings

import numpy as np
import pytest
from norm_cases import NORMS
from odd_inputs import EPS, arguments, check_all, odd_inputs

import normext

every_norm = pytest.mark.parametrize("norm", NORMS)


def options(norm):
    return {"eps": EPS} | ({"num_groups": 2} if norm == "group_norm" else {})


def function(norm, x, gamma, beta, dy, out=None):
    parameters = [gamma] if norm == "rms_norm" else [gamma, beta]
    y, cache = getattr(normext, norm)(x, **dict(zip(("gamma", "beta"), parameters)), **options(norm), out=out)
    if out is not None:
        assert y is out
        y = y.astype(y.dtype.newbyteorder("="))
    assert type(y) is np.ndarray and y.dtype.isnative
    gradients = getattr(normext, norm + "_backward")(dy, cache)
    return y, *gradients, *[None] * (3 - len(gradients))


@every_norm
def test_functions(norm):
    check_all(function, norm)


@every_norm
def test_functions_in_place(norm):
    def in_place(norm, x, gamma, beta, dy):
        """The gradients are of a call with a result of its own, as there are no others."""
        y, *gradients = function(norm, x, gamma, beta, dy)
        over, parameters = (
            np.array(x, y.dtype, order="K"),
            {"gamma": gamma} | ({} if norm == "rms_norm" else {"beta": beta}),
        )
        written, cache = getattr(normext, norm)(over, **parameters, out=over, **options(norm))
        assert written is over
        if over.size:
            with pytest.raises(ValueError, match="wrote over"):
                getattr(normext, norm + "_backward")(dy, cache)
        return written, *gradients

    check_all(in_place, norm, skip=lambda name, odd: odd.argument == "out")


def layer(norm, x, gamma, beta, dy):
    classes = {"batch_norm": normext.BatchNorm, "group_norm": normext.GroupNorm, "instance_norm": normext.InstanceNorm}
    classes |= {"layer_norm": normext.LayerNorm, "rms_norm": normext.RMSNorm}
    made = classes[norm](*[2] * (norm == "group_norm"), len(gamma), dtype=np.float64, eps=EPS)
    for name, value in (("gamma", gamma), ("beta", beta)):
        if name in made.params:
            made.params[name][...] = value
    y = made(x)
    return y, made.backward(dy), made.grads["gamma"], made.grads.get("beta")


@every_norm
def test_layers(norm):
    one = norm == "batch_norm"  # it has running statistics, which are not updated from one number
    check_all(
        layer,
        norm,
        skip=lambda name, odd: odd.argument in ("gamma", "out"),  # it has its own
        refuse=lambda name, odd: one and name == "shape (1, 4, 1)",
    )


@every_norm
def test_torch(norm, monkeypatch):
    """What PyTorch's own function gives or says, of what PyTorch takes for a tensor."""
    torch = pytest.importorskip("torch")
    import normext.torch as ours

    for smallest in ours._SMALLEST:
        monkeypatch.setitem(ours._SMALLEST, smallest, ours._Smallest(1, 1))

    def outcome(module, x, gamma, beta, dy):
        x, gamma, beta = (t.clone().requires_grad_(t.is_floating_point()) for t in (x, gamma, beta))
        try:
            with warnings.catch_warnings():  # PyTorch says once in a process that it casts from complex
                warnings.simplefilter("ignore")
                return result(module, x, gamma, beta, dy)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def result(module, x, gamma, beta, dy):
        y = {
            "batch_norm": lambda: module.batch_norm(x, None, None, gamma, beta, True, 0.1, EPS),
            "layer_norm": lambda: module.layer_norm(x, x.shape[-1:], gamma, beta, EPS),
            "rms_norm": lambda: module.rms_norm(x, x.shape[-1:], gamma, EPS),
            "group_norm": lambda: module.group_norm(x, 2, gamma, beta, EPS),
            "instance_norm": lambda: module.instance_norm(x, None, None, gamma, beta, True, 0.1, EPS),
        }[norm]()
        wanted = [t for t in (x, gamma, beta) if t.requires_grad and (t is not beta or norm != "rms_norm")]
        return [y.detach(), *torch.autograd.grad(y, wanted, dy)]

    compared = 0
    for name, odd in odd_inputs(norm).items():
        if odd.argument == "out":
            continue
        try:
            with warnings.catch_warnings():  # of memory that cannot be written to
                warnings.simplefilter("ignore")
                given = {key: torch.as_tensor(value) for key, value in arguments(norm, odd).items()}
        except Exception:
            continue
        dtype = given["x"].dtype if given["x"].is_floating_point() else torch.float64
        for key in given:
            if key not in ("x", odd.argument):
                given[key] = given[key].to(dtype)
        found, wanted = outcome(ours, **given), outcome(torch.nn.functional, **given)
        compared += 1
        if isinstance(wanted, str):
            assert found == wanted, name
            continue
        assert not isinstance(found, str), (name, found)
        if "infinity" in name:
            continue
        limit = {torch.float16: 2e-2, torch.bfloat16: 2e-1, torch.float32: 1e-4}.get(dtype, 1e-9)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=limit, atol=20 * limit, equal_nan=True, msg=name)
    assert compared > 50


@every_norm
def test_jax(norm):
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    jax = pytest.importorskip("jax")
    import normext.jax

    def caller(norm, x, gamma, beta, dy):
        parameters = [gamma] if norm == "rms_norm" else [gamma, beta]
        function = getattr(normext.jax, norm)
        y = function(x, **options(norm), **dict(zip(("gamma", "beta"), parameters)))
        as_float = [jax.numpy.asarray(a, y.dtype) for a in (x, *parameters)]
        _, pull = jax.vjp(lambda x, *p: function(x, **options(norm), **dict(zip(("gamma", "beta"), p))), *as_float)
        gradients = pull(jax.numpy.asarray(dy, y.dtype))
        return y, *gradients, *[None] * (3 - len(gradients))

    def refused(name, odd):
        """Integers have a dtype of their own in JAX; bytes in another order it does not know."""
        dtype = np.asarray(odd.value).dtype if odd.argument == "gamma" or isinstance(odd.value, np.ndarray) else None
        return dtype is not None and (not dtype.isnative or (odd.argument == "x" and dtype.kind in "biu"))

    with warnings.catch_warnings():  # JAX has more to say of text
        warnings.simplefilter("ignore")
        check_all(
            caller, norm, skip=lambda name, odd: odd.argument in ("dy", "out") or "ragged" in name, refuse=refused
        )
