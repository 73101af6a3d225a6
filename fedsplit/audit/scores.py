"""How close reconstructions come to the records; all but :func:`ssim` take flat records ``(T, n)``."""

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

CAP = 120.0  # dB; an exact copy has no finite PSNR


def psnr(x: NDArray[np.floating], guess: NDArray[np.floating], peak: float) -> Array:
    """Return each record's peak signal-to-noise ratio ``(T,)`` in dB, at most 120.

    Parameters
    ----------
    x, guess : arrays (T, n)
        Originals and reconstructions.
    peak : float
        The range of the records' numbers.

    Examples
    --------
    >>> psnr(np.zeros((1, 4)), np.full((1, 4), 0.1), peak=1.0).round(6).tolist()
    [20.0]
    """
    return _decibels(_errors(x, guess), peak)


def pooled_psnr(x: NDArray[np.floating], guess: NDArray[np.floating], peak: float) -> float:
    """Return the PSNR in dB of the mean squared error over all records, at most 120.

    Parameters
    ----------
    x, guess : arrays (T, n)
        Originals and reconstructions.
    peak : float
        The range of the records' numbers.
    """
    return float(_decibels(_errors(x, guess).mean(), peak))


def _errors(x: NDArray[np.floating], guess: NDArray[np.floating]) -> Array:
    """Return each record's mean squared error ``(T,)``."""
    return np.asarray(np.square(np.asarray(x, np.float64) - guess).mean(axis=1))


def _decibels(errors: Array, peak: float) -> Array:
    return np.asarray(-10 * np.log10(np.maximum(errors / peak**2, 10 ** (-CAP / 10))))


def nmse(x: NDArray[np.floating], guess: NDArray[np.floating], variance: NDArray[np.floating]) -> Array:
    """Return each record's squared error over the records' variance ``(T,)``: 0 is a copy, 1 as bad as the mean.

    Parameters
    ----------
    variance : array (n,)
        Of each value over public records.
    """
    return _errors(x, guess) / max(float(np.mean(variance)), 1e-300)


def ssim(x: NDArray[np.floating], guess: NDArray[np.floating], peak: float) -> Array:
    """Return the mean structural similarity ``(T,)`` of images.

    Wang, Bovik, Sheikh and Simoncelli (2004): Gaussian window of 11 x 11 (7 x 7 if a side is below 11) and deviation
    1.5, K1 = 0.01, K2 = 0.03, over the windows that lie inside the image.

    Parameters
    ----------
    x, guess : arrays (T, h, w)
        Originals and reconstructions.
    peak : float
        The range of the records' numbers.
    """
    side = min(x.shape[1:])
    size = 11 if side >= 11 else min(7, side)
    line = torch.exp(-((torch.arange(size, dtype=torch.float64) - (size - 1) / 2) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    a, b = (torch.from_numpy(np.array(images, np.float64))[:, None] for images in (x, guess))

    def local(values: torch.Tensor) -> torch.Tensor:  # (T, 1, h, w) -> (T, 1, windows down, windows across)
        return torch.nn.functional.conv2d(values, window)

    mean_a, mean_b = local(a), local(b)
    variances = local(a * a) - mean_a**2 + local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    return np.asarray(likeness.mean(dim=(1, 2, 3)).numpy())


def identification(
    guess: NDArray[np.floating], truth_index: NDArray[np.integer], candidates: NDArray[np.floating]
) -> float:
    """Return the share of guesses ``(T, n)`` that no candidate ``(N, n)`` is nearer to than the record itself.

    This is the image identifiability precision of the framework `breaching`. A copy of the record among the
    candidates is the record.

    Parameters
    ----------
    truth_index : int array (T,)
        The records' places among the candidates.
    """
    distances = [np.square(candidates - g).sum(axis=1) for g in np.asarray(guess, np.float64)]
    return float(np.mean([d[t] <= d.min() for d, t in zip(distances, truth_index, strict=True)]))


def summarise(
    x: NDArray[np.floating],
    guess: NDArray[np.floating],
    *,
    peak: float,
    variance: NDArray[np.floating],
    truth_index: NDArray[np.integer],
    candidates: NDArray[np.floating],
    image_shape: tuple[int, int, int] | None = None,
) -> dict[str, float | None]:
    """Score one attack on records ``(T, n)``.

    Parameters
    ----------
    image_shape : (channels, height, width) or None
        None: the records are no images and have no ssim.

    Returns
    -------
    dict
        ``psnr`` (pooled, dB), ``psnr_p95`` (95th percentile over records), ``nmse``, ``ssim`` (mean; of images, the
        mean over channels), ``identification``.
    """
    similarity = None
    if image_shape is not None:
        a, b = (values.reshape(-1, *image_shape[1:]) for values in (x, guess))  # (T * channels, h, w)
        similarity = float(ssim(a, b, peak).mean())
    return {
        "psnr": pooled_psnr(x, guess, peak),
        "psnr_p95": float(np.percentile(psnr(x, guess, peak), 95)),
        "nmse": float(nmse(x, guess, variance).mean()),
        "ssim": similarity,
        "identification": identification(guess, truth_index, candidates),
    }
