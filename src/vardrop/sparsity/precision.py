"""The significant binary digits that a weight's noise pays for (Kingma et al. 2015, section 3.3)."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from vardrop.given import check_module
from vardrop.sparsity.ranking import log_alpha_of
from vardrop.weights.modules import noisy_weights


def round_significant(x: Tensor, digits: Tensor | int) -> Tensor:
    r"""Round to so many significant binary digits, to the nearest.

    .. math:: |round(x) - x| \le 2^{-digits} |x|

    Args:
        x: any real values.
        digits: whole numbers, of the same shape or one for all; 0 gives 0.

    Example:
        >>> import torch
        >>> from vardrop.sparsity import round_significant
        >>> round_significant(torch.tensor([5.0, 5.0, 5.0, -0.3]), torch.tensor([0, 1, 2, 3])).tolist()
        [0.0, 4.0, 4.0, -0.3125]
    """
    digits = torch.as_tensor(digits, device=x.device).expand(x.shape)
    wide = x.double()
    mantissa, exponent = torch.frexp(wide)  # 0.5 <= |mantissa| < 1
    rounded = torch.ldexp(torch.ldexp(mantissa, digits).round(), exponent - digits)
    return torch.where(digits > 0, rounded, torch.zeros_like(wide)).to(x)


def significant_digits(model: nn.Module, minimum: int = 1, extra: int = 0) -> dict[str, Tensor]:
    r"""How many binary digits each weight is worth.

    .. math:: digits = \max(minimum, \lceil -\tfrac12 \log_2 \alpha \rceil + extra)

    so that rounding is off by no more than the standard deviation of the noise, √α |θ|.

    Args:
        model: a converted module with learned noise.
        minimum: digits of a weight whose α is above 1: with 1 it keeps its sign and its nearest power of two; with 0,
            the formula to the letter, it becomes 0 (which is ``vd.sparsify_(model, threshold=0)``).
        extra: more digits than the noise pays for.

    Returns:
        Name of the weight -> whole numbers of its shape; 0 for weights that are 0.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if no weight has learned noise, or the arguments are no whole numbers of 0 or more.

    Example:
        >>> import torch, vardrop as vd
        >>> layer = torch.nn.Linear(2, 1)
        >>> _ = vd.convert_(layer, vd.VariationalDropout(alpha=2**-10))
        >>> vd.sparsity.significant_digits(layer)
        {'weight': tensor([[5, 5]])}
    """
    return _digits(model, minimum, extra, "sparsity.significant_digits")


def quantize_to_noise(model: nn.Module, minimum: int = 1, extra: int = 0, other_digits: int | None = None) -> nn.Module:
    r"""A copy of a model whose weights have only the significant binary digits that their noise pays for.

    .. math:: digits = \max(minimum, \lceil -\tfrac12 \log_2 \alpha \rceil + extra)

    A weight with relative noise √α carries about −½ log₂ α bits (Kingma et al. 2015, section 3.3); rounding it to
    those is off by less than the standard deviation of the noise that it was trained to bear. The copy computes in the
    same floating-point type: what is gained shows in :func:`vardrop.compressed_size`.

    Args:
        model: a converted module, trained; better after :func:`vardrop.sparsify_` than before.
        minimum: digits that every weight keeps, of those that are not 0.
        extra: more digits than the noise pays for.
        other_digits: significant digits of all other parameters (biases, norms); None leaves them as they are.

    Returns:
        A copy, converted like the model.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if no weight has learned noise, or a number of digits is no whole number in its range.

    Example:
        >>> import torch, vardrop as vd
        >>> layer = torch.nn.Linear(3, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.3, 1.1, -5.3]]))
        >>> _ = vd.convert_(layer, vd.VariationalDropout(alpha=2**-4))
        >>> vd.quantize_to_noise(layer).eval().weight.tolist()
        [[0.25, 1.0, -6.0]]
    """
    if other_digits is not None and (isinstance(other_digits, bool) or not isinstance(other_digits, int)):
        raise ValueError(
            f"vardrop.quantize_to_noise: other_digits must be a whole number or None, got {other_digits!r}"
        )
    if other_digits is not None and other_digits < 1:
        raise ValueError(f"vardrop.quantize_to_noise: other_digits must be at least 1, got {other_digits!r}")
    digits = _digits(model, minimum, extra, "quantize_to_noise")
    small = copy.deepcopy(model)
    random = set()
    with torch.no_grad():
        for weight in noisy_weights(small):
            random |= {id(weight.mean), id(weight.noise)}
            if weight.name in digits:
                weight.mean.copy_(round_significant(weight.mean, digits[weight.name]))
        for parameter in small.parameters():
            if other_digits is not None and id(parameter) not in random and parameter.is_floating_point():
                parameter.copy_(round_significant(parameter, other_digits))
    return small


def _digits(model: nn.Module, minimum: int, extra: int, by: str) -> dict[str, Tensor]:
    """What :func:`significant_digits` returns, for one or the other to ask."""
    check_module(model, by)
    for name, value in (("minimum", minimum), ("extra", extra)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"vardrop.{by}: {name} must be a whole number of 0 or more, got {value!r}")
    found = {}
    for weight in noisy_weights(model):
        if weight.config.learned:
            digits = (log_alpha_of(weight) / (-2 * math.log(2)) - 1e-4).ceil().to(torch.int64)  # less than rounding
            digits = digits.clamp(0) + extra
            digits = digits.clamp(minimum, 1 + round(-math.log2(torch.finfo(weight.mean.dtype).eps)))
            found[weight.name] = torch.where(weight.mean.detach() == 0, 0, digits)
    if not found:
        raise ValueError(
            f"vardrop.{by}: needs weights with learned noise, which says how many digits they are worth, "
            f"got a {type(model).__name__} without any; vd.convert_ and train it first, and vd.restore_ it later"
        )
    return found
