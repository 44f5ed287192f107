"""DropBlock: the rate is the requested one everywhere, and the law of the masks is that of independent seeds."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import architectures  # noqa: F401  (makes torchvision importable, and so timm)
import vardrop as vd
from vardrop import masks, rates
from vardrop.layers import dropblock
from vardrop.layers.dropblock import DropBlock1d, DropBlock2d, DropBlock3d, drop_block

LAYERS = {1: DropBlock1d, 2: DropBlock2d, 3: DropBlock3d}
every_rescale = pytest.mark.parametrize("rescale", ["expected", "sample", "batch"])
every_rule = pytest.mark.parametrize("seeds", ["extended", "valid"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["sparse", "dense"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to draw seeds: a Poisson number of places, and a number for every place."""
    monkeypatch.setattr(dropblock, "_sparse_pays", lambda _: request.param == "sparse")
    return request.param


def dropped(shape: tuple[int, ...], p: float, b: int | tuple[int, ...], **how: object) -> Tensor:
    return drop_block(torch.ones(shape), p, b, **how) == 0  # type: ignore[arg-type]


def bound(tests: int) -> float:
    """Standard errors that so many tests stay within together, but for one time in ten thousand."""
    return -float(torch.special.ndtri(torch.tensor(0.5e-4 / tests, dtype=torch.float64)))


def assert_frequencies(seen: Tensor, p: Tensor | float, trials: int, what: str = "") -> None:
    """Counts of ``trials`` independent events of probability p, family-wise."""
    p = torch.as_tensor(p, dtype=torch.float64).expand(seen.shape)
    error = (p * (1 - p) * trials).sqrt()
    sure = error == 0
    assert torch.equal(seen[sure].double(), (p * trials)[sure]), what
    z = ((seen - p * trials) / error)[~sure].abs()
    assert not z.numel() or z.max() < bound(z.numel()), f"{what}: {z.max():.1f} standard errors"


# -------------------------------------------------------------------------------------------------------- the rate

SIZES = [1, 2, 3, 5, 7, 8, 14, 28, 56]
SHAPES = list(itertools.product(SIZES, SIZES))


