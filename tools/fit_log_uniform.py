"""Make the numbers in ``vardrop/kl.py``: rational fits to the exact log-uniform divergence and its slope.

With u = 1 / (2 alpha) and w = 1 / (1 + u), the two functions

    R(w) = x D(x) / (1 - w)                        x = sqrt(u), D: Dawson's function
    H(w) = (KL - log(1 + u) / 2) / (1 - w)

are smooth on [0, 1]. Both are fitted with one shared denominator, for relative error, by Sanathanan-Koerner
iterations with Lawson's weights. Needs numpy and mpmath. Usage: python tools/fit_log_uniform.py
"""

import mpmath as mp
import numpy as np

mp.mp.dps = 30
TERMS = {"float32": 7, "float64": 10}


def divergence(u: mp.mpf) -> mp.mpf:
    """KL = u 2F2(1, 1; 3/2, 2; -u), by its asymptotic series where u is large."""
    if u < 200:
        return u * mp.hyp2f2(1, 1, mp.mpf(3) / 2, 2, -u)
    total, term = mp.log(u) / 2 + mp.euler / 2 + mp.log(2), mp.mpf(1) / 2
    for k in range(1, 40):
        term *= (2 * k - 1) / (2 * u)
        total -= term / k
    return total


def slope(u: mp.mpf) -> mp.mpf:
    """x D(x) = u 1F1(1; 3/2; -u), by its asymptotic series where u is large."""
    if u < 200:
        return u * mp.hyp1f1(1, mp.mpf(3) / 2, -u)
    total = term = mp.mpf(1) / 2
    for k in range(1, 40):
        term *= (2 * k - 1) / (2 * u)
        total += term
    return total


def shared_fit(
    w: np.ndarray, targets: list[np.ndarray], terms: int, rounds: int = 60
) -> tuple[float, list[np.ndarray]]:
    """Numerators, one a target, and their common denominator (constant term 1), with the worst relative error."""
    powers = np.vander(w, terms, increasing=True)
    weight, denominator = np.ones((len(targets), len(w))), np.eye(1, terms)[0]
    best: tuple[float, list[np.ndarray]] = (np.inf, [])
    for round_ in range(rounds):
        at_w = powers @ denominator
        rows, right = [], []
        for i, y in enumerate(targets):
            scale = np.sqrt(weight[i]) / (np.abs(at_w) * y)
            block = np.zeros((len(w), len(targets) * terms + terms - 1))
            block[:, i * terms : (i + 1) * terms] = powers
            block[:, len(targets) * terms :] = -y[:, None] * powers[:, 1:]
            rows.append(block * scale[:, None])
            right.append(y * scale)
        system = np.concatenate(rows)
        norms = np.linalg.norm(system, axis=0)
        solution = np.linalg.lstsq(system / norms, np.concatenate(right), rcond=None)[0] / norms
        numerators = [solution[i * terms : (i + 1) * terms] for i in range(len(targets))]
        denominator = np.concatenate([[1.0], solution[len(targets) * terms :]])
        at_w = powers @ denominator
        error = np.stack([powers @ p / at_w / y - 1 for p, y in zip(numerators, targets, strict=True)])
        worst = float(np.abs(error).max())
        if at_w.min() > 0 and worst < best[0]:
            best = worst, [*numerators, denominator]
        if round_ > 5:
            weight = np.maximum(weight * np.abs(error) / worst, 1e-6)
            weight /= weight.max()
    return best


def main() -> None:
    """Print the fits, ready to be copied."""
    grid = (1 - np.cos(np.pi * (np.arange(240) + 0.5) / 240)) / 2
    w = np.unique(np.concatenate([grid, np.geomspace(1e-10, 1e-3, 40)]))
    u = [(1 - mp.mpf(x)) / mp.mpf(x) for x in w]
    r = np.array([float(slope(v) / (1 - mp.mpf(x))) for v, x in zip(u, w, strict=True)])
    h = np.array([float((divergence(v) - mp.log(1 + v) / 2) / (1 - mp.mpf(x))) for v, x in zip(u, w, strict=True)])
    for name, terms in TERMS.items():
        worst, fits = shared_fit(w, [r, h], terms)
        print(f"{name}: relative error {worst:.1e}")
        for label, coefficients in zip(("slope", "value", "below"), fits, strict=True):
            print(f"  {label}=({', '.join(f'{c:.12g}' for c in coefficients)}),")


if __name__ == "__main__":
    main()
