"""Cheap bounds of the distance between the uniform measures on the rows of u and v, both n x d.

Every bound is per element (divided by d), as the exact value. mean <= marginal <= exact <= greedy, identity;
signs and sphere <= exact.
"""

from __future__ import annotations

import math

import numpy as np


def mean(u: np.ndarray, v: np.ndarray) -> float:
    """Lower: the l1 distance of the mean patches."""
    return float(np.abs(u.mean(0) - v.mean(0)).mean())


def marginal(u: np.ndarray, v: np.ndarray) -> float:
    """Lower: the l1 cost separates, so the distances of the coordinates' own distributions add up to a bound."""
    return float(np.abs(np.sort(u, 0) - np.sort(v, 0)).mean())


def marginal_potentials(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(f(u), f(v)), (n,) each, of the f that attains d times the marginal bound as mean f(u) - mean f(v).

    f is a sum of one function of slope -1, 0 or 1 for each coordinate, so |f(u) - f(v)| is at most their l1 distance.
    """
    n = len(u)
    values = np.concatenate([u, v]).T  # d x 2n
    order = np.argsort(values, axis=1)
    ahead = np.cumsum(np.where(order < n, 1, -1), axis=1)[:, :-1]  # of u below, less of v below
    steps = -np.sign(ahead) * np.diff(np.take_along_axis(values, order, 1), axis=1)
    sorted_f = np.zeros_like(values)
    np.cumsum(steps, axis=1, out=sorted_f[:, 1:])
    f = np.empty_like(values)
    np.put_along_axis(f, order, sorted_f, 1)
    total = f.sum(0)
    return total[:n], total[n:]


def signs(u: np.ndarray, v: np.ndarray, projections: int, rng: np.random.Generator) -> float:
    """Lower: the largest W1 along `projections` random directions in {-1, 1}^d, each 1-Lipschitz in l1."""
    theta = rng.choice([-1.0, 1.0], size=(u.shape[1], projections))
    return float(_projected(u, v, theta).max() / u.shape[1])


def sphere(u: np.ndarray, v: np.ndarray, projections: int, rng: np.random.Generator) -> float:
    """Lower in the limit of many projections, and very loose: the mean W1 along directions on the unit l2 sphere,
    divided by `sphere_constant`."""
    theta = rng.normal(size=(u.shape[1], projections))
    theta /= np.linalg.norm(theta, axis=0)
    return float(_projected(u, v, theta).mean() / (sphere_constant(u.shape[1]) * u.shape[1]))


def sphere_constant(d: int) -> float:
    """c_d = E |theta_1|, theta on the unit sphere: the sliced distance is at most c_d times the one of cost l2, and
    that at most the one of cost l1."""
    return math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)


def identity(u: np.ndarray, v: np.ndarray) -> float:
    """Upper: patches paired in their order; at shared places at most the largest change of a pixel."""
    return float(np.abs(u - v).mean())


def greedy(cost: np.ndarray) -> float:
    """Upper, NOT per element: the cheapest pair left, over and over, of an n x n cost matrix; the mean cost."""
    n = len(cost)
    rows, columns = np.ones(n, dtype=bool), np.ones(n, dtype=bool)
    total = 0.0
    for at in np.argsort(cost, axis=None):
        row, column = divmod(int(at), n)
        if rows[row] and columns[column]:
            rows[row] = columns[column] = False
            total += float(cost[row, column])
    return total / n


def perturbation(delta: np.ndarray, size: int) -> float:
    """Upper, of all windows at stride 1 of an image changed by `delta` (C x H x W): a pixel is in size^2 at most."""
    channels, height, width = delta.shape
    windows = (height - size + 1) * (width - size + 1)
    return float(np.abs(delta).sum() / (windows * channels))


def _projected(u: np.ndarray, v: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """(L,) W1 of the rows of u and v along each of the L columns of theta (d x L)."""
    distances: np.ndarray = np.abs(np.sort(u @ theta, 0) - np.sort(v @ theta, 0)).mean(0)
    return distances
