"""Temporal averaging of weights: what is evaluated is the average over the steps, not the last one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vardrop.training.sharding import local


class Averages:
    r"""Exponential average of parameters over steps, right from the first one (Kingma and Ba 2015, section 7.2).

    .. math:: \bar\theta_t = \beta \bar\theta_{t-1} + (1 - \beta)\theta_t, \qquad
              \hat\theta_t = \bar\theta_t / (1 - \beta^t)

    Kept is :math:`\hat\theta_t` itself: it moves towards θ by :math:`(1 - \beta) / (1 - \beta^t)`, which is the same.

    Args:
        parameters: tensors of any shape, sharded (DTensor) or not; they are read at every :meth:`update`.
        decay: β in [0, 1): about 1 / (1 - β) steps count. 0 keeps the last step only.

    Raises:
        ValueError: if ``decay`` is outside of [0, 1).

    Example:
        >>> import torch
        >>> from vardrop.training import Averages
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> averages = Averages([weight], decay=0.5)
        >>> averages.update()
        >>> _ = weight.data.fill_(4.0)
        >>> averages.update()  # (0.5 * 1 + 1 * 4) / 1.5
        >>> with averages.swapped_in():
        ...     print(weight.data)
        tensor([3.])
        >>> weight.data
        tensor([4.])
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"vardrop.training.Averages: decay must be at least 0 and below 1, got {decay}")
        self.parameters = list(parameters)
        self.decay = decay
        self.values = [p.detach().clone() for p in self.parameters]
        self.step = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters in as they are now."""
        self.step += 1
        weight = (1 - self.decay) / (1 - self.decay**self.step)
        torch._foreach_lerp_(local(self.values), local(self.parameters), weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the parameters be their averages until the block ends."""
        with torch.no_grad():
            here = local(self.parameters)
            kept = [p.clone() for p in here]
            torch._foreach_copy_(here, local(self.values))
            try:
                yield
            finally:
                torch._foreach_copy_(here, kept)
