"""Stochastic depth: the law of the coins, work that is really saved, and gradients when nothing ran."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import architectures  # noqa: F401  (makes torchvision importable, and so timm)
import vardrop as vd
from benchmarks import blocks
from vardrop import rates
from vardrop.layers import DropPath, LayerDrop, StochasticDepth, drop_path, every_other, survival_rates

both_modes = pytest.mark.parametrize("mode", ["row", "batch"])
both_scalings = pytest.mark.parametrize("scaling", ["inverted", "original"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Seen(nn.Module):
    """Twice its input, and a list of the numbers of examples it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.weight * x


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def assert_share(seen: float, p: float, trials: int) -> None:
    assert abs(seen - p) <= 4 * (p * (1 - p) / trials) ** 0.5, f"{seen} of {trials}, expected {p}"


# ------------------------------------------------------------------------------------------------------- drop_path


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
@both_scalings
def test_coins_for_every_example(p: float, scaling: str) -> None:
    y = drop_path(torch.ones(20_000, 2, 3), p, "row", scaling)
    rows = y[:, 0, 0]
    assert torch.equal(y, rows[:, None, None].expand_as(y))
    scale = 1 / (1 - p) if scaling == "inverted" and p < 1 else 1.0
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], scale))
    assert_share(float((rows == 0).double().mean()), p, len(rows))
    pairs = (rows[1:] == 0) & (rows[:-1] == 0)
    assert abs(float(pairs.double().mean()) - p * p) <= 5 * (1 / len(pairs)) ** 0.5 * p


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@both_scalings
def test_one_coin_for_the_batch(p: float, scaling: str) -> None:
    ys = torch.stack([drop_path(torch.ones(3, 2), p, "batch", scaling) for _ in range(4000)])
    calls = ys[:, 0, 0]
    assert torch.equal(ys, calls[:, None, None].expand_as(ys))
    assert_share(float((calls == 0).double().mean()), p, len(calls))


@both_modes
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_torchvision_has_the_same_distribution(mode: str, p: float) -> None:
    ops = pytest.importorskip("torchvision.ops")
    shape, calls = ((20_000, 1), 1) if mode == "row" else ((2, 1), 4000)
    values = {0.0: [1.0], 0.3: [0.0, 1 / 0.7], 1.0: [0.0]}[p]
    shares = []
    for function in (lambda x: ops.stochastic_depth(x, p, mode), lambda x: drop_path(x, p, mode)):
        y = torch.stack([function(torch.ones(shape)) for _ in range(calls)])
        trials = y.numel() if mode == "row" else calls
        torch.testing.assert_close(y.unique(), torch.tensor(values))
        shares.append(float((y == 0).double().mean()))
    assert abs(shares[0] - shares[1]) <= 4 * (2 * p * (1 - p) / trials) ** 0.5


@both_scalings
def test_timm_has_the_same_distribution(scaling: str) -> None:
    timm = pytest.importorskip("timm.layers")
    theirs = timm.drop_path(torch.ones(20_000, 2), 0.3, training=True, scale_by_keep=scaling == "inverted")
    ours = drop_path(torch.ones(20_000, 2), 0.3, "row", scaling)
    torch.testing.assert_close(ours.unique(), theirs.unique())
    assert abs(float((theirs == 0).double().mean() - (ours == 0).double().mean())) < 4 * (2 * 0.21 / 20_000) ** 0.5


@both_modes
@both_scalings
@pytest.mark.parametrize("wrapped", [False, True])
def test_training_and_evaluation_have_the_same_expectation(mode: str, scaling: str, wrapped: bool) -> None:
    p, trials = 0.3, 4000
    layer = StochasticDepth(Seen(), p, mode, scaling) if wrapped else DropPath(p, mode, scaling)
    x = torch.tensor([[1.0], [2.0]])
    with torch.no_grad():
        samples = torch.stack([layer(x) for _ in range(trials)])
        expected = layer.eval()(x)
    z = (samples.mean(0) - expected) / samples.std(0) * trials**0.5
    assert z.abs().max() < 4
    survival = 0.7 if scaling == "original" else 1.0
    torch.testing.assert_close(expected, x + 2 * x * survival if wrapped else x * survival)


