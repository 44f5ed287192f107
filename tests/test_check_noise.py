"""The noise kit passes what is right, and finds every defect that is planted in a layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vardrop as vd
from vardrop.functional import drop
from vardrop.testing import NoiseError, NoiseReport, check_noise

SHAPE = (6, 8, 5)
X = torch.linspace(1, 2, 6 * 8 * 5).view(SHAPE)
TIME = {"batch": 0, "channel": 1, "time": 2}


class Noisy(nn.Module):
    """A function of x in training, x in evaluation."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if self.training else x


def check(function: Callable[[Tensor], Tensor], **about: object) -> NoiseReport:
    torch.manual_seed(0)
    return check_noise(Noisy(function), X, **{"variance": X.square(), "independent": TIME, **about})


def bernoulli(x: Tensor, shared: tuple[int, ...] = ()) -> Tensor:
    return drop(x, 0.5, shared=shared)


def shares_in_groups_of_four(x: Tensor) -> Tensor:
    return x * drop(x.new_ones(6, 2, 5), 0.5).repeat_interleave(4, 1)


def shares_between_first_two_channels(x: Tensor) -> Tensor:
    factor = drop(torch.ones_like(x), 0.5)
    return x * torch.cat([factor[:, :1], factor[:, :1], factor[:, 2:]], 1)


def spares_the_corner(x: Tensor) -> Tensor:
    return torch.where(torch.arange(240).view(SHAPE) == 0, drop(x, 0.35), drop(x, 0.5))


def tilted(x: Tensor) -> Tensor:
    """Right on average, but half of the entries get what the other half lacks."""
    return drop(x, 0.5) + x * torch.where(torch.arange(240).view(SHAPE) % 2 == 0, 0.3, -0.3)


class Frozen:
    """A mask that is drawn once for every two calls."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        mask, self.mask = self.mask, None
        if mask is None:
            mask = self.mask = drop(torch.ones_like(x), 0.5)
        return x * mask


DEFECTS = {
    "the scale is forgotten": (lambda x: drop(x, 0.5) / 2, "mean"),
    "the rate is wrong": (lambda x: drop(x, 0.51), "variance"),
    "the noise has another law": (lambda x: x + 0.9 * x * torch.randn_like(x), "variance"),
    "the batch shares its draws": (lambda x: bernoulli(x, (0,)), "independent along batch"),
    "channels share their draws": (lambda x: bernoulli(x, (1,)), "independent along channel"),
    "time shares its draws": (lambda x: bernoulli(x, (2,)), "independent along time"),
    "four channels share a draw": (shares_in_groups_of_four, "neighbours along channel"),
    "two channels share a draw": (shares_between_first_two_channels, "neighbours along channel"),
    "one entry has another rate": (spares_the_corner, "variance of every entry"),
    "entries have a bias that cancels": (tilted, "mean of every entry"),
    "two calls share their draws": (Frozen(), "successive calls"),
}


@pytest.mark.parametrize(("function", "named"), DEFECTS.values(), ids=list(DEFECTS))
def test_a_planted_defect_is_found_by_the_check_that_it_is_for(
    function: Callable[[Tensor], Tensor], named: str
) -> None:
    with pytest.raises(NoiseError, match=r"the noise of Noisy.* must be what the caller says, got wrong") as caught:
        check(function)
    report = caught.value.report
    assert named in report.failed
    assert abs(report.z[named]) > report.bound
    assert f"{named} " in str(caught.value)
    assert "too far off" in str(report)


@pytest.mark.parametrize("seed", range(15))
def test_what_is_right_passes(seed: int) -> None:
    torch.manual_seed(seed)
    report = check_noise(vd.layers.Dropout(0.5), X, independent=TIME, samples=300)
    assert not report.failed
    assert report.samples == 300
    assert set(report.z) >= {
        "mean",
        "variance",
        "successive calls",
        "independent along time",
        "variance of every entry",
    }


def test_figures_are_standard_errors() -> None:
    """Of a layer that is right, the z-scores of independent runs are those of a standard normal variable."""
    torch.manual_seed(1)
    layer = vd.layers.GaussianDropout(0.5)
    z = [check_noise(layer, (8, 8), samples=100, false_alarm=1e-9).z for _ in range(120)]
    for name in ("mean", "variance", "independent along batch", "neighbours along channel", "successive calls"):
        values = torch.tensor([one[name] for one in z])
        assert abs(values.mean()) < 5 / 120**0.5, name
        assert 0.75 < values.std() < 1.3, name


def test_shared_axes() -> None:
    report = check_noise(vd.layers.LockedDropout(0.5), X.expand(SHAPE), independent={"batch": 0}, shared={"time": 1})
    assert report.z["shared along time"] == 0
    with pytest.raises(NoiseError, match=r"shared along time \(inf standard errors\)"):
        check(bernoulli, shared={"time": 2})


def test_ranks() -> None:
    """Two processes with noise of their own, and two that share a seed."""
    other = torch.Generator().manual_seed(5)

    def apart(d: Tensor) -> Tensor:
        return torch.stack([d, drop(torch.ones_like(d), 0.5, generator=other) - 1])

    assert "independent across ranks" in check(bernoulli, gather=apart).z
    with pytest.raises(NoiseError, match="independent across ranks"):
        check(bernoulli, gather=lambda d: torch.stack([d, d]))


def in_a_process(rank: int, folder: str) -> None:
    """Check a layer whose noise differs between processes, then one whose seed is the same in all of them."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)

    def gather(d: Tensor) -> Tensor:
        pieces = [torch.empty_like(d) for _ in range(2)]
        torch.distributed.all_gather(pieces, d)
        return torch.stack(pieces)

    layer = vd.layers.Dropout(0.5)
    torch.manual_seed(rank)
    found = sorted(check_noise(layer, SHAPE, samples=100, gather=gather).failed)
    torch.manual_seed(0)
    try:
        check_noise(layer, SHAPE, samples=100, gather=gather)
    except NoiseError as error:
        found += sorted(error.report.failed)
    Path(folder, str(rank)).write_text(", ".join(found))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_ranks_of_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(in_a_process, (str(tmp_path),), nprocs=2)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["independent across ranks"] * 2


