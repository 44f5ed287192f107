"""Train a sparse model on without waking what was removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from vardrop.given import check_module
from vardrop.weights.modules import RandomWeights, weight_axes


class _Held(NamedTuple):
    """Entries of a parameter that stay what they are."""

    parameter: nn.Parameter
    mask: Tensor
    values: Tensor

    def project(self) -> None:
        """Put them back."""
        with torch.no_grad():
            self.parameter[self.mask.to(self.parameter.device)] = self.values.to(self.parameter)

    def silence(self, gradient: Tensor) -> Tensor:
        """The gradient without them."""
        return gradient.masked_fill(self.mask.to(gradient.device), 0.0)


def _held(model: nn.Module) -> tuple[dict[str, _Held], list[_Held]]:
    """The zeros of all weights by the names of these, and the noise tensors beside them."""
    means: dict[str, _Held] = {}
    noises: list[_Held] = []
    seen: set[int] = set()

    def hold(parameter: Any, mask: Tensor) -> _Held | None:
        if not isinstance(parameter, nn.Parameter) or id(parameter) in seen or not mask.any():
            return None
        seen.add(id(parameter))
        return _Held(parameter, mask, parameter.detach()[mask].clone())

    for path, module in model.named_modules():
        noisy = module.vardrop_noise if isinstance(module, RandomWeights) else {}
        for name in noisy or weight_axes(module):
            mean = module._parameters.get(name)
            if mean is None:
                continue
            mask = mean.detach() == 0
            if (held := hold(mean, mask)) is not None:
                means[f"{path}.{name}" if path else name] = held
            noise = getattr(module, noisy[name].key) if name in noisy else None
            if noise is not None and noise.shape == mean.shape and (held := hold(noise, mask)) is not None:
                noises.append(held)
    return means, noises


@contextmanager
def finetune(model: nn.Module) -> Iterator[dict[str, int]]:
    """Keep every weight that is zero at zero, for the length of a block, whatever optimiser trains the model.

    Gradients of such weights are zero, so that they add nothing to norms and moments, and after each step of any
    ``torch.optim`` optimiser they are set to zero again, against momentum from before and weight decay. Works for
    converted models (whose removed weights stay without noise), for restored and plain ones, and for compact ones.
    Biases and parameters of norms are free.

    Args:
        model: a module with zeros, for example from :func:`vardrop.sparsify_`.

    Yields:
        Name of the weight -> how many of its entries are held at zero.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if no weight of the model has a zero.

    Example:
        >>> import torch, vardrop as vd
        >>> layer = torch.nn.Linear(3, 1)
        >>> with torch.no_grad():
        ...     layer.weight[0, 1] = 0.0
        >>> optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        >>> with vd.finetune(layer) as held:
        ...     layer(torch.ones(1, 3)).sum().backward()
        ...     optimizer.step()
        >>> held, (layer.weight == 0).tolist()
        ({'weight': 1}, [[False, True, False]])
    """
    check_module(model, "finetune")
    means, noises = _held(model)
    if not means:
        raise ValueError(
            "vardrop.finetune: needs a model with weights at zero, got one in which nothing was removed; call "
            "vd.sparsify_ first"
        )
    everything = [*means.values(), *noises]

    def project(*_: Any) -> None:
        for held in everything:
            held.project()

    handles = [held.parameter.register_hook(held.silence) for held in everything if held.parameter.requires_grad]
    handles.append(register_optimizer_step_post_hook(project))
    try:
        yield {name: len(held.values) for name, held in means.items()}
    finally:
        for handle in handles:
            handle.remove()
        project()  # for those who step by hand
