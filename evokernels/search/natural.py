"""The exact natural gradient of a Gaussian search distribution, in closed form.

Candidates are x = m + Aᵀz with z standard normal and A upper triangular, so that their covariance
is C = AᵀA (Yi, Wierstra, Schaul & Schmidhuber 2009). The natural gradient multiplies the
log-derivatives of the density by the inverse of their Fisher matrix, which the paper inverts block
by block in O(d³). Nothing has to be inverted. A natural gradient does not depend on the coordinates
it is computed in, and in the coordinates M of a change A → (I + M) A, M upper triangular, z becomes
z - Mᵀz and log det A grows by tr M:

    log-derivative by M_kj     z_k z_j - [k = j]            for j ≥ k
    its Fisher matrix          diagonal: 1 for j > k, 2 for j = k
    natural gradient           M_kj = z_k z_j for j > k,  M_kk = ½ (z_k² - 1)

Row k of A therefore changes by the k-th row of M A, and the mean by x - m:

    (1)  v_k = z_k S_k + ½ (z_k² - 1) A_k    with  S_k = Σ_{j>k} z_j A_j
    (2)  v_0 = x - m = Σ_j z_j A_j

Each of these d + 1 blocks has a baseline of its own, that which makes the variance of its estimate
smallest (Yi et al. 2009, "block fitness baselines"), over n individuals i with utilities u_i:

    (3)  b_k = Σ_i u_i |v_ik|² / Σ_i |v_ik|²
    (4)  g_k = 1/n Σ_i (u_i - b_k) v_ik

The vectors of (1) are never formed: that would be n d² numbers. Their lengths follow from

    (5)  |v_k|² = z_k² |S_k|² + z_k (z_k² - 1) S_k·A_k + ¼ (z_k² - 1)² |A_k|²
    (6)  |S_{k-1}|² = |S_k|² + 2 z_k S_k·A_k + z_k² |A_k|²

and their sum (4) is a product of matrices. Rows are taken in blocks from the last one up, so that
the whole takes O(n d² + B d²) operations for blocks of B rows, all of them in matrix products.
"""

from __future__ import annotations

import functools

import numpy as np

__all__ = ["natural_gradient", "utilities"]

BLOCK = 32  # rows of A; large enough for matrix products to run at speed
EYE = np.eye(BLOCK)
ABOVE = np.triu(np.ones((BLOCK, BLOCK)), 1)  # [k, j] = 1 for j > k
UPPER = ABOVE + 0.5 * EYE  # half the diagonal: M_kk has the Fisher information 2
MASKS = np.stack([EYE, ABOVE, UPPER])
TINY = np.finfo(np.float64).tiny


@functools.lru_cache(maxsize=64)
def utilities(individuals: int, parents: float) -> np.ndarray:
    """Utilities by rank, best first: falling linearly from 1 to 0 at the last parent.

    Args:
        individuals: n, the length of the result.
        parents: how many have a share, counting the last one, whose share is 0; more than 1, and
            n / 2 in pypop7's reading of the papers.

    Returns:
        max(0, parents - 1 - rank) / (parents - 1), float64, read-only.
    """
    shares = np.maximum(0.0, parents - 1 - np.arange(individuals)) / (parents - 1)
    shares.setflags(write=False)
    return shares


def natural_gradient(
    z: np.ndarray, utility: np.ndarray, a: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The natural gradient of the expected utility by the mean and by A.

    Args:
        z: (n, d) float64, what candidates x = mean + Aᵀz were made of.
        utility: (n,) float64, higher is better.
        a: (d, d) float64, upper triangular.

    Returns:
        The gradients by the mean, (d,), and by A, (d, d) upper triangular.
    """
    n, d = z.shape
    # individuals side by side: every operation then runs along them, not along a few dimensions
    z = np.ascontiguousarray(z.T)
    shares = np.ones((n, 2))  # sums over the individuals, plain and weighted, are one product
    shares[:, 1] = utility = utility / n
    level = utility @ shares[:, 0]
    gradient = np.zeros((d, d))
    sums = np.zeros((d, n))  # Σ z_j A_j over the rows so far
    lengths = np.zeros(n)  # and its squared length
    for low in range((d - 1) // BLOCK * BLOCK, -1, -BLOCK):
        high = min(low + BLOCK, d)
        numbers, rows, tail = z[low:high], a[low:high, low:], sums[low:]
        eye, above, upper = MASKS[:, : high - low, : high - low]

        gram = rows @ rows.T
        squares = gram.diagonal()[:, None]
        power = numbers * numbers
        half = 0.5 * power - 0.5
        cross = 2.0 * numbers * (rows @ tail + (gram * above) @ numbers)  # 2 z_k S_k·A_k
        growth = cross + power * squares
        tails = lengths + above @ growth  # |S_k|², by (6)
        norms = power * tails + half * (cross + half * squares)  # (5)
        lengths = tails[0] + growth[0]
        baseline = _baseline(norms, shares)

        weighted = numbers * (utility - baseline[:, None])
        m = (weighted @ numbers.T - eye * (level - n * baseline)) * upper
        gradient[low:high, low:] = weighted @ tail.T + m @ rows  # (4)
        tail += rows.T @ numbers
    return sums @ (utility - _baseline(lengths, shares)), gradient


def _baseline(norms: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Equation (3); 0 for a block that has shrunk to nothing."""
    sums = norms @ shares
    return sums[..., 1] / np.maximum(sums[..., 0], TINY)
