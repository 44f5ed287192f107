"""Other libraries' Bayesian layers in the same networks, used as their own documentation says.

They differ in what they compute: all but Flipout draw one weight for the whole minibatch, which is cheap at large
minibatches and leaves noisy gradients. Compare them with our `per_minibatch` and `flipout` rows.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.networks import Workload, cnn, mlp, rebuilt
from benchmarks.variants import Variant


def _bayesian_torch() -> list[Variant]:
    models = importlib.import_module("bayesian_torch.models.dnn_to_bnn")

    def prepare(kind: str) -> Callable[[nn.Sequential], nn.Module]:
        priors = {  # those of its README
            "prior_mu": 0.0,
            "prior_sigma": 1.0,
            "posterior_mu_init": 0.0,
            "posterior_rho_init": -3.0,
            "type": kind,
            "moped_enable": False,
            "moped_delta": 0.5,
        }

        def convert(net: nn.Sequential) -> nn.Module:
            models.dnn_to_bnn(net, priors)
            return net

        return convert

    return [
        Variant(f"bayesian-torch {kind}{ending}", prepare(kind), divergence=kl, quick=kind == "Flipout" and kl is None)
        for kind in ("Reparameterization", "Flipout")
        for ending, kl in (("", None), (", with KL", models.get_kl_loss))
    ]


def _geometry(layer: nn.Module, *names: str) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in names}


def _torchbnn() -> list[Variant]:
    bnn = importlib.import_module("torchbnn")

    def new(layer: nn.Module) -> list[nn.Module]:
        prior = {"prior_mu": 0, "prior_sigma": 0.1}  # as in its demos
        if isinstance(layer, nn.Linear):
            return [bnn.BayesLinear(**prior, **_geometry(layer, "in_features", "out_features"))]
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
        return [bnn.BayesConv2d(**prior, **_geometry(layer, *names))]

    # its divergence is a mean over weights by default; the sum takes the same time, and is the divergence
    loss = bnn.BKLLoss(reduction="sum")

    def divergence(net: nn.Module) -> Tensor:
        return loss(net).squeeze()  # it comes with shape [1]

    return [
        Variant("torchbnn", lambda net: rebuilt(net, new), quick=True),
        Variant("torchbnn, with KL", lambda net: rebuilt(net, new), divergence=divergence),
    ]


def _blitz() -> list[Variant]:
    modules = importlib.import_module("blitz.modules")
    losses = importlib.import_module("blitz.losses")

    def new(layer: nn.Module) -> list[nn.Module]:
        if isinstance(layer, nn.Linear):
            return [modules.BayesianLinear(layer.in_features, layer.out_features)]
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
        return [modules.BayesianConv2d(**_geometry(layer, *names))]

    # the divergence is what its `sample_elbo` adds to the loss; its forward computes log-probabilities in any case
    return [
        Variant("blitz", lambda net: rebuilt(net, new), quick=True),
        Variant("blitz, with KL", lambda net: rebuilt(net, new), divergence=losses.kl_divergence_from_nn),
    ]


_LIBRARIES = {"bayesian-torch": _bayesian_torch, "torchbnn": _torchbnn, "blitz": _blitz}
_TRIALS = (Workload(partial(mlp, inputs=8, width=8), 2, (8,)), Workload(cnn, 2, (3, 32, 32)))


def find() -> tuple[list[Variant], dict[str, str]]:
    """The variants of the peers that can be imported and take a step, and name -> reason for those that cannot."""
    variants: list[Variant] = []
    missing: dict[str, str] = {}
    for name, make in _LIBRARIES.items():
        try:
            made = make()
            for variant, workload in itertools.product(made, _TRIALS):
                variant.step(workload)()
        except Exception as error:  # a peer that does not suit this torch may raise anything
            first = (str(error) or "no message").splitlines()[0]
            missing[name] = f"cannot be used here: {type(error).__name__}: {first}"
        else:
            variants += made
    return variants, missing