def test_compiled_layers() -> None:
    torch._dynamo.reset()
    report = check_noise(vd.layers.Dropout(0.3), (8, 8), samples=400, compiled="eager")
    assert {"mean", "compiled, mean", "compiled, variance of every entry", "compiled against eager"} <= set(report.z)

    def wrong(x: Tensor) -> Tensor:
        return drop(x, torch.tensor(0.6)) if torch.compiler.is_compiling() else drop(x, 0.5)

    with pytest.raises(NoiseError, match="compiled against eager") as caught:
        check(wrong, samples=200, compiled="eager")
    assert {name for name in caught.value.report.failed if not name.startswith("compiled")} == set()


def test_where_nothing_may_vary() -> None:
    variance = torch.where(torch.arange(8) < 4, X.square()[0, :, 0], 0.0).view(8, 1).expand(SHAPE)
    with pytest.raises(NoiseError, match=r"silent where variance is 0 \(inf"):
        check(bernoulli, variance=variance.where(variance == 0, X.square()))
    assert not check(lambda x: x, variance=0.0).failed


def test_modes_come_back_and_errors_too() -> None:
    net = nn.Sequential(vd.layers.Dropout(0.5), nn.Dropout(0.0).eval()).train(True)
    net[1].eval()
    check_noise(net, X, variance=X.square(), samples=200)
    assert [module.training for module in net.modules()] == [True, True, False]
    with pytest.raises(
        ValueError, match="variance must be given for a layer without a rate of vardrop's, got None for Seq"
    ):
        check_noise(net, X)
    with pytest.raises(ValueError, match="in evaluation the layer must be deterministic, got two outputs from Always"):
        check_noise(Always(), X, variance=1.0)
    with pytest.raises(ValueError, match="samples must be at least 2, got 1"):
        check_noise(net, X, variance=1.0, samples=1)
    assert [module.training for module in net.modules()] == [True, True, False]


class Always(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return drop(x, 0.5)
