"""What `test_distributed` starts on several ranks: ``mpiexec -n 4 python mpi_programs.py main``.

A check runs on all ranks, and raises on those where something is wrong. It sends all its messages first, so that a rank
where it fails does not leave others waiting. The first rank prints what came of each as JSON.
"""

import doctest
import json
import sys
import tempfile
import traceback
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import odd_inputs

import normext
from normext import distributed
from normext.cs231n.classifiers.fc_net import FullyConnectedNet
from normext.cs231n.solver import Solver
from normext.distributed import (
    MPI,
    DataParallelSolver,
    SyncBatchNorm,
    abort_on_error,
    sync_batch_norm,
    sync_batch_norm_backward,
)
from normext.layers import BatchNorm, population_stats

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
CHECKS = {}
FLOATS = (np.float32, np.float64)


def check(function):
    CHECKS[function.__name__] = function
    return function


def rng(seed=0):
    """The same numbers on all ranks."""
    return np.random.default_rng(seed)


def own_rows(n):
    """This rank's rows of n: uneven parts, of which the last has none where there are three ranks or more."""
    parts = SIZE if SIZE < 3 else SIZE - 1
    cuts = [0, *(max(1, n * (2 * i + 1) // (2 * parts)) for i in range(1, parts)), n, n][: SIZE + 1]
    return slice(cuts[RANK], cuts[RANK + 1])


def everywhere(value):
    return WORLD.allgather(value)


def raised(call):
    """The error of a call that must raise, as text with its type before it."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


class Counting(MPI.Intracomm):
    """A communicator that counts its messages and their bytes, whatever sends them."""

    def __new__(cls, comm=WORLD):
        return super().__new__(cls, comm)

    def __init__(self, comm=WORLD):
        self.sent = []

    def Allreduce(self, sendbuf, recvbuf, op=MPI.SUM):
        self.sent.append(recvbuf.nbytes)
        return super().Allreduce(sendbuf, recvbuf, op)

    def Iallreduce(self, sendbuf, recvbuf, op=MPI.SUM):
        _, count, datatype = recvbuf
        self.sent.append(count * datatype.Get_size())
        return super().Iallreduce(sendbuf, recvbuf, op)


# Batch norm ----------------------------------------------------------------------------------------------------------


@check
def the_ranks_together_give_what_one_process_gives_for_the_whole_batch():
    # Shapes with a second size, above 512 KiB, are walked in blocks.
    shapes = (((50, 7), 1), ((13, 5, 6, 4), 1), ((13, 6, 4, 5), -1), ((4000, 100), 1), ((5, 64, 40, 60), 1))
    for dtype in FLOATS:
        for shape, axis in shapes:
            random = rng()
            C, tolerance = shape[axis], 30 * np.finfo(dtype).eps
            x, dy = random.normal(5, 3, shape).astype(dtype), random.normal(size=shape).astype(dtype)
            gamma, beta = random.normal(1, 0.5, (2, C))
            running, own_running = np.ones((2, C)), np.ones((2, C))
            y, cache = normext.batch_norm(
                x, gamma, beta, running_mean=running[0], running_var=running[1], axis=axis, momentum=0.7
            )
            dx, dgamma, dbeta = normext.batch_norm_backward(dy, cache)

            rows = own_rows(len(x))
            own_y, cache = sync_batch_norm(
                x[rows], gamma, beta, running_mean=own_running[0], running_var=own_running[1], axis=axis, momentum=0.7
            )
            own_dx, own_dgamma, own_dbeta = sync_batch_norm_backward(dy[rows], cache)
            sums = sum(everywhere(np.array([own_dgamma, own_dbeta], np.float64)))

            assert own_y.dtype == own_dx.dtype == own_dgamma.dtype == own_dbeta.dtype == dtype
            np.testing.assert_allclose(own_y, y[rows], rtol=tolerance, atol=tolerance * 5)
            np.testing.assert_allclose(own_dx, dx[rows], rtol=tolerance, atol=tolerance * 5)
            for own, whole in zip(sums, (dgamma, dbeta)):
                np.testing.assert_allclose(own, whole, rtol=0, atol=tolerance * np.abs(dy).sum() / C)
            np.testing.assert_allclose(own_running, running, rtol=1e-7 if dtype == np.float32 else 1e-14)


@check
def strided_arguments_and_no_parameters():
    x, dy = rng(1).normal(5, 3, (2, 40, 6))
    y, cache = normext.batch_norm(x.T, axis=0)
    dx, dgamma, dbeta = normext.batch_norm_backward(dy.T, cache)
    rows = own_rows(40)
    own_y, cache = sync_batch_norm(x[rows].T, axis=0)
    own_dx, *gradients = sync_batch_norm_backward(dy[rows].T, cache)
    np.testing.assert_allclose(own_y, y[:, rows], atol=1e-13)
    np.testing.assert_allclose(own_dx, dx[:, rows], atol=1e-13)
    assert gradients == [dgamma, dbeta] == [None, None]


@check
def far_from_zero_nothing_is_lost():
    x = (1e6 + rng().normal(size=(3000, 4))).astype(np.float32)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(axis=0)) / np.sqrt(exact.var(axis=0) + 1e-5)
    rows = own_rows(len(x))
    y, _ = sync_batch_norm(x[rows])
    assert np.abs(y - exact[rows]).max(initial=0) < 2e-6


@check
def a_constant_channel_gives_beta():
    for dtype in FLOATS:
        x = np.full((10, 3), 0.1, dtype)
        rows = own_rows(len(x))
        for eps in (1e-5, 0.0):
            y, _ = sync_batch_norm(x[rows], beta=[1.5, 2.5, 3.5], eps=eps)
            assert (y == [1.5, 2.5, 3.5]).all()


@check
def running_statistics_stay_the_same_on_all_ranks_to_the_bit():
    random = rng(RANK)
    for dtype in FLOATS:
        running_mean, running_var = np.zeros(5, dtype), np.ones(5, dtype)
        for scale in np.logspace(-6, 6, 50):
            x = random.normal(random.normal(), scale, (random.integers(2, 20), 5)).astype(dtype)
            sync_batch_norm(x, running_mean=running_mean, running_var=running_var)
        assert len(set(everywhere(running_mean.tobytes() + running_var.tobytes()))) == 1


@check
def a_channel_that_is_not_finite_leaves_the_others_alone():
    x = rng().normal(size=(4, SIZE, 3))
    x[0, 0, 1] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, _ = sync_batch_norm(x[:, RANK])
    whole, _ = normext.batch_norm(x.reshape(-1, 3)[:, ::2])
    assert np.isnan(y[:, 1]).all()
    np.testing.assert_allclose(y[:, ::2], whole.reshape(4, SIZE, 2)[:, RANK], atol=1e-13)


@check
def swapping_what_is_merged_changes_no_bit():
    random = rng(2)
    for _ in range(200):
        counts, moments = random.integers(0, 100, 2), random.normal(size=(2, 2, 9)) * 10.0 ** random.integers(-9, 9, 9)
        moments[:, 1] **= 2
        a, b = zip(counts.astype(float), moments)
        assert distributed._merged(*a, *b).tobytes() == distributed._merged(*b, *a).tobytes()


@check
def no_rows_on_any_rank_is_refused_on_all():
    errors = everywhere(raised(lambda: sync_batch_norm(np.empty((0, 3)))))
    assert all("ValueError: x has no rows on any rank" in error for error in errors)


@check
def evaluation_sends_nothing():
    comm = Counting()
    x, (mean, var) = rng().normal(size=(6, 4)), rng(1).uniform(1, 2, (2, 4))
    options = {"running_mean": mean, "running_var": var, "training": False}
    y, cache = normext.batch_norm(x, **options, gamma=var)
    gradients = normext.batch_norm_backward(x, cache)
    if RANK == 0:  # alone
        own_y, cache = sync_batch_norm(x, **options, gamma=var, comm=comm)
        own_gradients = sync_batch_norm_backward(x, cache)
        np.testing.assert_array_equal(own_y, y)
        for own, one in zip(own_gradients, gradients):
            np.testing.assert_array_equal(own, one)
    assert comm.sent == []


@check
def one_message_forward_and_one_backward():
    comm = Counting(WORLD.Dup())
    x = rng().normal(size=(6, 4))
    for C, sent in ((4, [144, 208, 208]), (4, [208, 208]), (2, [208, 208])):
        comm.sent.clear()
        _, cache = sync_batch_norm(x[:, :C], comm=comm)
        sync_batch_norm_backward(x[:, :C], cache)
        assert comm.sent == sent, comm.sent


@check
def a_part_of_the_ranks():
    comm = WORLD.Split(RANK % 2)
    x = rng().normal(size=(SIZE, 3, 4))
    group = np.concatenate([x[rank] for rank in range(SIZE) if rank % 2 == RANK % 2])
    y, _ = sync_batch_norm(x[RANK], comm=comm)
    whole, _ = normext.batch_norm(group)
    np.testing.assert_allclose(y, whole[3 * comm.rank : 3 * comm.rank + 3], atol=1e-13)


@check
def results_where_they_are_wanted():
    x, dy = rng().normal(size=(2, 8, 3))
    rows = own_rows(8)
    y, cache = sync_batch_norm(x[rows])
    dx, _, _ = sync_batch_norm_backward(dy[rows], cache)
    into, own_dy = np.empty_like(y), dy[rows].copy()
    same_y, cache = sync_batch_norm(x[rows], out=into)
    same_dx, _, _ = sync_batch_norm_backward(own_dy, cache, out=own_dy)
    over = x[rows].copy()
    _, cache = sync_batch_norm(over, out=over)
    error = raised(lambda: sync_batch_norm_backward(dy[rows], cache))
    assert same_y is into and same_dx is own_dy
    for got, wanted in ((into, y), (own_dy, dx), (over, y)):
        np.testing.assert_array_equal(got, wanted)
    assert "wrote over the x" in error or "failed on rank" in error  # a rank without rows has written over nothing


# What ranks do not agree on ------------------------------------------------------------------------------------------


def works_after():
    """Whether the communicator is as good as before."""
    y, cache = sync_batch_norm(np.array([[float(RANK), 1.0]]))
    dx, _, _ = sync_batch_norm_backward(np.ones((1, 2)), cache)
    return np.isfinite(y).all() and np.abs(dx).max() < 1e-9


def ranks(first, last):
    """Words for what the last rank has, and what those before it have."""
    others = ", ".join(map(str, range(SIZE - 1)))
    return f"{first} on rank{'s' * (SIZE > 2)} {others}; {last} on rank {SIZE - 1}"


@check
def ranks_that_disagree_are_told_who_has_what():
    x, odd = np.ones((3, 4)), RANK == SIZE - 1
    calls = {
        f"channels {ranks(4, 700)}": lambda: sync_batch_norm(np.ones((3, 700)) if odd else x),
        f"channels {ranks(4, 3)}": lambda: sync_batch_norm(np.ones((3, 3)) if odd else x),
        f"bytes of a number of x {ranks(8, 4)}": lambda: sync_batch_norm(x.astype(np.float32) if odd else x),
        f"axes {ranks(2, 3)}": lambda: sync_batch_norm(x[:, :, None] if odd else x),
        f"axis {ranks(1, 0)}": lambda: sync_batch_norm(np.ones((4, 4)), axis=0 if odd else 1),
        f"eps {ranks(1e-05, 0.001)}": lambda: sync_batch_norm(x, eps=1e-3 if odd else 1e-5),
        f"momentum {ranks(0.9, 0.5)}": lambda: sync_batch_norm(x, momentum=0.5 if odd else 0.9),
    }
    for words, call in calls.items():
        errors, works = everywhere(raised(call)), works_after()
        if SIZE == 1:
            assert errors == ["nothing raised"]
        else:
            assert all("ValueError: sync_batch_norm must be called alike" in e and words in e for e in errors), errors
        assert works


@check
def ranks_in_different_passes_are_told():
    x, odd = np.ones((3, 4)), RANK == SIZE - 1
    (_, first), (_, second) = sync_batch_norm(x), sync_batch_norm(x)
    passes = everywhere(raised(lambda: sync_batch_norm(x) if odd else sync_batch_norm_backward(x, second)))
    layers = everywhere(raised(lambda: sync_batch_norm_backward(x, first if odd else second)))
    works = works_after()
    if SIZE > 1:
        assert all(f"pass (1 forward, 2 backward) {ranks(2, 1)}" in error for error in passes), passes
        assert all("number of the forward pass" in error for error in layers), layers
    assert works


@check
def what_one_rank_refuses_is_told_to_all():
    x, odd = np.ones((3, 4)), RANK == SIZE - 1
    _, cache = sync_batch_norm(x)
    _, local_cache = normext.batch_norm(x)
    read_only = np.zeros(4)
    read_only.flags.writeable = False
    calls = {
        "ValueError: gamma must have shape (4,)": lambda: sync_batch_norm(x, np.ones(5) if odd else None),
        "AxisError": lambda: sync_batch_norm(x, axis=2 if odd else 1),
        "TypeError: x must be": lambda: sync_batch_norm(x.astype(np.float16) if odd else x),
        "TypeError: training must be": lambda: sync_batch_norm(x, training="yes" if odd else True),
        "ValueError: momentum must be": lambda: sync_batch_norm(x, momentum=2 if odd else 0.9),
        "ValueError: running_mean is updated": lambda: sync_batch_norm(x, running_mean=read_only if odd else None),
        "ValueError: out must be": lambda: sync_batch_norm(x, out=np.empty((2, 4)) if odd else None),
        "ValueError: out must be x": lambda: sync_batch_norm(x, out=x[::-1] if odd else None),
        "ValueError: out must share": lambda: sync_batch_norm(x, x[0], out=x if odd else None),
        "ValueError: dy must have": lambda: sync_batch_norm_backward(np.ones((2, 4)) if odd else x, cache),
        # With these the rank does not know who the others are.
        "TypeError: cache must be what": lambda: sync_batch_norm_backward(x, local_cache if odd else cache),
        "TypeError: comm must be an": lambda: sync_batch_norm(x, comm=3 if odd else None),
    }
    for words, call in calls.items():
        errors, works = everywhere(raised(call)), works_after()
        assert errors[-1].startswith(words), errors
        assert all(f"failed: rank {SIZE - 1} ({words}" in error for error in errors[:-1]), errors
        assert works


@check
def a_wrong_cache_is_told_to_the_ranks_of_the_latest_call():
    comm, x, odd = WORLD.Split(RANK % 2), np.ones((3, 4)), RANK in (SIZE - 1, SIZE - 2)
    _, cache = sync_batch_norm(x, comm=comm)
    errors = everywhere(raised(lambda: sync_batch_norm_backward(x, None if odd else cache)))
    assert all("TypeError: cache must be what sync_batch_norm returned, got NoneType" in e for e in errors), errors
    assert works_after()


@check
def odd_inputs_on_all_ranks():
    """Of as many copies of a batch the statistics are those of one."""

    def caller(norm, x, gamma, beta, dy, out=None):
        y, cache = sync_batch_norm(x, gamma, beta, eps=odd_inputs.EPS, out=out)
        return y if out is None else y.astype(y.dtype.newbyteorder("=")), *sync_batch_norm_backward(dy, cache)

    def refused(name, odd):
        return name.startswith(("float16", "bfloat16"))

    odd_inputs.check_all(caller, "batch_norm", refuse=refused)
    assert works_after()


@check
def wrong_communicators():
    freed = WORLD.Dup()
    freed.Free()
    for comm in (3, freed, MPI.COMM_NULL):
        assert "TypeError: comm must be" in raised(lambda comm=comm: sync_batch_norm(np.ones((2, 2)), comm=comm))
        assert "TypeError: comm must be" in raised(lambda comm=comm: SyncBatchNorm(2, comm=comm))


# The layer -----------------------------------------------------------------------------------------------------------


@check
def the_layer_is_batch_norm_of_the_whole_batch():
    for momentum in (0.9, None):
        one, own = (kind(3, dtype=np.float64, momentum=momentum) for kind in (BatchNorm, SyncBatchNorm))
        x, dy = rng().normal(2, 3, (2, 3, 20, 3, 2))
        rows = own_rows(20)
        for i in range(3):
            whole, part = one(x[i]), own(x[i][rows])
            whole_dx, part_dx = one.backward(dy[i]), own.backward(dy[i][rows])
            gradients = {name: sum(everywhere(gradient)) for name, gradient in own.grads.items()}
            np.testing.assert_allclose(part, whole[rows], atol=1e-13)
            np.testing.assert_allclose(part_dx, whole_dx[rows], atol=1e-13)
            for name, gradient in gradients.items():
                np.testing.assert_allclose(gradient, one.grads[name], atol=1e-12)
        for name, array in one.state_dict().items():
            np.testing.assert_allclose(own.state_dict()[name], array, rtol=1e-13)
        np.testing.assert_allclose(own.eval()(x[0]), one.eval()(x[0]), atol=1e-13)


@check
def population_statistics_of_all_ranks():
    one, own = (kind(3, dtype=np.float64) for kind in (BatchNorm, SyncBatchNorm))
    batches = [rng(i).normal(i, 1 + i, (10 + i, 3)) for i in range(4)]
    population_stats(one, batches)
    population_stats(own, [batch[own_rows(len(batch))] for batch in batches])
    for name, array in one.state_dict().items():
        np.testing.assert_allclose(own.state_dict()[name], array, rtol=1e-13)


# Training ------------------------------------------------------------------------------------------------------------


def numbers():
    random = rng()
    X = random.normal(size=(200, 12))
    y = (np.abs(X[:, :3]).argmax(axis=1) + (X[:, 3] > 1)).astype(int)
    return {"X_train": X[:150], "y_train": y[:150], "X_val": X[150:], "y_val": y[150:]}


def untrained(kind, normalization, batch_size, steps, **options):
    np.random.seed(7 if kind is Solver else 7 + RANK)  # parameters and batches are those of rank 0
    net = FullyConnectedNet([20, 15], 12, 4, normalization=normalization, reg=0.01, weight_scale=0.3, dtype=np.float64)
    epochs = steps * batch_size // 150
    return kind(
        net, numbers(), update_rule="adam", optim_config={"learning_rate": 3e-3}, batch_size=batch_size,
        num_epochs=epochs, num_train_samples=70, verbose=False, **options,
    )  # fmt: skip


def trained(*arguments, **options):
    solver = untrained(*arguments, **options)
    solver.train()
    return solver


@check
def losses_follow_those_of_one_process():
    for normalization, batch_size, steps in (("batchnorm", 25, 120), ("layernorm", 25, 30), ("batchnorm", 3, 100)):
        one, ours = (trained(kind, normalization, batch_size, steps) for kind in (Solver, DataParallelSolver))
        assert len(ours.loss_history) == len(one.loss_history) >= min(steps, 100)
        # What a rounding does grows with every step, fastest in batches of three.
        tolerance = 1e-9 if batch_size == 25 else 1e-5
        np.testing.assert_allclose(ours.loss_history, one.loss_history, rtol=tolerance)
        assert ours.train_acc_history == one.train_acc_history
        assert ours.val_acc_history == one.val_acc_history
        for name, w in one.model.params.items():
            np.testing.assert_allclose(ours.model.params[name], w, atol=1e3 * tolerance)
        assert ours.loss_history[-1] < ours.loss_history[0]
        # The model is this process's own again.
        assert ours.model.share == 1
        assert ours.model.norm is one.model.norm


@check
def all_ranks_end_with_the_same_bits():
    solver = trained(DataParallelSolver, "batchnorm", 25, 30)
    arrays = [*solver.model.params.values(), *(bn["running_var"] for bn in solver.model.bn_params)]
    assert len(set(everywhere(b"".join(a.tobytes() for a in arrays)))) == 1


@check
def messages_of_a_step_of_training():
    comm = Counting()
    trained(partial(DataParallelSolver, comm=comm), "batchnorm", 150, 1)
    net = FullyConnectedNet([20, 15], 12, 4, normalization="batchnorm")
    gradients = 8 * (1 + sum(w.size for w in net.params.values()))
    norm = 8 * (18 + 2 * distributed._channel(comm).room)
    assert comm.sent[-5:] == [norm, norm, norm, norm, gradients], comm.sent


@check
def the_first_rank_alone_writes_checkpoints():
    with tempfile.TemporaryDirectory() as folder:
        name = str(Path(folder) / "run")
        trained(DataParallelSolver, "batchnorm", 75, 4, checkpoint_name=name)
        WORLD.Barrier()
        files = sorted(path.name for path in Path(folder).iterdir())
        WORLD.Barrier()
        assert files == (["run_epoch_1.npz", "run_epoch_2.npz"] if RANK == 0 else [])


@check
def a_resumed_training_ends_with_the_same_bits_on_all_ranks():
    with tempfile.TemporaryDirectory() as folder:
        name = str(Path(folder) / "run")  # on a rank but the first there is nothing
        whole = trained(DataParallelSolver, "batchnorm", 75, 8, checkpoint_name=name)
        resumed = untrained(DataParallelSolver, "batchnorm", 75, 8)
        resumed.load_checkpoint(f"{name}_epoch_2.npz")
        assert resumed.epoch == 2
        resumed.train()
        assert resumed.loss_history == whole.loss_history
        for param, w in whole.model.params.items():
            np.testing.assert_array_equal(resumed.model.params[param], w)
        other = untrained(DataParallelSolver, None, 75, 2)
        # One rank cannot read, or the file says what does not fit: all have the error.
        assert raised(lambda: other.load_checkpoint(f"{name}_epoch_9.npz")).startswith("FileNotFoundError")
        assert "params must be" in raised(lambda: other.load_checkpoint(f"{name}_epoch_2.npz"))
        WORLD.Barrier()


@check
def solvers_that_differ_are_refused_on_all_ranks():
    data, odd = numbers(), RANK == SIZE - 1

    def make(**options):
        return DataParallelSolver(FullyConnectedNet([20 + options.pop("more", 0)], 12, 4), data, **options)

    errors = everywhere(raised(lambda: make(batch_size=10 + odd, more=int(odd))))
    refused = everywhere(raised(lambda: make(update_rule="none" if odd else "sgd")))
    model = raised(lambda: DataParallelSolver(type("Model", (), {"params": {}})(), data))
    if SIZE > 1:
        words = f"ValueError: all ranks must have the same batch_size, got {ranks(10, 11)}, model.params, got "
        assert all(error.startswith(words) for error in errors), errors
        assert all(f"DataParallelSolver failed: rank {SIZE - 1} (ValueError: " in error for error in refused[:-1])
    assert refused[-1].startswith("ValueError: ")
    assert "TypeError: model must have 'share'" in model


@check
def the_examples_of_the_docstrings():
    if SIZE == 1:  # they show one rank
        results = doctest.testmod(distributed)
        assert results.failed == 0
        assert results.attempted > 10


def main():
    results = {}
    for name, function in CHECKS.items():
        try:
            function()
            failure = None
        except Exception:
            failure = f"rank {RANK}:\n{traceback.format_exc()}"
        failures = [text for text in everywhere(failure) if text]
        results[name] = "\n".join(failures)
    if RANK == 0:
        print(json.dumps({"ranks": SIZE, "library": MPI.Get_library_version().split("\n")[0], "failures": results}))


def fault():
    """The last rank has a label that is none."""
    data = numbers()
    solver = DataParallelSolver(FullyConnectedNet([9], 12, 4, normalization="batchnorm"), data, num_epochs=100)
    if RANK == SIZE - 1:
        solver.y_train = solver.y_train + 1000
    solver.train()


def elsewhere():
    """The last rank calls with another communicator, which the others would wait for; each prints what it is told."""
    comm = WORLD.Dup()
    comm.Set_name("mine")
    errors = [raised(lambda: sync_batch_norm(np.ones((2, 2)), comm=comm if RANK == SIZE - 1 else WORLD))]
    errors += [raised(lambda: sync_batch_norm(np.ones((2, 2)), comm=comm if RANK == SIZE - 1 else WORLD))]
    sys.stdout.write(json.dumps(errors) + "\n")


def alone():
    """The last rank does not call at all."""
    if RANK < SIZE - 1:
        sys.stdout.write(json.dumps([raised(lambda: sync_batch_norm(np.ones((2, 2))))]) + "\n")


def interrupted():
    with abort_on_error():
        if RANK == SIZE - 1:
            raise KeyboardInterrupt
        sync_batch_norm(np.ones((2, 2)))


if __name__ == "__main__":
    {f.__name__: f for f in (main, fault, elsewhere, alone, interrupted)}[sys.argv[1]]()
