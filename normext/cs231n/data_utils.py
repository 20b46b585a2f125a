"""CIFAR-10 in its published layout: six pickles written by Python 2, read without running anything that they ask for.

A pickle is a program, and can do whatever the functions can that it is given. The reader here gives it none of NumPy's
own: already ``numpy.ndarray`` forges pointers, when it is called for an array of objects over given bytes. In their
place stand two small classes that hold what an array is pickled as, whole numbers only, and make the array from that.
Of the instructions it carries out a part, and no more than a batch may need, so that memory is bounded as well.
"""

import io
import os
import pickle
import struct
from typing import Any

import numpy as np

from normext._files import read_file

__all__ = ["get_CIFAR10_data", "load_CIFAR10", "load_CIFAR_batch"]

TRAINING_FILES = [f"data_batch_{i}" for i in range(1, 6)]
TEST_FILE = "test_batch"
IMAGE_SHAPE = (3, 32, 32)  # colours, rows, columns
NUM_CLASSES = 10
FILE_LIMIT = 1 << 28  # bytes: a file of CIFAR-10 has 31 MB
READ_LIMIT = 1 << 19  # steps in reading it: a file of CIFAR-10 takes less than a fifth


def get_CIFAR10_data(
    num_training: int = 49000,
    num_validation: int = 1000,
    num_test: int = 1000,
    subtract_mean: bool = True,
    cifar10_dir: str | os.PathLike[str] | None = None,
) -> dict[str, np.ndarray]:
    """CIFAR-10 [1]_, split into training, validation and test data and centred, ready for a network.

    Parameters
    ----------
    num_training : int, default 49000
        The first so many of the 50000 training images.
    num_validation : int, default 1000
        The so many after these.
    num_test : int, default 1000
        The first so many of the 10000 test images.
    subtract_mean : bool, default True
        Subtract the mean image of the training data from all images.
    cifar10_dir : path, optional
        Folder with data_batch_1 to data_batch_5 and test_batch. Default: ``cs231n/datasets/cifar-10-batches-py`` in the
        working directory, where the course's own script puts it.

    Returns
    -------
    dict of str to ndarray
        X_train, X_val, X_test: float64, shape (N, 3, 32, 32), 0 to 255 before the mean is taken off; y_train, y_val,
        y_test: int64, shape (N,).

    Raises
    ------
    FileNotFoundError
        If a file is not there; the message says what to download, and where to put it.
    ValueError
        If a file is not what it should be, more images are asked for than there are, or none for training.

    References
    ----------
    .. [1] A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.

    Examples
    --------
    >>> data = get_CIFAR10_data(num_training=1000)  # doctest: +SKIP
    >>> data["X_train"].shape  # doctest: +SKIP
    (1000, 3, 32, 32)
    """
    root = os.path.join("cs231n", "datasets", "cifar-10-batches-py") if cifar10_dir is None else cifar10_dir
    if num_training < 1 or num_validation < 0 or num_test < 0:
        raise ValueError(
            "num_training must be at least 1, num_validation and num_test at least 0, "
            f"got {num_training}, {num_validation} and {num_test}"
        )
    images, labels = _read_batches(root, TRAINING_FILES)
    test_images, test_labels = _read_batches(root, [TEST_FILE])
    if num_training + num_validation > len(images):
        raise ValueError(
            f"num_training + num_validation must be at most {len(images)}, the images in {root}, "
            f"got {num_training} + {num_validation}"
        )
    if num_test > len(test_images):
        raise ValueError(f"num_test must be at most {len(test_images)}, the test images in {root}, got {num_test}")

    training, validation = slice(num_training), slice(num_training, num_training + num_validation)
    data = {
        "X_train": images[training].astype(np.float64),
        "y_train": labels[training],
        "X_val": images[validation].astype(np.float64),
        "y_val": labels[validation],
        "X_test": test_images[:num_test].astype(np.float64),
        "y_test": test_labels[:num_test],
    }
    if subtract_mean:
        mean_image = data["X_train"].mean(axis=0)
        for name in ("X_train", "X_val", "X_test"):
            data[name] -= mean_image
    return data