# ------------------------------------------------------------------------------------------------ real skipping


@pytest.mark.parametrize("shape", [(12,), (12, 3), (12, 3, 4), (12, 3, 4, 5), (12, 2, 3, 2, 2)])
@both_scalings
def test_only_kept_rows_reach_the_block(shape: tuple[int, ...], scaling: str) -> None:
    block = Seen()
    layer, x = StochasticDepth(block, 0.4, scaling=scaling), torch.rand(shape) + 1
    scale = 2 / 0.6 if scaling == "inverted" else 2.0
    for _ in range(5):
        y = layer(x)
        changed = (y != x).flatten(1).any(1) if x.ndim > 1 else y != x
        assert 0 < block.rows[-1] == int(changed.sum()) < 12
        torch.testing.assert_close(y[changed], x[changed] * (1 + scale))
        assert torch.equal(y[~changed], x[~changed])


def test_the_batch_coin_runs_the_block_for_all_or_for_none() -> None:
    block = Seen()
    layer, x = StochasticDepth(block, 0.4, "batch"), torch.ones(3, 2)
    kept = 0
    for _ in range(2000):
        y = layer(x)
        assert torch.equal(y, x) or torch.allclose(y, x * (1 + 2 / 0.6))
        kept += not torch.equal(y, x)
    assert block.rows == [3] * kept
    assert_share(kept / 2000, 0.6, 2000)


