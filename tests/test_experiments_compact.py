"""The experiment on compaction: its cells, what one gives, what is chosen, and what is drawn."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from vardrop.reproduce.experiments import _compact, _onnx, compact
from vardrop.reproduce.results import Result


def result(rows: list[dict[str, Any]]) -> Result:
    return Result("compact", "smoke", {}, 0, {}, None, "a processor", 1, 1.0, rows)


def network_row(share: float, work: float, validation: float, name: str = "LeNet-5", seed: int = 0) -> dict[str, Any]:
    errors = {f"{kind}_error_compact": value for kind, value in (("validation", validation), ("test", validation + 1))}
    return {
        "table": "networks", "network": name, "kl_scale": share, "seed": seed, "work_ratio": work,
        "parameters_left": 1000 * work, "validation_error_plain": 2.0, "test_error_plain": 3.0, **errors,
    }  # fmt: skip


def time_rows(share: float, work: float, ratios: tuple[float, float], **about: Any) -> list[dict[str, Any]]:
    """Of onnxruntime nine tenths of the ratio, of a network for inference half of it, of a folded one twice."""
    identity = {"table": "times", "network": "LeNet-5", "seed": 0, **about, "kl_scale": share, "work_ratio": work}
    return [
        {**identity, "form": form, "engine": engine, "batch": batch,
         "ms_dense": 2.0, "ms_form": 2 * less * r, "time_ratio": by * less * r}
        for engine, by in (("torch", 1.0), ("onnxruntime", 0.9))
        for batch, r in zip((1, 256), ratios, strict=True)
        for form, less in (("compact", 1.0), ("for inference", 0.5), ("nothing removed", 2.0))
    ]  # fmt: skip


def test_cells_are_networks_by_shares_by_seeds() -> None:
    for scale, count in (("smoke", 4), ("cpu", 13 * 2), ("gpu", 13 * 3)):
        assert len(compact.EXPERIMENT.at(scale)) == count
    assert compact.EXPERIMENT.runs_alone({})


@pytest.mark.parametrize("cell", compact.EXPERIMENT.cells("smoke"), ids=lambda cell: cell["network"])
def test_a_cell_gives_sizes_errors_and_times(cell: dict[str, Any]) -> None:
    row, *timed = compact.run_cell(cell)
    assert row["parameters_left"] <= row["parameters"]
    assert 0 < row["work_ratio"] <= 1
    assert row["multiply_adds"] >= row["multiply_adds_left"] > 0
    assert row["test_error_sparse"] == pytest.approx(row["test_error_compact"], abs=0.3)  # the same function
    keys = [(each["engine"], each["batch"], each["form"]) for each in timed]
    assert keys == list(itertools.product(("torch", "onnxruntime"), (1, 256), cell["forms"]))
    assert {each["work_ratio"] for each in timed if each["form"] == "nothing removed"} == {1}
    assert all(each["ms_dense"] > 0 and each["time_ratio"] > 0 for each in timed)
    assert compact.summarise([result([row, *timed])])[-1]["networks"] == 1
    worst = [row for row in compact.summarise([result([row, *timed])]) if row["table"] == "worst"]
    groups = ("wide" if cell["network"] in compact.WIDE else "small", "all")
    assert [(row["form"], row["group"]) for row in worst] == list(itertools.product(cell["forms"], groups))


def test_validation_chooses_the_least_work_that_is_near_enough() -> None:
    rows = [network_row(0.1, 0.5, 2.1), network_row(0.2, 0.3, 2.5), network_row(0.5, 0.1, 2.6)]
    rows += [*time_rows(0.1, 0.5, (1.0, 0.5)), *time_rows(0.2, 0.3, (0.9, 0.36)), *time_rows(0.5, 0.1, (0.8, 0.1))]
    chosen, mean, *others = compact.summarise([result(rows)])
    assert (chosen["kl_scale"], mean["seeds"]) == (0.2, 1)
    one, faster, folded, many = others[:4]
    assert (one["engine"], one["batch"], one["form"], one["time_ratio"]) == ("torch", 1, "compact", 0.9)
    assert (faster["form"], faster["time_ratio"], folded["form"]) == ("for inference", 0.45, "nothing removed")
    assert (many["batch"], many["ms_dense"], many["ms_form"]) == (256, 2.0, pytest.approx(0.72))
    worst = {row["form"]: row for row in others if row["table"] == "worst" and row["group"] == "all"}
    assert worst["compact"]["over_work_torch_256"] == pytest.approx(1.2)
    assert worst["compact"]["over_work_onnxruntime_256"] == pytest.approx(1.08)
    assert worst["for inference"]["over_work_torch_256"] == pytest.approx(0.6)
    assert worst["compact"]["error_increase"] == pytest.approx(0.5)


def test_where_none_is_near_the_smallest_error_is_taken() -> None:
    rows = [network_row(0.1, 0.5, 3.0), network_row(0.2, 0.3, 4.0)]
    rows += [*time_rows(0.1, 0.5, (1.0, 0.5)), *time_rows(0.2, 0.3, (0.9, 0.3))]
    assert compact.summarise([result(rows)])[0]["kl_scale"] == 0.1


def test_means_are_over_seeds() -> None:
    rows = [network_row(0.1, 0.4, 2.0), network_row(0.1, 0.6, 2.2, seed=1)]
    rows += [*time_rows(0.1, 0.4, (1.0, 0.4)), *time_rows(0.1, 0.6, (1.0, 0.6), seed=1)]
    mean = next(row for row in compact.summarise([result(rows)]) if row["table"] == "means")
    assert (mean["work_ratio"], mean["work_ratio_sd"]) == (pytest.approx(0.5), pytest.approx(0.1414, abs=1e-3))


def test_the_figure_has_a_panel_for_each_batch() -> None:
    drawn = compact.figure([result([network_row(0.1, 0.4, 2.0), *time_rows(0.1, 0.4, (1.0, 0.4))])], [])
    titles = [f"{engine}, batch {batch}" for engine in ("torch", "onnxruntime") for batch in (1, 256)]
    assert [axes.get_title() for axes in drawn.axes] == titles


def test_images_are_padded_and_do_not_overlap() -> None:
    data = _compact.images("digits", 200, 100, 16)
    assert data.train[0].shape == (200, 1, 16, 16)
    assert data.validation[0].shape[0] == 100
    assert data.train[0][..., :4].abs().sum() == 0
    with pytest.raises(ValueError, match="train and validation must fit into 1438 images, got 1400 and 100; take few"):
        _compact.images("digits", 1400, 100, 16)


def test_bands_are_the_pixels_in_order() -> None:
    net = _compact.BandEncoder(4, 2, 8, 1, 2, 8).eval()
    seen = []
    net.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.arange(32.0).view(2, 1, 4, 4)
    assert net(x).shape == (2, 10)
    assert torch.equal(seen[0][..., :8].flatten(1), x.flatten(1))
    assert torch.equal(seen[0][0, :, 8:], torch.eye(2))


def test_the_noise_has_a_rate_of_its_own() -> None:
    net = nn.Linear(3, 2)
    assert len(_compact.optimizer(net, 0.1, 0.2).param_groups) == 1
    _compact.vd.convert_(net, _compact.posterior({"sharing": "neuron", "unit": "output"}))
    groups = _compact.optimizer(net, 0.1, 0.2).param_groups
    assert [(group["lr"], len(group["params"])) for group in groups] == [(0.1, 2), (0.2, 1)]


def test_a_pass_in_onnxruntime_computes_what_torch_does() -> None:
    net, x = _compact.mlp(4, (5, 3)).eval(), torch.randn(3, 1, 4, 4)
    (made,) = _onnx.forward(net, x)()
    torch.testing.assert_close(torch.from_numpy(made), net(x))


def test_the_first_word_of_a_name_is_its_kind() -> None:
    def kind(name: str, *size: int) -> nn.Module:
        return _compact.network({"network": name, "side": 28, "size": size})

    linear = [layer for layer in kind("MLP of 7", 7, 5, 3) if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(784, 7), (7, 5), (5, 3), (3, 10)]
    assert isinstance(kind("transformer of 8", 2, 8, 1, 2, 16), _compact.BandEncoder)
    assert any(isinstance(module, nn.BatchNorm2d) for module in kind("ResNet of 4", 1, 4).modules())


def test_what_collapsed_is_not_drawn_and_counted() -> None:
    rows = [*time_rows(0.1, 0.4, (1.0, 0.4)), *time_rows(0.2, 1e-6, (0.2, 0.1))]
    drawn = compact.figure([result(rows)], [])
    assert drawn.get_suptitle().endswith("; not drawn: 1 that collapsed, with less than 1% left")
    assert [len(points.get_offsets()) for points in drawn.axes[0].collections] == [1, 1]  # hollow and full
