"""Fréchet distance between two sets of feature vectors.

Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions", J. Multivariate Analysis
12, 1982; Heusel et al., arXiv:1706.08500, equation 6, for its use on a network's features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdc.engines.errors import InputError, NumericalError


@dataclass(frozen=True)
class Gaussian:
    """The normal distribution fitted to a set of vectors.

    Attributes:
        mean: [D], float64.
        covariance: [D, D], float64, unbiased.
        count: vectors that it was fitted to.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int

    @classmethod
    def fit(cls, vectors: np.ndarray) -> Gaussian:
        """Fit to vectors [N, D].

        Raises:
            InputError: fewer than two vectors.
            NumericalError: a value is NaN or infinite.
        """
        wide = np.asarray(vectors, np.float64)
        if len(wide) < 2:
            raise InputError(f"a covariance needs two pictures or more, found {len(wide)}")
        if not np.isfinite(wide).all():
            raise NumericalError("features of pictures hold NaN or infinity", hint="look at the pictures themselves")
        mean = wide.mean(axis=0)
        centred = wide - mean
        return cls(mean, centred.T @ centred / (len(wide) - 1), len(wide))


def frechet_distance(left: Gaussian, right: Gaussian) -> float:
    """Squared Fréchet (2-Wasserstein) distance: |m1 - m2|² + tr(C1 + C2 - 2 (C1½ C2 C1½)½).

    Covariances may be singular, as they are with fewer vectors than dimensions. The square root is taken of the
    symmetric product, so its eigenvalues are real; those that rounding made negative count as 0.

    Raises:
        InputError: the dimensions differ.
    """
    if left.mean.shape != right.mean.shape:
        raise InputError(f"features of one width expected, found {left.mean.shape} and {right.mean.shape}")
    root = _square_root(left.covariance)
    eigenvalues = np.linalg.eigvalsh(root @ right.covariance @ root)
    overlap = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    spread = np.trace(left.covariance) + np.trace(right.covariance) - 2 * overlap
    return max(0.0, float(np.square(left.mean - right.mean).sum() + spread))


def _square_root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric root of a positive semidefinite matrix [D, D]."""
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(np.clip(eigenvalues, 0, None))) @ vectors.T)
