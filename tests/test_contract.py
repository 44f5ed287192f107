"""What holds for every layer, posterior, sharing and estimator; the list is in ``contract.py``."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import vardrop as vd
from contract import (
    ESTIMATORS,
    LAYERS,
    LINEAR,
    POSTERIORS,
    RECURRENT,
    SAMPLES,
    Layer,
    assert_mean,
    assert_moments,
    converted,
    gradients,
    outputs,
    true_moments,
    truth_of,
    unit_of,
)

# vmap, which the truths and the samples are made with, loops over F.bilinear and says so; estimators do not need it.
pytestmark = pytest.mark.filterwarnings("ignore:.*batching rule for aten..(_tri|bi)linear:UserWarning")

torch_says = "ignore:.*should not be instantiated:DeprecationWarning"  # dynamo does, to each autograd.Function

every_layer = pytest.mark.parametrize("layer", LAYERS, ids=repr)
linear_layer = pytest.mark.parametrize("layer", LINEAR, ids=repr)
every_posterior = pytest.mark.parametrize("posterior", POSTERIORS)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
two_kinds = pytest.mark.parametrize("posterior", ["vd-a-neuron", "vd-b-weight"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------- the numbers are what they say


@every_estimator
@every_posterior
@linear_layer
def test_mean_and_covariance(layer: Layer, posterior: str, estimator: str) -> None:
    """Mean, variance, and covariance within and between examples; a bias adds nothing to the variance."""
    module, inputs = converted(layer, posterior), layer.inputs(2)
    mean, covariance = true_moments(layer, module, posterior, estimator, inputs)
    with vd.estimator(estimator):
        assert_moments(outputs(layer, module, inputs), mean, covariance, f"{layer} {posterior} {estimator}")


@every_estimator
@pytest.mark.parametrize("posterior", ["vd-a-neuron", "vd-b-output", "vd-b-weight", "mean-field", "sparse"])
@linear_layer
def test_expected_gradient(layer: Layer, posterior: str, estimator: str) -> None:
    """The gradient of E[sum of c (y - t)^2] = c ((E y - t)^2 + Var y) in every parameter, without sampling."""
    module, inputs = converted(layer, posterior), layer.inputs(2)
    flat = layer.run(module.eval(), inputs).numel()
    module.train()
    c, t = torch.rand(flat, dtype=torch.float64), torch.randn(flat, dtype=torch.float64)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    mean, covariance = true_moments(layer, module, posterior, estimator, inputs, parameters)
    (c * ((mean - t).square() + covariance.diagonal())).sum().backward()
    with vd.estimator(estimator):
        sampled = gradients(layer, module, inputs, lambda y: (c * (y - t).square()).sum())
    for name, parameter in parameters.items():
        assert_mean(sampled[name], parameter.grad, f"{layer} {posterior} {estimator} {name}")


@pytest.mark.parametrize("wrong", [1.1, 0.9])
def test_the_tests_above_can_fail(wrong: float) -> None:
    """A variance that is off by 10 per cent is found, in the output and in the gradient."""
    layer, posterior = LINEAR[0], "vd-b-weight"
    module, inputs = converted(layer, posterior), layer.inputs(2)
    mean, covariance = true_moments(layer, module, posterior, "local", inputs)
    samples = outputs(layer, module, inputs)
    assert_moments(samples, mean, covariance, "right")
    with pytest.raises(AssertionError, match="wrong"):
        assert_moments(samples, mean, covariance * wrong, "wrong")
    with pytest.raises(AssertionError, match="covariance"):  # the variance of a bias within the variance
        assert_moments(samples, mean, covariance + torch.diag(0.3 * covariance.diagonal()), "wrong")
    with pytest.raises(AssertionError, match="covariance"):  # an estimator that shares the noise between examples
        assert_moments(samples, mean, true_moments(layer, module, posterior, "per_minibatch", inputs)[1], "wrong")
    with pytest.raises(AssertionError, match="mean"):
        assert_moments(samples, mean + 0.1 * covariance.diagonal().sqrt(), covariance, "wrong")


@every_posterior
@linear_layer
def test_a_sample_of_the_weight(layer: Layer, posterior: str) -> None:
    module = converted(layer, posterior)
    truth = truth_of(layer, module, posterior, {k: p.detach() for k, p in module.named_parameters()})
    directions = truth.directions.flatten(1)
    with torch.no_grad():
        samples = vmap(lambda _: module.weight.sample(), randomness="different")(torch.arange(SAMPLES))
    assert_moments(samples.flatten(1), truth.mean.flatten(), directions.T @ directions, f"{layer} {posterior}")


@every_posterior
@linear_layer
def test_kl_counts_every_random_scalar_once(layer: Layer, posterior: str) -> None:
    """However many of them share a rate: weights (B and additive), input units (A)."""
    config, module, plain = POSTERIORS[posterior], converted(layer, posterior), layer.plain()
    if posterior.startswith("sparse"):
        variance = truth_of(layer, module, posterior, dict(module.named_parameters())).directions.square().sum(0)
        log_alpha = variance.log() - module._parameters["weight"].square().log()
    elif config.noise_name == "log_variance":
        log_alpha = module.weight_log_variance - module.weight.loc.square().log()
    else:
        log_alpha = module.weight_log_alpha
        if config.type == "A":
            log_alpha = log_alpha.expand(int(unit_of(layer, plain, "input").max()) + 1)
        elif log_alpha.numel() == 1:
            log_alpha = log_alpha.expand(plain.weight.shape)
        elif log_alpha.shape != plain.weight.shape:
            log_alpha = log_alpha[unit_of(layer, plain, config.unit)]
    rows = [i for i in range(len(log_alpha)) if i != getattr(plain, "padding_idx", None)]  # that row is no weight
    log_alpha = log_alpha[rows]
    if config.prior == "gaussian":
        weight, std = module.weight.loc[rows], (0.5 * module.weight_log_variance[rows]).exp()
        normal = torch.distributions.Normal
        expected = torch.distributions.kl_divergence(normal(weight, std), normal(0.0, config.prior_std)).sum()
    else:
        expected = vd.kl.log_uniform(log_alpha).sum()
    torch.testing.assert_close(vd.kl_divergence(module).double(), expected.detach(), rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------- behaviour of modules


def forward_backward(layer: Layer, module: nn.Module, inputs: tuple[Tensor, ...], repeats: int = 1) -> list[Tensor]:
    module.zero_grad()
    sum(layer.run(module, inputs).square().sum() for _ in range(repeats)).backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


@every_estimator
@two_kinds
@every_layer
def test_every_parameter_learns_and_evaluation_is_plain(layer: Layer, posterior: str, estimator: str) -> None:
    plain = layer.plain()
    module = copy.deepcopy(plain)
    vd.convert_(module, POSTERIORS[posterior])
    inputs = layer.inputs(3)
    with vd.estimator(estimator):
        module.train()
        assert not torch.equal(layer.run(module, inputs), layer.run(module, inputs))
        forward_backward(layer, module, inputs)
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert "log_" not in name or parameter.grad.count_nonzero(), name
        module.eval()
        assert torch.equal(layer.run(module, inputs), layer.run(plain.eval(), inputs))
    with vd.estimator("none"):
        torch.testing.assert_close(layer.run(module.train(), inputs), layer.run(plain, inputs))


@every_estimator
@two_kinds
@every_layer
def test_several_passes_before_one_backward(layer: Layer, posterior: str, estimator: str) -> None:
    """Noise that is kept in a buffer and drawn again before the backward pass would give wrong gradients."""
    module, inputs = converted(layer, posterior), layer.inputs(2)
    with vd.estimator(estimator):
        torch.manual_seed(1)
        together = forward_backward(layer, module, inputs, repeats=3)
        torch.manual_seed(1)
        apart = [forward_backward(layer, module, inputs) for _ in range(3)]
    for i, gradient in enumerate(together):
        torch.testing.assert_close(gradient, apart[0][i] + apart[1][i] + apart[2][i])


@every_estimator
@two_kinds
@every_layer
def test_same_generator_state_same_output(layer: Layer, posterior: str, estimator: str) -> None:
    module, inputs = converted(layer, posterior), layer.inputs(3)
    generator = torch.Generator()

    def run(seed: int) -> Tensor:
        with vd.estimator(
            estimator, generator=generator.manual_seed(seed), chunk=2 if estimator == "per_example" else None
        ):
            return layer.run(module, inputs)

    before = torch.get_rng_state()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(before, torch.get_rng_state())  # all noise comes from the generator


@two_kinds
@every_layer
def test_copies_and_files(layer: Layer, posterior: str) -> None:
    """deepcopy, pickle, torch.save and state_dict keep parameters, classes, and the noise of a given seed."""
    module, inputs = converted(layer, posterior), layer.inputs(2)

    def run(module: nn.Module) -> Tensor:
        torch.manual_seed(3)
        return layer.run(module, inputs)

    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    fresh = converted(layer, posterior)
    fresh.load_state_dict(module.state_dict())
    copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False), fresh
    for other in copies:
        assert type(other) is type(module)
        assert list(other.state_dict()) == list(module.state_dict())
        assert torch.equal(run(other), run(module))
        with torch.no_grad():  # and share nothing with the original
            next(other.parameters()).zero_()
        assert next(module.parameters()).count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_estimator
@pytest.mark.parametrize("posterior", ["vd-a-neuron", "vd-b-weight", "mean-field", "sparse"])
@every_layer
def test_dtype_moves(layer: Layer, posterior: str, estimator: str, dtype: torch.dtype) -> None:
    if dtype.itemsize == 2 and layer.name.startswith("conv-transpose3d"):
        pytest.skip("torch has no transposed 3d convolution in half types on a CPU")
    module = converted(layer, posterior).to(dtype)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in layer.inputs(2))
    with vd.estimator(estimator):
        y = layer.run(module, inputs)
        y.float().square().sum().backward()
    assert y.dtype == dtype
    for name, parameter in module.named_parameters():
        assert parameter.grad.dtype == dtype, name
        assert parameter.grad.isfinite().all(), name
    assert vd.kl_divergence(module).isfinite()


@every_estimator
@two_kinds
@every_layer
def test_autocast(layer: Layer, posterior: str, estimator: str) -> None:
    module = converted(layer, posterior).float()
    inputs = tuple(x.float() if x.is_floating_point() else x for x in layer.inputs(2))
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer.run(module.eval(), inputs).dtype
        with vd.estimator(estimator):
            y = layer.run(module.train(), inputs)
    # a batched convolution is not cast by vmap: then y is wider than it has to be
    assert y.dtype == expected or (estimator == "per_example" and y.dtype == torch.float32)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


@every_estimator
@two_kinds
@linear_layer
def test_a_batch_of_nothing(layer: Layer, posterior: str, estimator: str) -> None:
    module = converted(layer, posterior)
    inputs = layer.inputs(0)
    with vd.estimator(estimator):
        y = layer.run(module, inputs)
    assert y.shape == layer.run(module.eval(), inputs).shape
    y.sum().backward()
    assert all(not p.grad.count_nonzero() for p in module.parameters() if p.grad is not None)


@every_estimator
@two_kinds
@every_layer
def test_checkpointing_replays_the_noise(layer: Layer, posterior: str, estimator: str) -> None:
    module, inputs = converted(layer, posterior), layer.inputs(3)
    with vd.estimator(estimator):
        torch.manual_seed(2)
        expected = forward_backward(layer, module, inputs)
        torch.manual_seed(2)
        module.zero_grad()
        checkpoint(lambda *x: layer.run(module, x), *inputs, use_reentrant=False).square().sum().backward()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@every_layer
def test_export_in_evaluation(layer: Layer) -> None:
    module, inputs = converted(layer, "vd-b-weight").eval(), layer.inputs(2)
    if layer.call is not None:
        module = _Called(layer, module)
    program = torch.export.export(module, inputs)
    torch.testing.assert_close(program.module()(*inputs), module(*inputs))


class _Called(nn.Module):
    def __init__(self, layer: Layer, module: nn.Module) -> None:
        super().__init__()
        self.layer, self.module = layer, module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer.run(self.module, inputs)


@pytest.mark.filterwarnings(torch_says)
@two_kinds
@every_estimator
@pytest.mark.parametrize("name", ["linear", "conv2d-grouped", "embedding-padding", "bilinear", "attention", "gru-cell"])
def test_compile_draws_anew_on_every_call(name: str, estimator: str, posterior: str) -> None:
    """In one graph; the noise has the right moments over calls, and calls are independent of each other."""
    layer = next(layer for layer in LAYERS if layer.name == name)
    module, inputs = converted(layer, posterior), layer.inputs(2)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: layer.run(module, x), fullgraph=True, backend="eager")
    with vd.estimator(estimator), torch.no_grad():
        samples = torch.stack([compiled(*inputs).flatten() for _ in range(300)])
        truth = torch.stack([layer.run(module, inputs).flatten() for _ in range(300)])
    if layer in LINEAR:
        mean, covariance = true_moments(layer, module, posterior, estimator, inputs)
        assert_moments(samples, mean, covariance, "compiled")
        samples = samples - mean
        assert_mean(samples[1:] * samples[:-1], torch.zeros_like(mean), "covariance of successive calls")
    else:
        assert_mean(samples - truth, torch.zeros_like(truth[0]), "compiled against eager")
        assert_mean(samples.square() - truth.square(), torch.zeros_like(truth[0]), "squares")


@pytest.mark.filterwarnings(torch_says)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_do_not_compile_in_one_graph(name: str) -> None:
    """A limit of torch's, and not of the noise: the plain layer does not either. Without fullgraph they run."""
    layer = next(layer for layer in LAYERS if layer.name == name)
    module, inputs = converted(layer, "vd-b-weight"), layer.inputs(2)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: layer.run(module, x), backend="eager")
    assert not torch.equal(compiled(*inputs), compiled(*inputs))