def test_the_cost_of_a_step_is_that_of_the_kept_rows() -> None:
    """Counted in floating-point operations, forward and backward; without the wrapper it is that of all rows."""
    block = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    x = torch.randn(32, 4, 8, 8, requires_grad=True)

    def operations(run: Callable[[Tensor], Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            run(x).sum().backward()
        return counter.get_total_flops()

    whole = operations(lambda x: x + block(x))
    layer, seen = StochasticDepth(block, 0.5), []
    block.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    for _ in range(5):
        assert operations(layer) == whole * seen[-1] // 32
    assert min(seen) < 20
    layer.set_rate_(1.0)
    assert operations(layer) == 0


def test_the_gradient_is_that_of_the_masked_branch() -> None:
    block = nn.Linear(3, 3).double()
    layer, x = StochasticDepth(block, 0.5), torch.randn(16, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
    kept = (y != x).any(1)
    assert 0 < kept.sum() < 16
    dense = x + kept[:, None] * block(x) / 0.5
    torch.testing.assert_close(y, dense)
    for a, b in zip(ours, torch.autograd.grad(dense.square().sum(), [x, *block.parameters()]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own forward mode
@pytest.mark.parametrize("shortcut", [None, nn.Conv2d(2, 2, 1, dtype=torch.float64)], ids=["itself", "convolution"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_first_and_second_derivatives(shortcut: nn.Module | None, memory: torch.memory_format) -> None:
    block = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64), nn.Tanh())
    layer = StochasticDepth(block, 0.5, shortcut=shortcut)
    x = torch.randn(5, 2, 3, 2, dtype=torch.float64).to(memory_format=memory).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return layer(x, generator=torch.Generator().manual_seed(1))

    assert torch.autograd.gradcheck(run, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, x)
    weight = block[0].weight.detach()

    def of_weight(value: Tensor) -> Tensor:
        return functional_call(layer, {"block.0.weight": value}, x, {"generator": torch.Generator().manual_seed(1)})

    with forward_ad.dual_level():  # of a parameter alone
        tangent = forward_ad.unpack_dual(of_weight(forward_ad.make_dual(weight, torch.ones_like(weight)))).tangent
    step = 1e-6
    torch.testing.assert_close(tangent, (of_weight(weight + step) - of_weight(weight - step)) / (2 * step))


def test_batch_norm_inside_sees_kept_rows_only() -> None:
    norm = nn.BatchNorm2d(2, momentum=None)
    layer, x = StochasticDepth(norm, 0.5), torch.randn(8, 2, 3, 3)
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    y = layer(x)
    (rows,) = seen
    assert 0 < len(rows) < 8
    torch.testing.assert_close(norm.running_mean, rows.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, rows.transpose(0, 1).flatten(1).var(1))
    changed = (y != x).flatten(1).any(1)
    assert torch.equal(x[changed], rows)
    norm.reset_running_stats()
    layer.set_rate_(1.0)
    layer(x)
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(2))


@both_modes
def test_all_rows_dropped_leaves_the_shortcut_and_gradients_of_zero(mode: str) -> None:
    block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3).bfloat16())
    nn.init.constant_(block[0].weight, torch.nan)  # it is not read
    block[1].weight.requires_grad_(False)
    layer, x = StochasticDepth(block, 1.0, mode), torch.randn(4, 3, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 3))
    for name, parameter in block.named_parameters():
        if name == "1.weight":
            assert parameter.grad is None
        else:
            assert parameter.grad.dtype == parameter.dtype
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
    with torch.no_grad():
        assert torch.equal(layer(x), x)


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Alone(nn.Module):
    """A branch that leaves its parameters out of the graph, as a wrapper would that knew nothing of DDP."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:.*barrier.*:UserWarning")
@pytest.mark.parametrize("wrapper", ["row", "batch", "layers", "none"])
def test_distributed_training_waits_for_no_gradient(wrapper: str) -> None:
    made = {
        "row": lambda: StochasticDepth(nn.Linear(3, 3), 1.0),
        "batch": lambda: StochasticDepth(nn.Linear(3, 3), 1.0, "batch"),
        "layers": lambda: LayerDrop([nn.Linear(3, 3) for _ in range(3)], 1.0),
        "none": Alone,
    }
    net = DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), made[wrapper]()))

    def steps() -> None:
        for _ in range(3):
            net(torch.ones(2, 3)).sum().backward()

    if wrapper == "none":
        with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
            steps()
    else:
        steps()
        assert all(p.grad is not None for p in net.parameters())


def test_a_shortcut_that_changes_the_shape() -> None:
    block = nn.Conv2d(3, 6, 3, stride=2, padding=1)
    shortcut = nn.Conv2d(3, 6, 1, stride=2)
    layer, x = StochasticDepth(block, 0.5, shortcut=shortcut), torch.randn(8, 3, 7, 5)
    y, base = layer(x), shortcut(x)
    kept = ~torch.isclose(y, base).flatten(1).all(1)
    assert 0 < kept.sum() < 8
    torch.testing.assert_close(y, base + kept[:, None, None, None] * block(x) * 2)
    torch.testing.assert_close(layer.eval()(x), base + block(x))


# ----------------------------------------------------------------------------------------------- other arguments


class Masked(nn.Module):
    """x times a mask, plus a bias, and what it was called with."""

    def forward(self, x: Tensor, mask: Tensor, *more: Tensor, bias: object = None, flag: bool = False) -> Tensor:
        self.got = (mask, more, bias, flag)
        shifts = bias.values() if isinstance(bias, dict) else [] if bias is None else [bias]
        return sum(shifts, x * mask)  # type: ignore[arg-type, return-value]


@both_modes
def test_arguments_with_a_row_for_every_example_are_those_of_the_kept_ones(mode: str) -> None:
    layer, x = StochasticDepth(Masked(), 0.5, mode, rows=("mask", "bias")), torch.ones(16, 3)
    mask = torch.arange(1.0, 17).reshape(16, 1)
    for _ in range(4):
        y = layer(x, mask, bias={"a": 100 * mask, "for all": torch.tensor([[1000.0]])}, flag=True)
        kept = (y != x).any(1)
        torch.testing.assert_close(y, x + kept[:, None] * (x * mask + 100 * mask + 1000) / 0.5)
        if mode == "row":
            assert len(layer.block.got[0]) == kept.sum()
            assert layer.block.got[3] is True
    layer.eval()
    assert torch.equal(layer(x, mask), x + x * mask)


def test_other_arguments_are_handed_on_whole() -> None:
    layer, x = StochasticDepth(Masked(), 0.5, rows=()), torch.ones(16, 3)
    mask, more = torch.rand(1, 3), torch.ones(16)
    while (y := layer(x, mask, more, flag=True)).equal(x):
        pass
    assert layer.block.got[0] is mask
    assert layer.block.got[1][0] is more
    kept = (y != x).any(1)
    torch.testing.assert_close(y, x + kept[:, None] * mask / 0.5)
    assert layer(x, mask=mask, flag=False).shape == (16, 3)


def test_gradients_reach_the_rows_of_other_arguments() -> None:
    layer, x = StochasticDepth(Masked(), 0.5, rows=["mask"]), torch.ones(16, 3)
    mask = torch.rand(16, 1, requires_grad=True)
    y = layer(x, mask)
    y.sum().backward()
    kept = (y != x).any(1)
    torch.testing.assert_close(mask.grad[:, 0], kept * 3 / 0.5)


def test_compiled_other_arguments() -> None:
    torch._dynamo.reset()
    layer = torch.compile(StochasticDepth(Masked(), 0.5, rows=("mask",)), fullgraph=True, backend="eager")
    x, mask = torch.ones(16, 3), torch.arange(1.0, 17).reshape(16, 1)
    y = layer(x, mask)
    torch.testing.assert_close(y, x + (y != x).any(1)[:, None] * mask / 0.5)


def test_an_encoder_layer_with_padding() -> None:
    block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    layer = StochasticDepth(block, 0.5, rows=("src_key_padding_mask",))
    x, padding = torch.randn(16, 5, 4), torch.rand(16, 5) < 0.5
    padding[:, 0] = False
    y = layer(x, src_key_padding_mask=padding)
    kept = (y != x).flatten(1).any(1)
    assert 0 < kept.sum() < 16
    torch.testing.assert_close(y, x + kept[:, None, None] * block(x, src_key_padding_mask=padding) / 0.5)


def test_arguments_that_are_not_told_apart_are_refused() -> None:
    x = torch.ones(4, 3)
    for layer in (StochasticDepth(Masked()), StochasticDepth(Masked()).eval()):
        with pytest.raises(ValueError, match=r"rows= must name the arguments that have a row for every example"):
            layer(x, x)
        with pytest.raises(ValueError, match=r"got tensors besides x and no rows; rows=\(\) says that none has"):
            layer(x, mask=1.0, bias=[x])
    with pytest.raises(ValueError, match=r"rows must name arguments of the block besides x \(mask, bias, flag\), got"):
        StochasticDepth(Masked(), rows=("m",))
    layer = StochasticDepth(Masked(), 0.5, rows="mask")
    assert "rows=('mask',)" in repr(layer)
    words = r"mask must have a row for each of the 40 examples, or one for all, .* got shape \(3,\)"
    with pytest.raises(ValueError, match=words):
        layer(torch.ones(40, 3), torch.ones(3))
    with pytest.raises(
        TypeError, match=r"a generator must be given by its name, as what stands behind x is the block's"
    ):
        layer(torch.ones(4, 3), torch.Generator())
    with pytest.raises(TypeError, match=r"StochasticDepth: block must give a tensor, got tuple; wrap what makes the"):
        StochasticDepth(nn.LSTM(3, 3), 0.0)(torch.ones(2, 2, 3))


# ---------------------------------------------------------------------------------------------------- the contract

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "path": lambda: DropPath(0.5),
    "path-batch": lambda: DropPath(0.5, "batch"),
    "depth": lambda: StochasticDepth(nn.Conv2d(3, 3, 1), 0.5),
    "depth-batch": lambda: StochasticDepth(nn.Conv2d(3, 3, 1), 0.5, "batch"),
    "layers": lambda: LayerDrop([nn.Conv2d(3, 3, 1) for _ in range(3)], 0.5),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def image(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 6, 5)


def test_identity_in_evaluation() -> None:
    x = image()
    assert DropPath(0.5).eval()(x) is x
    block = nn.Conv2d(3, 3, 1)
    assert torch.equal(StochasticDepth(block, 0.5).eval()(x), x + block(x))
    assert torch.equal(LayerDrop([block], 0.9).eval()(x), block(x))


@every_layer
def test_rate_zero_is_the_layer_without_noise(name: str) -> None:
    layer, x = LAYERS[name](), image()
    layer.set_rate_(0.0)
    assert torch.equal(layer(x), layer.eval()(x))


@every_layer
def test_same_generator_state_same_output(name: str) -> None:
    layer, x, generator = LAYERS[name](), image(32), torch.Generator()
    before = torch.get_rng_state()
    first = layer(x, generator=generator.manual_seed(1))
    assert torch.equal(layer(x, generator=generator.manual_seed(1)), first)
    others = [layer(x, generator=generator.manual_seed(seed)) for seed in range(2, 12)]
    assert not all(torch.equal(other, first) for other in others)
    with vd.estimator("local", generator=generator.manual_seed(1)):
        assert torch.equal(layer(x), first)
    assert torch.equal(before, torch.get_rng_state())  # all noise comes from the generator


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_types(name: str, dtype: torch.dtype) -> None:
    layer = LAYERS[name]().to(dtype)
    x = image(8).to(dtype).requires_grad_()
    for _ in range(4):
        y = layer(x)
        assert y.dtype == dtype
        y.abs().float().sum().backward()
    assert x.grad.abs().isfinite().all()
    assert layer.rate.dtype == torch.float32


@every_layer
def test_autocast(name: str) -> None:
    layer, x = LAYERS[name](), image(16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer.eval()(x).dtype
        layer.train()
        kinds = {layer(x).dtype for _ in range(6)}
    assert kinds <= {expected, torch.float32}  # a block that did not run has cast nothing


@every_layer
def test_channels_last(name: str) -> None:
    layer = LAYERS[name]().to(memory_format=torch.channels_last)
    x = image(16).contiguous(memory_format=torch.channels_last)
    for _ in range(6):
        assert layer(x).is_contiguous(memory_format=torch.channels_last)


@every_layer
def test_a_batch_of_nothing(name: str) -> None:
    layer, x = LAYERS[name](), torch.ones(0, 3, 6, 5, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()


@pytest.mark.parametrize(
    "layer", [DropPath(0.5), StochasticDepth(nn.PReLU(), 0.5), LayerDrop([nn.PReLU()], 0.5)], ids=repr
)
@pytest.mark.parametrize("shape", [(0, 3, 6, 5), (4, 3, 0, 5), (4, 3, 6, 0)])
def test_maps_of_nothing(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    y.sum().backward()


@every_layer
def test_vmap_draws_anew_for_every_sample(name: str) -> None:
    layer, x = LAYERS[name](), image()
    with torch.no_grad():
        samples = vmap(lambda _: layer(x), randomness="different")(torch.arange(2000)).flatten(1)
        one_by_one = torch.stack([layer(x).flatten() for _ in range(2000)])
    for moment in (lambda y: y, torch.square):
        a, b = moment(samples), moment(one_by_one)
        z = (a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / 2000).sqrt().clamp(min=1e-6)
        assert z.abs().max() < 5
    assert torch.equal(*vmap(lambda _: layer(x), randomness="same")(torch.arange(2)))


def test_per_example_gradients_of_torch_func() -> None:
    layer = StochasticDepth(nn.Linear(3, 3), 0.5)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x[None],)).sum()

    found = vmap(grad(loss), in_dims=(None, 0), randomness="different")(parameters, torch.ones(400, 3))
    dropped = found["block.weight"].flatten(1).abs().sum(1) == 0
    assert_share(float(dropped.double().mean()), 0.5, 400)
    torch.testing.assert_close(found["block.weight"][~dropped], torch.full((int((~dropped).sum()), 3, 3), 2.0))


@every_layer
def test_a_changing_rate_compiles_once(name: str) -> None:
    layer, x = LAYERS[name](), image(64)
    layer.schedule = rates.linear(0.0, 0.5, steps=20)
    scheduler = rates.RateScheduler(layer)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    outputs = []
    for _ in range(40):
        scheduler.step()
        outputs.append(compiled(x))
    assert counter.frame_count == 1
    assert len({float(y.detach().sum()) for y in outputs[20:]}) > 1


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_compiled_stochastic_depth_has_the_law_of_the_eager_one(mode: str) -> None:
    layer, x = StochasticDepth(Twice(), 0.3, mode), torch.ones(20, 1)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ys = torch.stack([compiled(x) for _ in range(1000)]).squeeze(2)
    torch.testing.assert_close(ys.unique(), torch.tensor([1.0, 1 + 2 / 0.7]))
    trials = ys.numel() if mode == "row" else len(ys)
    assert_share(float((ys == 1).double().mean()), 0.3, trials)
    assert bool((ys == ys[:, :1]).all()) == (mode == "batch")


@every_layer
def test_copies_and_files(name: str) -> None:
    layer, x = LAYERS[name](), image(16)

    def run(module: nn.Module) -> Tensor:
        torch.manual_seed(3)
        return module(x)

    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    fresh = LAYERS[name]()
    fresh.set_rate_(0.1)
    fresh.load_state_dict(layer.state_dict())
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False), fresh
    for other in copies:
        assert torch.equal(run(other), run(layer))
        other.set_rate_(0.0)
        assert layer.p == 0.5


def test_checkpointing_replays_the_coins() -> None:
    layer, x = StochasticDepth(nn.Conv2d(3, 3, 1), 0.5), image(16).requires_grad_()

    def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(2)
        return torch.autograd.grad(run(x.square()).square().sum(), x)[0]

    assert torch.equal(gradient(lambda y: checkpoint(layer, y, use_reentrant=False)), gradient(layer))


def test_the_representation_tells_what_is_not_default() -> None:
    assert repr(DropPath(0.1)) == "DropPath(p=0.1, mode='row')"
    assert repr(DropPath(0.1, "batch", "original")) == "DropPath(p=0.1, mode='batch', scaling='original')"
    assert "p=0.2, mode='row'" in repr(StochasticDepth(nn.Identity(), 0.2))
    assert "p=0.2, keep=[0]" in repr(LayerDrop([nn.Identity()], 0.2, keep=[0]))


def test_the_benchmark_measures_what_it_says() -> None:
    pytest.importorskip("timm.layers")
    modes, narrow = ("row", "batch"), "convolutions of 32"
    models = (narrow, f"{narrow}, twice the examples", "convolutions of 64", "transformer", "transformer of 384")
    rows = blocks.drop_blocks(1, 0, shape=(2, 3, 9, 8)) + blocks.stochastic_depth(1, 0, examples=3)
    assert {row.variant: row.goal for row in rows if row.goal} == {
        "drop_block": 0.1,
        **{f"{model}: StochasticDepth, {mode}": 0.8 for model in models for mode in modes},
    }
    assert all(row.ratio is not None for row in rows)
    table = blocks.rates_table(units=500).splitlines()
    assert len(table) == 2 + 4 * 8
    assert table[2].startswith("| vardrop | 56 × 56 |")
    assert table[2].count("|") == 2 + 1 + 9
    assert table[-8].startswith("| torchvision | 56 × 56 |")
    assert table[-8].count("error") == 4  # of even blocks


# ------------------------------------------------------------------------------------------------------- LayerDrop


def test_layers_are_left_out_whole_with_coins_of_their_own() -> None:
    stack, trials = LayerDrop([Seen() for _ in range(3)], 0.3), 4000
    ran = torch.zeros(trials, 3, dtype=torch.float64)
    for trial in range(trials):
        before = [len(layer.rows) for layer in stack.layers]
        y = stack(torch.ones(2, 1)).detach()
        ran[trial] = torch.tensor([len(layer.rows) - count for layer, count in zip(stack.layers, before, strict=True)])
        assert float(y[0]) == 2.0 ** ran[trial].sum()  # nothing is rescaled
    for share in ran.mean(0):
        assert_share(float(share), 0.7, trials)
    centred = ran - 0.7
    covariance = centred.T @ centred / trials
    assert (covariance - 0.21 * torch.eye(3)).abs().max() < 5 * 0.21 / trials**0.5


def test_layers_that_did_not_run_get_gradients_of_zero() -> None:
    stack = LayerDrop([Seen() for _ in range(3)], 1.0)
    stack(torch.ones(2, 1, requires_grad=True)).sum().backward()
    assert [float(layer.weight.grad) for layer in stack.layers] == [0.0, 0.0, 0.0]


@torch.no_grad()
def test_evaluation_runs_the_layers_that_were_chosen() -> None:
    stack = LayerDrop([Seen() for _ in range(6)], 0.9, keep=every_other(6)).eval()
    assert stack.active() == [stack.layers[0], stack.layers[2], stack.layers[4]]
    assert float(stack(torch.ones(1))) == 8.0
    stack.keep = None
    assert float(stack(torch.ones(1))) == 64.0
    stack.keep = ()
    assert float(stack(torch.ones(1))) == 1.0


def test_other_arguments_reach_every_layer() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor, much: Tensor, times: int = 1) -> Tensor:
            return x + much * times

    stack = LayerDrop([Adds(), Adds()], 0.0)
    assert float(stack(torch.zeros(()), torch.ones(()), times=3)) == 6.0


def test_every_other_layer() -> None:
    """Fan et al. 2020: layers d with d = 0 modulo the whole part of 1 / p are pruned."""
    assert every_other(12) == [0, 2, 4, 6, 8, 10]
    assert every_other(12, drop=1 / 3) == [0, 1, 3, 4, 6, 7, 9, 10]
    assert every_other(12, drop=0.25) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert every_other(1) == [0]
    for period in range(2, 60):  # whatever rounding does to 1 / (1 / k)
        assert len(every_other(10 * period, drop=1 / period)) == 10 * (period - 1)


# ------------------------------------------------------------------------------------------------------ depth rule


@pytest.mark.parametrize(("depth", "last"), [(1, 0.5), (4, 0.5), (54, 0.5), (10, 0.8), (3, 1.0), (3, 0.0)])
def test_survival_falls_linearly_to_that_of_the_last_block(depth: int, last: float) -> None:
    survival = survival_rates(depth, last)
    assert len(survival) == depth
    assert survival[-1] == pytest.approx(last)
    steps = [before - after for before, after in zip([1.0, *survival], survival, strict=False)]
    assert steps == pytest.approx([(1 - last) / depth] * depth)
    for block in range(1, depth + 1):  # eq. 4 of Huang et al. 2016
        assert survival[block - 1] == pytest.approx(1 - block / depth * (1 - last))


def test_survival_and_dropping_are_not_mixed_up() -> None:
    """(l / L) p_L is a rate of dropping only if p_L is one; read as a survival it is right at one half alone."""
    mixed = [block / 4 * 0.5 for block in range(1, 5)]
    assert [1 - survival for survival in survival_rates(4, 0.5)] == mixed
    mixed = [block / 4 * 0.8 for block in range(1, 5)]
    assert [1 - survival for survival in survival_rates(4, 0.8)] == pytest.approx([rate / 4 for rate in mixed])


def test_expected_depth_of_the_paper() -> None:
    """Huang et al. 2016, section 3: with p_L = 0.5 about three quarters of the blocks, 40 of 54, are active."""
    assert sum(survival_rates(54)) == pytest.approx((3 * 54 - 1) / 4)
    net = nn.Sequential(*(StochasticDepth(Seen(), 1 - survival) for survival in survival_rates(54)))
    with torch.no_grad():
        net(torch.zeros(1000, 1))
    active = sum(block.block.rows[0] for block in net) / 1000
    error = (sum(s * (1 - s) for s in survival_rates(54)) / 1000) ** 0.5
    assert abs(active - 40.25) < 4 * error


# -------------------------------------------------------------------------------------------------------- refusals


def test_choices_that_are_refused() -> None:
    for owner, make in {
        "drop_path": lambda **how: drop_path(torch.ones(2), 0.1, **how),
        "DropPath": lambda **how: DropPath(0.1, **how),
        "StochasticDepth": lambda **how: StochasticDepth(nn.Identity(), 0.1, **how),
    }.items():
        with pytest.raises(ValueError, match=rf"vardrop.{owner}: mode must be one of row, batch, got 'column'"):
            make(mode="column")
        with pytest.raises(ValueError, match=rf"vardrop.{owner}: scaling must be one of inverted, original, got 'no'"):
            make(scaling="no")


def test_rates_that_are_refused() -> None:
    for make in (DropPath, lambda p: StochasticDepth(nn.Identity(), p), lambda p: drop_path(torch.ones(2), p)):
        with pytest.raises(ValueError, match=r"p must be a dropout rate in \[0, 1\], got 1.5"):
            make(1.5)
    with pytest.raises(TypeError, match=r"vardrop.DropPath: p must be a number or a schedule, got learned"):
        DropPath(rates.learned(0.1))


def test_inputs_that_are_refused() -> None:
    number = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"vardrop.drop_path: x must have a batch dimension, got a number"):
        drop_path(number, 0.1)
    with pytest.raises(TypeError, match=r"drop_path: x must be of a floating-point or complex type, got torch.int64"):
        drop_path(torch.ones(2, dtype=torch.long), 0.1)
    with pytest.raises(ValueError, match=r"vardrop.StochasticDepth: x must have a batch dimension, got a number"):
        StochasticDepth(nn.Identity())(number)
    layer = StochasticDepth(nn.Linear(3, 4), 0.0)
    words = r"block and shortcut must agree on the shape .* got \(2, 4\) and \(2, 3\) for the input \(2, 3\)"
    with pytest.raises(ValueError, match=words):
        layer(torch.ones(2, 3))
    with pytest.raises(ValueError, match=words):
        layer.eval()(torch.ones(2, 3))


def test_modules_that_are_refused() -> None:
    with pytest.raises(TypeError, match=r"StochasticDepth: block must be a torch.nn.Module, got function"):
        StochasticDepth(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"StochasticDepth: shortcut must be a torch.nn.Module, got str"):
        StochasticDepth(nn.Identity(), shortcut="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"LayerDrop: layers must be torch.nn.Modules, got int"):
        LayerDrop([1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"LayerDrop: layers must be one module or more, got none"):
        LayerDrop([])


@pytest.mark.parametrize("keep", [[2], [-1], [1, 0], [0, 0]])
def test_selections_that_are_refused(keep: list[int]) -> None:
    with pytest.raises(ValueError, match=r"LayerDrop: keep must be growing indices below 2, the number of layers, got"):
        LayerDrop([nn.Identity(), nn.Identity()], keep=keep)


def test_depths_that_are_refused() -> None:
    for depth in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"vardrop.survival_rates: depth must be a number of blocks, 1 or more"):
            survival_rates(depth)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"vardrop.every_other: depth must be a number of layers, 1 or more"):
            every_other(depth)  # type: ignore[arg-type]
    for last in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"vardrop.survival_rates: last must be a survival rate in \[0, 1\], got"):
            survival_rates(3, last)
    for drop in (0, 0.6, float("nan")):
        with pytest.raises(ValueError, match=r"vardrop.every_other: drop must be a share above 0 and at most 0.5, got"):
            every_other(3, drop)
