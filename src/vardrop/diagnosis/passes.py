"""Passes through somebody else's model that leave nothing behind: flags, buffers, generators are what they were."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from vardrop.given import check_module
from vardrop.prediction.noise_buffers import put_back, remember
from vardrop.prediction.seeds import accelerators, draw, lent, sow
from vardrop.prediction.stochastic import stochastic
from vardrop.prediction.structure import copied, device_of, is_batches, moved, of_loader

_SEED = 6_187_203_394_671  # of the noise if no generator is given; none that somebody may have drawn the data with
_PER_BATCH = 1 << 20  # seeds of one batch lie apart from those of another


class Passes:
    """A model and some batches for it, and the ways in which they are put together.

    Args:
        model: any module.
        loader: batches ``(inputs, labels)``, tensors or mappings of keyword arguments; or one such batch.
        max_batches: how many are looked at.
        generator: source of the seed of the noise; None for a fixed one.
        by: the function that asks, for messages.
    """

    def __init__(
        self, model: nn.Module, loader: Any, max_batches: int, generator: torch.Generator | None, by: str
    ) -> None:
        check_module(model, by)
        if isinstance(max_batches, bool) or not isinstance(max_batches, int) or max_batches < 1:
            raise ValueError(f"vardrop.{by}: max_batches must be a whole number from 1 on, got {max_batches!r}")
        self.model = model
        self.by = by
        self.names = {module: name for name, module in model.named_modules()}
        with lent(accelerators(model.parameters())):  # a loader that shuffles draws from torch's generator
            batches = iter(loader) if is_batches(loader) else iter([loader])
            self.batches = list(itertools.islice(batches, max_batches))
        if not self.batches:
            raise ValueError(f"vardrop.{by}: loader must have a batch, got none; a used-up iterator has none left")
        self.seed = _SEED if generator is None else draw(generator)
        self.devices = accelerators(itertools.chain(model.parameters(), model.buffers()))

    @property
    def is_lazy(self) -> bool:
        """Whether the model has parameters without a shape, so that a pass would change it."""
        return any(map(is_lazy, itertools.chain(self.model.parameters(), self.model.buffers())))

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """The model in evaluation, without gradients; afterwards flags, buffers and generators are as before."""
        flags = [(module, module.training) for module in self.names]
        kept = remember({module: name or "model" for module, name in self.names.items()})
        with lent(self.devices), torch.no_grad():
            try:
                for module in self.names:
                    if module.training:
                        module.training = False
                yield
            finally:
                for module, flag in flags:
                    if module.training != flag:
                        module.training = flag
                put_back(kept)

    def run(self, index: int, noise: str | None = None, salt: int = 0) -> Any:
        """The output for one batch.

        Args:
            index: of the batch.
            noise: the module whose noise is on, "" for all, None for none.
            salt: another number, another noise.
        """
        with self._noise(index, noise, salt):
            return self._call(self.batches[index])

    def loss(self, index: int, loss_fn: Callable[[nn.Module, Any], Tensor], noise: str | None = None) -> Tensor:
        """What a loss function says of one batch, ``[1]``."""
        with self._noise(index, noise, 0):
            return torch.as_tensor(loss_fn(self.model, copied(self.batches[index]))).detach().cpu().double().reshape(1)

    @contextmanager
    def _noise(self, index: int, noise: str | None, salt: int) -> Iterator[None]:
        sow((self.seed + _PER_BATCH * salt + index) % (1 << 62), self.devices)
        if noise is None:
            yield
            return
        with stochastic(self.model.get_submodule(noise)):
            yield

    def checked(self) -> Any:
        """The output for the first batch, or an error that says that there is none."""
        try:
            return self.run(0)
        except Exception as error:
            raise RuntimeError(
                f"vardrop.{self.by}: the model must take a batch of the loader, got {type(error).__name__}: {error}; "
                "a batch is (inputs, labels), a tensor, or a mapping of keyword arguments"
            ) from error

    def _call(self, batch: Any) -> Any:
        call = of_loader(batch)
        device = device_of(self.model.modules())
        if device is not None:
            call = moved(call, device)
        call = copied(call)  # the batch is looked at again
        return self.model(*call.args, **call.kwargs)


@contextmanager
def hooked(hooks: dict[nn.Module, Callable[[nn.Module, Tensor], None]]) -> Iterator[None]:
    """Show modules' first inputs to functions, for the length of a block.

    Args:
        hooks: a function of the module and its first tensor, for every module.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if first is not None:
            hooks[module](module, first)

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
