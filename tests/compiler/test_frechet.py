"""The Fréchet distance against closed forms and an independent formula."""

import numpy as np
import pytest

from sdc.compiler.evaluate.frechet import Gaussian, frechet_distance
from sdc.engines.errors import InputError, NumericalError


def random_covariance(seed: int, width: int) -> np.ndarray:
    factor = np.random.default_rng(seed).standard_normal((width, 2 * width))
    return factor @ factor.T / width


def test_diagonal_covariances_have_a_closed_form() -> None:
    random = np.random.default_rng(1)
    m1, m2, s1, s2 = random.standard_normal(7), random.standard_normal(7), random.random(7), random.random(7)
    distance = frechet_distance(Gaussian(m1, np.diag(s1**2), 9), Gaussian(m2, np.diag(s2**2), 9))
    assert distance == pytest.approx(((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum(), rel=1e-12)


def test_full_covariances_agree_with_the_eigenvalues_of_the_unsymmetric_product() -> None:
    a, b = random_covariance(2, 13), random_covariance(3, 13)
    overlap = np.sqrt(np.linalg.eigvals(a @ b).real).sum()  # tr (AB)^1/2, the formula of Heusel et al.
    mean = np.zeros(13)
    expected = np.trace(a) + np.trace(b) - 2 * overlap
    assert frechet_distance(Gaussian(mean, a, 9), Gaussian(mean, b, 9)) == pytest.approx(expected, rel=1e-9)


def test_distance_is_symmetric_and_vanishes_on_itself() -> None:
    random = np.random.default_rng(4)
    a = Gaussian(random.standard_normal(11), random_covariance(5, 11), 9)
    b = Gaussian(random.standard_normal(11), random_covariance(6, 11), 9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, a) < 1e-9 * np.trace(a.covariance)


def test_singular_covariances_are_handled() -> None:
    """Rank one against rank one: the overlap is |u.v| of the two directions."""
    u, v = np.array([3.0, 0, 4, 0]), np.array([1.0, 2, 0, 2])
    zero = np.zeros(4)
    distance = frechet_distance(Gaussian(zero, np.outer(u, u), 2), Gaussian(zero, np.outer(v, v), 2))
    assert distance == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), abs=1e-6)


def test_fit_equals_numpy() -> None:
    vectors = 5 + np.random.default_rng(7).standard_normal((31, 6)).astype(np.float32)
    fitted = Gaussian.fit(vectors)
    np.testing.assert_allclose(fitted.mean, vectors.mean(0, np.float64), rtol=1e-12)
    np.testing.assert_allclose(fitted.covariance, np.cov(vectors.T.astype(np.float64)), rtol=1e-10, atol=1e-12)
    assert fitted.count == 31


def test_bad_features_are_refused() -> None:
    with pytest.raises(NumericalError, match="NaN"):
        Gaussian.fit(np.array([[1.0, np.nan], [0, 1]]))
    with pytest.raises(InputError, match="two pictures"):
        Gaussian.fit(np.ones((1, 3)))
    with pytest.raises(InputError, match="one width"):
        frechet_distance(Gaussian.fit(np.eye(3)), Gaussian.fit(np.eye(4)))