def load_CIFAR10(root: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All of CIFAR-10.

    Parameters
    ----------
    root : path
        Folder with data_batch_1 to data_batch_5 and test_batch.

    Returns
    -------
    Xtr, Ytr, Xte, Yte : ndarray
        Images, float64 from 0 to 255, shape (50000, 32, 32, 3) and (10000, 32, 32, 3), and their labels, int64.

    Raises
    ------
    FileNotFoundError
        If a file is not there; the message says what to download, and where to put it.
    ValueError
        If a file is not what it should be.

    Examples
    --------
    >>> Xtr, Ytr, Xte, Yte = load_CIFAR10("cs231n/datasets/cifar-10-batches-py")  # doctest: +SKIP
    """
    images, labels = _read_batches(root, TRAINING_FILES)
    test_images, test_labels = _read_batches(root, [TEST_FILE])
    return _channels_last(images), labels, _channels_last(test_images), test_labels


def load_CIFAR_batch(filename: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """One file of CIFAR-10.

    Parameters
    ----------
    filename : path
        Of data_batch_1, say.

    Returns
    -------
    X : ndarray of float64, shape (10000, 32, 32, 3)
        From 0 to 255.
    Y : ndarray of int64, shape (10000,)

    Raises
    ------
    FileNotFoundError
        If the file is not there; the message says what to download, and where to put it.
    ValueError
        If the file is truncated, or not a batch of CIFAR-10.

    Examples
    --------
    >>> X, Y = load_CIFAR_batch("cs231n/datasets/cifar-10-batches-py/data_batch_1")  # doctest: +SKIP
    """
    images, labels = _read_batch(filename)
    return _channels_last(images), labels


def _channels_last(images):
    return images.transpose(0, 2, 3, 1).astype(np.float64)


def _read_batches(root, names):
    images, labels = zip(*(_read_batch(os.path.join(root, name)) for name in names), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _read_batch(filename):
    """The images of a file as bytes, (N, 3, 32, 32), and its labels."""
    try:
        batch = _BatchUnpickler(read_file(filename, FILE_LIMIT)).load()
        data, labels = (_array(_entry(batch, name), name) for name in ("data", "labels"))
        _check_batch(data, labels)
    except FileNotFoundError:
        raise FileNotFoundError(
            f'{os.fspath(filename)} not found. Download the "CIFAR-10 python version" from '
            "https://www.cs.toronto.edu/~kriz/cifar.html and unpack it so that this file is there"
        ) from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way at all
        raise ValueError(
            f"{os.fspath(filename)} is not a batch of CIFAR-10, or is damaged: {type(error).__name__}: {error}"
        ) from error
    return data.reshape(-1, *IMAGE_SHAPE), labels.astype(np.int64)


def _entry(batch, name):
    if not isinstance(batch, dict):
        raise TypeError(f"it holds a {type(batch).__name__}, not a dict")
    for key in (name.encode(), name):  # as Python 2 and as Python 3 wrote it
        if key in batch:
            return batch[key]
    raise ValueError(f"it has no entry {name!r}")


def _array(entry, name):
    if isinstance(entry, _PickledArray):
        return entry.values
    # A list of lists can hold the same one over and over, and that another: a thousand cubed of numbers in a few bytes.
    if not isinstance(entry, list) or not all(isinstance(value, int) for value in entry):
        raise ValueError(f"{name} must be an array or a list of whole numbers, got a {type(entry).__name__}")
    return np.array(entry)


def _check_batch(data, labels):
    columns = int(np.prod(IMAGE_SHAPE))
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != columns or len(data) == 0:
        raise ValueError(f"data must be uint8 of shape (N, {columns}), got {data.dtype} of shape {data.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != data.shape[:1]:
        raise ValueError(f"labels must be {len(data)} whole numbers, got {labels.dtype} of shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise ValueError(f"labels must be from 0 to {NUM_CLASSES - 1}, got {labels.min()} to {labels.max()}")


class _PickledDtype:
    """What a pickle builds where it says ``numpy.dtype``: a type of whole numbers and its byte order."""

    def __init__(self, code, *_):
        if not isinstance(code, (str, bytes)):
            raise pickle.UnpicklingError(f"a dtype is named by a text, not by a {type(code).__name__}")
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "iu":
            raise pickle.UnpicklingError(f"arrays of {self.dtype} are not admitted, only of whole numbers")

    def __setstate__(self, state):
        order = state[1]
        self.dtype = self.dtype.newbyteorder(order.decode() if isinstance(order, bytes) else order)


class _PickledArray:
    """What a pickle builds where it says ``numpy.ndarray``."""

    def __init__(self, *_):
        self.values = np.empty(0)

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, data = state
        self.values = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if is_fortran else "C")

    @classmethod
    def from_buffer(cls, data, dtype, shape, order):
        array = cls()
        array.__setstate__((1, shape, dtype, order == "F", data))
        return array


#: Those that arrays, texts, whole numbers, lists and dicts are written with.
INSTRUCTIONS = (
    "PROTO STOP MARK POP POP_MARK GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST "
    "LIST APPEND APPENDS EMPTY_DICT"
).split()


class _Content(io.BytesIO):
    """The bytes of a file, to be read in so many steps and no more: a byte can ask for an object of a hundred."""

    steps = READ_LIMIT

    def read(self, size: int | None = -1) -> bytes:
        self.steps -= 1
        if self.steps < 0:
            raise pickle.UnpicklingError("it has more parts than a batch")
        return super().read(size)


class _BatchUnpickler(pickle._Unpickler):  # type: ignore[name-defined] # as joblib's
    """The unpickler that is in Python, and of its instructions a part.

    The one in C cannot be held to that, and nine bytes ask it for 4 GiB (the place of an object in its memory), a
    quarter of a megabyte crashes it (the hash of tuples in tuples in tuples, as the key of a dict).
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(_Content(content), encoding="bytes")
        self._left = len(content)  # bytes that may still be encoded: a text is encoded once
        #: What a pickled array asks for by name. NumPy's inner module is ``numpy._core`` since version 2.
        self._known = {
            ("numpy", "dtype"): _PickledDtype,
            ("numpy", "ndarray"): _PickledArray,
            ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
            ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
            ("numpy.core.numeric", "_frombuffer"): _PickledArray.from_buffer,
            ("numpy._core.numeric", "_frombuffer"): _PickledArray.from_buffer,
            ("_codecs", "encode"): self._encode,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs; refused")
        return self._known[module, name]

    def _encode(self, text, encoding):
        """Bytes as Python 3 writes them for Python 2 to read."""
        if encoding != "latin1":
            raise pickle.UnpicklingError("text is encoded in latin1 only")
        self._left -= len(text)
        if self._left < 0:
            raise pickle.UnpicklingError("it has more text than the file")
        return text.encode("latin1")

    def load_refused(self):
        raise pickle.UnpicklingError("it has an instruction that no array needs; refused")

    def load_frame(self):
        self.read(8)  # how many of the bytes that follow to read ahead

    def load_bytearray8(self):
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(size))  # no memory before there is something to put into it

    def load_build(self):
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (_PickledDtype, _PickledArray)):
            raise pickle.UnpicklingError("it changes what is not an array")
        self.stack[-1].__setstate__(state)

    def load_dict(self):
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self):
        self._set(self.pop_mark())

    def _set(self, items):
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, (str, bytes)) for key in items[::2]):
            raise pickle.UnpicklingError("the keys of a dict are not texts")
        self.stack[-1].update(zip(items[::2], items[1::2]))

    dispatch = dict.fromkeys(range(256), load_refused) | {
        code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in INSTRUCTIONS)
    }
    dispatch |= {
        pickle.FRAME[0]: load_frame,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.BUILD[0]: load_build,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }
