"""The images that the studies train on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from normext._version import how_to_install

__all__ = ["Data", "load_data"]

TRAIN_IMAGES = 1000


@dataclass(frozen=True)
class Data:
    """Images and labels as `normext.cs231n.solver.Solver` takes them, and words about them.

    Attributes
    ----------
    name : str
        The name and a digest of the arrays: trainings on other images are other trainings.
    description : str
        One sentence for the reports.
    arrays : dict of ndarray
        X_train, y_train, X_val, y_val; the images have the shape (N, C, H, W).
    """

    name: str
    description: str
    arrays: dict[str, np.ndarray]


def load_data(name: str, folder: Path | None = None) -> Data:
    """The data called `name`: 1000 training images, and validation images that no training sees.

    ``"digits"`` are scikit-learn's 1797 handwritten digits of 8x8 pixels [1]_ in one fixed shuffle, whatever the seed
    of a study: 1000 for training, 797 for validation, none for a test, which no study needs. Pixels are stretched from
    0..16 to 0..255, the range of CIFAR-10, so that the weight scales of the assignment meet inputs of the size that
    they were chosen for; then the mean training image is subtracted.

    ``"cifar10"`` is CIFAR-10 [2]_ in its published layout, as `normext.cs231n.data_utils.get_CIFAR10_data` gives it:
    the first 1000 of its training images, and the next 1000 for validation.

    Parameters
    ----------
    name : str
        ``"digits"`` or ``"cifar10"``.
    folder : Path, optional
        Where cifar10's files are. Required with it.

    Returns
    -------
    Data

    Raises
    ------
    ValueError
        If the name is unknown, the folder missing or not wanted, or a file is not what it should be.
    OSError
        If a file is missing or cannot be read.
    ImportError
        If digits is wanted and scikit-learn is not there.

    References
    ----------
    .. [1] E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
           1998.
    .. [2] A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.

    Examples
    --------
    >>> load_data("digits").arrays["X_train"].shape
    (1000, 1, 8, 8)
    """
    if name == "digits":
        if folder is not None:
            raise ValueError(f"a data folder is for cifar10 only, got {folder} with digits")
        arrays, about = _digits(), "scikit-learn's handwritten digits (8x8 pixels, stretched to 0..255)"
    elif name == "cifar10":
        if folder is None:
            raise ValueError("cifar10 needs the folder of its files (--data-dir)")
        arrays, about = _cifar10(folder), "CIFAR-10"
    else:
        raise ValueError(f"unknown data {name!r}: want 'digits' or 'cifar10'")

    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array))
    counts = f"{len(arrays['X_train'])} training and {len(arrays['X_val'])} validation images"
    return Data(f"{name}-{digest.hexdigest()[:12]}", f"{about}, {counts}, mean training image subtracted", arrays)


def _digits() -> dict[str, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(f"the digits need scikit-learn: {how_to_install('study')}") from None
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order].reshape(-1, 1, 8, 8) * (255 / 16), labels[order]
    images -= images[:TRAIN_IMAGES].mean(axis=0)
    return {
        "X_train": images[:TRAIN_IMAGES],
        "y_train": labels[:TRAIN_IMAGES],
        "X_val": images[TRAIN_IMAGES:],
        "y_val": labels[TRAIN_IMAGES:],
    }


def _cifar10(folder: Path) -> dict[str, np.ndarray]:
    from normext.cs231n.data_utils import get_CIFAR10_data

    data = get_CIFAR10_data(TRAIN_IMAGES, num_validation=1000, num_test=0, cifar10_dir=folder)
    return {name: data[name] for name in ("X_train", "y_train", "X_val", "y_val")}
