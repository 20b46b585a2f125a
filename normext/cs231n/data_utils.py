"""CIFAR-10 in its published layout: six pickles written by Python 2, read without running anything that they ask for.

A pickle is a program, and can do whatever the functions can that it is given. The reader here gives it none of NumPy's
own: already ``numpy.ndarray`` forges pointers, when it is called for an array of objects over given bytes. In their
place stand two small classes that hold what an array is pickled as, whole numbers only, and make the array from that.
"""

import os
import pickle
from typing import Any

import numpy as np

__all__ = ["get_CIFAR10_data", "load_CIFAR10", "load_CIFAR_batch"]

TRAINING_FILES = [f"data_batch_{i}" for i in range(1, 6)]
TEST_FILE = "test_batch"
IMAGE_SHAPE = (3, 32, 32)  # colours, rows, columns
NUM_CLASSES = 10


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
        with open(filename, "rb") as file:
            batch = _BatchUnpickler(file, encoding="bytes").load()
        data, labels = (_array(_entry(batch, name)) for name in ("data", "labels"))
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


def _array(entry):
    return entry.values if isinstance(entry, _PickledArray) else np.array(entry)


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


def _encode(text, encoding):
    """Bytes as Python 3 writes them for Python 2 to read."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding!r} is not admitted")
    return text.encode("latin1")


#: What a pickled array asks for by name. NumPy's inner module is ``numpy._core`` since version 2.
KNOWN_NAMES = {
    ("numpy", "dtype"): _PickledDtype,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy.core.numeric", "_frombuffer"): _PickledArray.from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _PickledArray.from_buffer,
    ("_codecs", "encode"): _encode,
}


class _BatchUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN_NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs; refused")
        return KNOWN_NAMES[module, name]