@pytest.mark.parametrize("b", range(1, 10))
@pytest.mark.parametrize("share_channels", [False, True])
def test_the_rate_is_the_requested_one_on_every_map(b: int, share_channels: bool) -> None:
    """Within four standard errors of the mean over independent maps, H and W from 1 to 56."""
    p, far = 0.1, []
    for h, w in SHAPES:
        maps = max(500, 150_000 // (h * w))
        shape = (maps, 2, h, w) if share_channels else (2, maps // 2, h, w)
        gone = dropped(shape, p, b, share_channels=share_channels)
        share = (gone[:, 0] if share_channels else gone.flatten(0, 1)).flatten(1).double().mean(1)
        far.append(abs(share.mean() - p) / max(share.std(), (p * (1 - p) / h / w) ** 0.5) * len(share) ** 0.5)
    assert max(far) < 4, SHAPES[far.index(max(far))]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("b", range(1, 10))
@pytest.mark.parametrize("p", [0.02, 0.3])
def test_the_rate_is_the_requested_one_at_every_size(b: int, p: float) -> None:
    """Every height from 1 to 56, each with another width, in both ways to draw seeds."""
    far = []
    for h in range(1, 57):
        w = 1 + 23 * h % 56
        gone = dropped((2, max(100, 40_000 // (h * w)), h, w), p, b).flatten(0, 1)
        share = gone.flatten(1).double().mean(1)
        far.append(abs(share.mean() - p) / max(share.std(), (p * (1 - p) / h / w) ** 0.5) * len(share) ** 0.5)
    assert max(far) < 5, f"height {1 + far.index(max(far))}"


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    ("space", "b"),
    [
        ((1, 1), 3),
        ((7, 7), 7),
        ((6, 9), 4),
        ((5, 3), 4),
        ((4, 7), 9),
        ((14, 10), 5),
        ((8, 8), (3, 6)),
        ((9, 5), 1),
        ((12,), 4),
        ((3,), 5),
        ((4, 5, 3), 2),
        ((3, 4, 2), (3, 2, 5)),
    ],
)
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_the_rate_is_the_same_in_corners_and_centre(space: tuple[int, ...], b: int | tuple[int, ...], p: float) -> None:
    for share_channels in (False, True):
        shape = (10_000, 2, *space) if share_channels else (2, 5_000, *space)
        gone = dropped(shape, p, b, share_channels=share_channels)
        maps = gone[:, 0] if share_channels else gone.flatten(0, 1)
        assert_frequencies(maps.sum(0), p, 10_000, f"{space} {b} {share_channels}")


def test_the_tests_above_can_fail() -> None:
    """They find a rate that is off by a fifth, and timm's excess at a rim of the map."""
    timm = pytest.importorskip("timm.layers")
    maps = dropped((2, 5_000, 6, 9), 0.06, 4).flatten(0, 1)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_frequencies(maps.sum(0), 0.05, 10_000)
    maps = (timm.drop_block_2d(torch.ones(2, 5_000, 7, 7), 0.1, 7, couple_channels=False) == 0).flatten(0, 1)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_frequencies(maps.sum(0), 0.1, 10_000)


# --------------------------------------------------------------------------------------------------------- the law


def mask_law(space: tuple[int, ...], b: tuple[int, ...], p: float, seeds: str) -> dict[tuple[bool, ...], float]:
    """The probability of every mask, summed over all sets of seeds; seeds are written as the block they drop."""
    b = tuple(map(min, b, space))
    inside = math.prod(size - k + 1 for size, k in zip(space, b, strict=True))
    gamma = 1 - (1 - p) ** (1 / math.prod(b))
    if seeds == "valid":
        gamma = p * math.prod(space) / math.prod(b) / inside
    units = list(itertools.product(*map(range, space)))
    first = [
        range(1 - k, size) if seeds == "extended" else range(size - k + 1) for size, k in zip(space, b, strict=True)
    ]
    blocks = [
        [all(c <= i < c + k for c, i, k in zip(corner, unit, b, strict=True)) for unit in units]
        for corner in itertools.product(*first)
    ]
    law = {(False,) * len(units): 1.0}
    for block in blocks:
        new: dict[tuple[bool, ...], float] = {}
        for mask, probability in law.items():
            union = tuple(m or c for m, c in zip(mask, block, strict=True))
            new[mask] = new.get(mask, 0.0) + probability * (1 - gamma)
            new[union] = new.get(union, 0.0) + probability * gamma
        law = new
    return law


CASES = [((4,), (2,)), ((5,), (3,)), ((3,), (7,)), ((2, 3), (2, 2)), ((3, 2), (1, 2)), ((3, 3), (2, 2))]
CASES += [((2, 2, 2), (2, 1, 2))]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("space", "b"), CASES)
@every_rule
@pytest.mark.parametrize("p", [0.1, 0.6])
def test_every_mask_has_its_probability(space: tuple[int, ...], b: tuple[int, ...], p: float, seeds: str) -> None:
    """The whole law, by enumeration of all sets of independent seeds: joint probabilities, not rates alone."""
    law = mask_law(space, b, p, seeds)
    assert sum(law.values()) == pytest.approx(1)
    trials = 60_000
    gone = dropped((3, trials // 3, *space), p, b, seeds=seeds).reshape(trials, -1)
    code = (gone.long() << torch.arange(gone.shape[1])).sum(1)
    seen = torch.bincount(code, minlength=2 ** gone.shape[1])
    expected = torch.zeros(len(seen), dtype=torch.float64)
    for mask, probability in law.items():
        expected[sum(m << i for i, m in enumerate(mask))] = probability
    rare = expected * trials < 30  # a count of few is no normal variable: these are one event together
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert_frequencies(seen, expected.clamp(max=1), trials, f"{space} {b}")


@pytest.mark.usefixtures("path")
def test_channels_examples_and_calls_are_independent() -> None:
    p, n = 0.3, 20_000
    first, second = dropped((n, 2, 2, 3), p, 2), dropped((n, 2, 2, 3), p, 2)
    a, other = first.double().flatten(2) - p, second.double().flatten(2) - p  # [examples, channels, units]
    pairs = {"channels": (a[:, 0], a[:, 1]), "examples": (a[:-1, 0], a[1:, 0]), "calls": (a[:, 0], other[:, 0])}
    for name, (left, right) in pairs.items():
        z = left.T @ right / (p * (1 - p)) / len(left) ** 0.5
        assert z.abs().max() < bound(z.numel()), name


@pytest.mark.usefixtures("path")
def test_channels_share_a_mask_when_asked_to() -> None:
    gone = dropped((50, 4, 9, 7), 0.3, 3, share_channels=True)
    assert torch.equal(gone, gone[:, :1].expand_as(gone))
    assert not torch.equal(gone[0], gone[1])


def test_the_number_of_sparse_seeds_has_the_mean_and_variance_of_independent_ones() -> None:
    places, hazard, trials = 1000, 0.02, 5000
    gamma = 1 - math.exp(-hazard)
    counts = torch.tensor(
        [len(dropblock._sparse_seeds(places, hazard, None).unique()) for _ in range(trials)], dtype=torch.float64
    )
    variance = places * gamma * (1 - gamma)
    assert abs(counts.mean() - places * gamma) < 4 * (variance / trials) ** 0.5
    assert abs(counts.var() / variance - 1) < 4 * (2 / trials) ** 0.5


# ------------------------------------------------------------------------------------------------------ the scale


@pytest.mark.usefixtures("path")
@every_rule
@pytest.mark.parametrize(("space", "b"), [((6,), 4), ((5, 3), 3), ((3, 3, 2), 2)])
def test_the_expectation_of_every_unit_is_the_input(space: tuple[int, ...], b: int, seeds: str) -> None:
    x = torch.rand(1, 1, *space, dtype=torch.float64) + 1
    y = drop_block(x.expand(40_000, 1, *space), 0.3, b, seeds=seeds)
    z = (y.mean(0) - x[0]) / y.std(0) * len(y) ** 0.5
    assert z.abs().max() < bound(z.numel())


@pytest.mark.usefixtures("path")
@every_rule
@pytest.mark.parametrize("share_channels", [False, True])
def test_realised_rescaling_keeps_the_sum(share_channels: bool, seeds: str) -> None:
    how = {"share_channels": share_channels, "seeds": seeds}
    y = drop_block(torch.ones(6, 3, 9, 8), 0.4, 3, rescale="sample", **how)
    torch.testing.assert_close(y.flatten(1).mean(1), torch.ones(6))
    assert all(len(sample.unique()) == 2 for sample in y)
    y = drop_block(torch.ones(6, 3, 9, 8), 0.4, 3, rescale="batch", **how)
    torch.testing.assert_close(y.mean(), torch.ones(()))
    assert len(y.unique()) == 2


@pytest.mark.usefixtures("path")
@every_rescale
def test_where_everything_is_dropped_there_are_finite_zeros(rescale: str) -> None:
    x = torch.ones(64, 1, 2, 2, requires_grad=True)
    y = drop_block(x, 1.0, 3, rescale=rescale)
    y.sum().backward()
    assert not y.count_nonzero()
    assert not x.grad.count_nonzero()
    y = drop_block(x, 0.5, 2, rescale=rescale)
    gone = (y == 0).flatten(1).all(1)
    assert 0 < gone.sum() < len(gone)
    assert y.isfinite().all()


@pytest.mark.usefixtures("path")
@every_rescale
@every_rule
def test_rate_zero_is_the_input(rescale: str, seeds: str) -> None:
    x = torch.randn(4, 3, 6, 5)
    assert torch.equal(drop_block(x, 0.0, 3, rescale=rescale, seeds=seeds), x)


def test_an_almost_certain_rate() -> None:
    """Sparse drawing has many seeds to write then, and is right still."""
    gone = dropped((2, 4000, 3, 3), 0.97, 2).flatten(0, 1)
    assert_frequencies(gone.sum(0), 0.97, 8000)


# -------------------------------------------------------------------------------------- what the peers promise


@pytest.mark.parametrize(("size", "b"), [((14, 14), 7), ((7, 7), 7), ((9, 6), 3)])
def test_the_valid_rule_is_that_of_torchvision(size: tuple[int, int], b: int) -> None:
    """It implements the paper's: same rate at every position, normalised over the batch. Odd blocks that fit."""
    ops = pytest.importorskip("torchvision.ops")
    shape, trials = (2, 10_000, *size), 20_000
    theirs = ops.drop_block2d(torch.ones(shape), 0.2, b)
    ours = drop_block(torch.ones(shape), 0.2, b, seeds="valid", rescale="batch")
    torch.testing.assert_close(theirs.mean(), ours.mean(), rtol=1e-5, atol=0)
    counts = [(y == 0).flatten(0, 1).sum(0).double() for y in (theirs, ours)]
    pooled = (counts[0] + counts[1]) / (2 * trials)
    z = (counts[0] - counts[1]) / (2 * trials * pooled * (1 - pooled)).sqrt().clamp(min=1)
    assert z.abs().max() < bound(z.numel())


def test_timm_agrees_where_it_is_exact() -> None:
    """At block size 1 its rate is p; it shares masks between channels by default and normalises over the batch."""
    timm = pytest.importorskip("timm.layers")
    theirs = timm.drop_block_2d(torch.ones(8_000, 2, 5, 4), 0.2, 1)
    ours = drop_block(torch.ones(8_000, 2, 5, 4), 0.2, 1, share_channels=True, rescale="batch")
    for y in (theirs, ours):
        assert torch.equal(y[:, 0], y[:, 1])
        assert_frequencies((y[:, 0] == 0).sum(0), 0.2, 8_000)
        assert float(y.mean()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(("size", "b"), [(4, 7), (6, 7), (8, 8)])
def test_maps_that_torchvision_refuses(size: int, b: int) -> None:
    ops = pytest.importorskip("torchvision.ops")
    with pytest.raises(ValueError, match="block size should be odd"):
        ops.drop_block2d(torch.ones(2, 2, size, size), 0.1, b)
    gone = dropped((2, 5000, size, size), 0.1, b).flatten(0, 1)
    assert_frequencies(gone.sum(0), 0.1, 10_000)


# ---------------------------------------------------------------------------------------------------- the contract


def example(dims: int, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, *(6, 5, 4)[:dims])


every_layer = pytest.mark.parametrize("dims", LAYERS)


@every_layer
def test_identity_in_evaluation(dims: int) -> None:
    x = example(dims)
    assert LAYERS[dims](0.5, 2).eval()(x) is x


@pytest.mark.usefixtures("path")
@every_layer
@every_rescale
def test_the_gradient_goes_the_way_of_the_values(dims: int, rescale: str) -> None:
    x = example(dims).requires_grad_()
    y = LAYERS[dims](0.3, 2, rescale=rescale)(x)
    y.sum().backward()
    torch.testing.assert_close(y, x * x.grad)
    assert ((x.grad == 0) == (y == 0)).all()


@pytest.mark.usefixtures("path")
@every_layer
def test_second_derivatives(dims: int) -> None:
    x = example(dims, 2).double().requires_grad_()
    generator = torch.Generator()

    def run(x: Tensor) -> Tensor:
        return drop_block(x.square(), 0.3, 2, generator=generator.manual_seed(1))

    assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str)
@every_rescale
def test_types(dtype: torch.dtype, rescale: str) -> None:
    x = torch.ones(4, 3, 40, 40, dtype=dtype)
    layer = DropBlock2d(0.1, 3, rescale=rescale).to(dtype if dtype.is_floating_point else torch.float32)
    y = layer(x)
    assert y.dtype == dtype
    assert layer.rate.dtype == torch.float32
    rate = float((y == 0).double().mean())
    assert 0.05 < rate < 0.16  # the digits are tested above
    assert y.abs().double().mean().item() == pytest.approx((1 - rate) / 0.9 if rescale == "expected" else 1, rel=0.01)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("share_channels", [False, True])
def test_channels_last(layout: torch.memory_format, share_channels: bool) -> None:
    x = torch.ones(40, 50, 6, 5).contiguous(memory_format=layout)
    y = drop_block(x, 0.2, 3, share_channels=share_channels)
    assert y.is_contiguous(memory_format=layout)
    assert whole_blocks(y)


def whole_blocks(y: Tensor) -> bool:
    """Whether every dropped unit lies in a dropped block of 3 x 3, clipped at the rim."""
    gone = torch.nn.functional.pad((y == 0).float(), (2, 2, 2, 2), value=1.0)
    whole = -torch.nn.functional.max_pool2d(-gone, 3, stride=1)  # places whose block is dropped
    return torch.equal(torch.nn.functional.max_pool2d(whole, 3, stride=1), (y == 0).float())


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("view", ["transposed", "expanded", "sliced", "last-3d"])
def test_any_memory_layout_drops_the_same_units(view: str) -> None:
    x = {
        "transposed": torch.rand(5, 6, 3, 4).add(1).permute(3, 2, 0, 1),
        "expanded": torch.rand(1, 3, 5, 6).add(1).expand(4, 3, 5, 6),
        "sliced": torch.rand(4, 6, 5, 12).add(1)[:, ::2, :, 1::2],
        "last-3d": torch.rand(4, 3, 2, 5, 6).add(1).contiguous(memory_format=torch.channels_last_3d),
    }[view]
    generator = torch.Generator()
    y = drop_block(x, 0.3, 2, generator=generator.manual_seed(1))
    plain = drop_block(x.contiguous(), 0.3, 2, generator=generator.manual_seed(1))
    assert torch.equal(y, plain)
    assert y.count_nonzero() < y.numel()


@pytest.mark.usefixtures("path")
@every_layer
def test_batches_and_maps_of_nothing(dims: int) -> None:
    space = (6, 5, 4)[:dims]
    for shape in ((0, 3, *space), (2, 0, *space), (2, 3, 0, *space[1:]), (2, 3, *space[:-1], 0)):
        x = torch.ones(shape, requires_grad=True)
        y = LAYERS[dims](0.3, 2)(x)
        assert y.shape == shape
        y.sum().backward()


@pytest.mark.usefixtures("path")
@every_layer
def test_same_generator_state_same_output(dims: int) -> None:
    layer, x, generator = LAYERS[dims](0.3, 2), example(dims), torch.Generator()
    before = torch.get_rng_state()
    first = layer(x, generator=generator.manual_seed(1))
    assert torch.equal(layer(x, generator=generator.manual_seed(1)), first)
    assert not torch.equal(layer(x, generator=generator.manual_seed(2)), first)
    with vd.estimator("local", generator=generator.manual_seed(1)):
        assert torch.equal(layer(x), first)
    assert torch.equal(before, torch.get_rng_state())  # all noise comes from the generator


@every_layer
@every_rescale
def test_vmap_draws_anew_for_every_sample(dims: int, rescale: str) -> None:
    layer = LAYERS[dims](0.2, 2, rescale=rescale)
    x = torch.ones(example(dims).shape)
    samples = vmap(lambda _: layer(x), randomness="different")(torch.arange(2000))
    assert_frequencies((samples == 0)[:, 0, 0].sum(0), 0.2, 2000)
    same = vmap(lambda _: layer(x), randomness="same")(torch.arange(3))
    assert torch.equal(same[0], same[1])
    mapped = vmap(layer, randomness="different")(torch.ones(2000, *x.shape))
    assert_frequencies((mapped == 0)[:, 0, 0].sum(0), 0.2, 2000)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda _: layer(x))(torch.arange(3))


def test_torch_func_grad() -> None:
    generator, x = torch.Generator(), torch.randn(2, 3, 5, 4)

    def loss(x: Tensor) -> Tensor:
        return drop_block(x, 0.3, 2, generator=generator.manual_seed(1)).square().sum()

    gradient, y = grad(loss)(x), 2 * x
    kept = gradient != 0
    torch.testing.assert_close(gradient[kept], (y / 0.7**2)[kept])
    assert 0 < kept.sum() < kept.numel()


@every_layer
@every_rescale
@every_rule
def test_a_changing_rate_compiles_once(dims: int, rescale: str, seeds: str) -> None:
    layer = LAYERS[dims](rates.linear(0.0, 0.5, steps=20), 2, rescale=rescale, seeds=seeds)
    scheduler = rates.RateScheduler(layer)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.ones(200, *example(dims).shape[1:])
    seen = []
    for _ in range(20):
        scheduler.step()
        seen.append(float((compiled(x) == 0).double().mean()))
    assert counter.frame_count == 1
    assert seen[-1] > 3 * seen[1]


@pytest.mark.parametrize("share_channels", [False, True])
def test_compiled_masks_have_the_law_of_eager_ones(share_channels: bool) -> None:
    """Rates, and independence of channels and calls: compilers have shared random numbers between channels before."""
    layer, p = DropBlock2d(0.2, (2, 3), share_channels=share_channels), 0.2
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.ones(5000, 8, 4, 5)
    first, second = compiled(x) == 0, compiled(x) == 0
    for channel in first.unbind(1):
        assert_frequencies(channel.sum(0), p, len(x))
    a, b = first.double().flatten(2) - p, second.double().flatten(2) - p
    pairs = [(a[:, 0], b[:, 0])] + ([] if share_channels else [(a[:, 0], a[:, c]) for c in range(1, 8)])
    for left, right in pairs:
        z = left.T @ right / (p * (1 - p)) / len(x) ** 0.5
        assert z.abs().max() < bound(len(pairs) * z.numel())


@every_layer
def test_copies_and_files(dims: int) -> None:
    layer, x = LAYERS[dims](0.3, 2, share_channels=True, rescale="sample"), example(dims)

    def run(module: nn.Module) -> Tensor:
        torch.manual_seed(3)
        return module(x)

    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    fresh = LAYERS[dims](0.1, 2, share_channels=True, rescale="sample")
    fresh.load_state_dict(layer.state_dict())
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False), fresh
    for other in copies:
        assert torch.equal(run(other), run(layer))
        other.set_rate_(0.0)
        assert layer.p == pytest.approx(0.3)
    assert list(layer.state_dict()) == ["rate_value"]


def test_checkpointing_replays_the_mask() -> None:
    layer, x = DropBlock2d(0.3, 2), torch.randn(4, 3, 6, 5, requires_grad=True)

    def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(2)
        x.grad = None
        run(x.square()).square().sum().backward()
        return x.grad

    expected = gradient(layer)
    assert torch.equal(gradient(lambda y: checkpoint(layer, y, use_reentrant=False)), expected)


def test_export_in_evaluation() -> None:
    program = torch.export.export(DropBlock2d(0.3).eval(), (torch.ones(2, 3, 8, 8),))
    assert torch.equal(program.module()(torch.ones(2, 3, 8, 8)), torch.ones(2, 3, 8, 8))


def test_the_representation_tells_what_is_not_default() -> None:
    assert repr(DropBlock2d(0.1, 7)) == "DropBlock2d(p=0.1, block_size=7)"
    layer = DropBlock2d(0.1, (3, 5), share_channels=True, seeds="valid", rescale="batch")
    told = "p=0.1, block_size=(3, 5), share_channels=True, seeds='valid', rescale='batch'"
    assert repr(layer) == f"DropBlock2d({told})"


# ------------------------------------------------------------------------------------------------------- refusals


def test_shapes_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"drop_block: x must have a batch, a channel and .* got shape \(2, 3\)"):
        drop_block(torch.ones(2, 3), 0.1, 2)
    with pytest.raises(ValueError, match=r"DropBlock1d: x must have the shape \[batch, channels, length\]"):
        DropBlock1d()(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"DropBlock2d: .*\[batch, channels, height, width\], got \(3, 8, 8\)"):
        DropBlock2d()(torch.ones(3, 8, 8))
    with pytest.raises(ValueError, match=r"DropBlock3d: .*\[batch, channels, depth, height, width\]"):
        DropBlock3d().eval()(torch.ones(2, 3, 8, 8))
    with pytest.raises(TypeError, match=r"drop_block: x must be of a floating-point or complex type, got torch.int64"):
        drop_block(torch.ones(2, 3, 4, dtype=torch.long), 0.1, 2)


@pytest.mark.parametrize("b", [0, -1, 2.5, (3,), (3, 3, 3), (3, 0), True])
def test_block_sizes_that_are_refused(b: object) -> None:
    words = r"block_size must be a whole number of 1 or more, or 2 of them"
    with pytest.raises(ValueError, match=rf"vardrop.drop_block: {words}"):
        drop_block(torch.ones(2, 3, 4, 4), 0.1, b)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"vardrop.DropBlock2d: {words}"):
        DropBlock2d(0.1, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_rates_that_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"vardrop.drop_block: p must be a dropout rate in \[0, 1\], got"):
        drop_block(torch.ones(2, 3, 4, 4), p, 2)
    with pytest.raises(ValueError, match=r"vardrop.DropBlock2d: p must be a dropout rate in \[0, 1\], got"):
        DropBlock2d(p)


@pytest.mark.parametrize(("name", "choices"), [("seeds", "extended, valid"), ("rescale", "expected, sample, batch")])
def test_choices_that_are_refused(name: str, choices: str) -> None:
    with pytest.raises(ValueError, match=rf"vardrop.drop_block: {name} must be one of {choices}, got 'other'"):
        drop_block(torch.ones(2, 3, 4, 4), 0.1, 2, **{name: "other"})
    with pytest.raises(ValueError, match=rf"vardrop.DropBlock2d: {name} must be one of {choices}, got 'other'"):
        DropBlock2d(0.1, 2, **{name: "other"})


def test_a_rate_cannot_be_learned() -> None:
    with pytest.raises(TypeError, match=r"vardrop.DropBlock2d: p must be a number or a schedule, got learned"):
        DropBlock2d(rates.learned(0.1))


@pytest.mark.parametrize("rate", [1 - 2**-16, 0.99999])
def test_half_precision_has_no_infinite_scale(rate: float) -> None:
    """1 / (1 - p) is more than float16 has, and infinity times 0 is no number."""
    x = torch.ones(64, 16, 16, 16, dtype=torch.float16)
    layer = vd.layers.Dropout(rate)
    for y in (
        drop_block(x, rate, 3), drop_block(x, rate, 1, rescale="sample"), vd.layers.drop_path(x, rate), layer(x),
        vd.functional.drop(x, torch.tensor(rate)), torch.func.vmap(layer, randomness="different")(x),
    ):  # fmt: skip
        assert not y.isnan().any()


def test_another_default_device_changes_nothing() -> None:
    x = torch.ones(2, 3, 9, 9)
    masks._powers_of_the_processor.cache_clear()
    with torch.device("meta"):
        for y in (drop_block(x, 0.3, 3), vd.layers.drop_path(x, 0.3), vd.functional.drop(x, 0.5)):
            assert y.device.type == "cpu"
