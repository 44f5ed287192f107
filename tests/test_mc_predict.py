"""Monte Carlo prediction: the right law on both engines, one answer for a seed, nothing left behind, nothing silent."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vardrop as vd
from vardrop.prediction import progress, seeds
from vardrop.prediction.engine import Engine, Refused
from vardrop.prediction.structure import moved

ENGINES = ["vmap", "loop"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_net(rate: float = 0.3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Dropout(rate), nn.Linear(6, 3)).double()


def classifier() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)).eval()


X = torch.randn(7, 5, generator=generator(9))


# ------------------------------------------------------------------------------------------------------- the law


@pytest.mark.parametrize("engine", ENGINES)
def test_moments_of_a_linear_net_are_the_closed_form(engine: str) -> None:
    """Var y_k = α Σ_j w_kj² x_j² behind dropout, and independent from example to example."""
    net, p, passes = linear_net(), 0.3, 4000
    x = torch.randn(5, 6, generator=generator(), dtype=torch.float64)
    found = vd.mc_predict(net, x, passes, engine=engine, generator=generator(3))
    mean, truth = net[1](x).detach(), p / (1 - p) * x.square() @ net[1].weight.detach().square().T
    assert found.samples is not None
    fourth = (found.samples - mean).pow(4).mean(0)
    assert ((found.mean - mean).abs() / (truth / passes).sqrt()).max() < 4.5
    assert ((found.variance - truth).abs() / ((fourth - truth.square()) / passes).sqrt()).max() < 4.5
    centred = (found.samples - mean)[..., 0] / truth[:, 0].sqrt()
    between = (centred.T @ centred / passes)[~torch.eye(5, dtype=torch.bool)]
    assert between.abs().max() < 4.5 / math.sqrt(passes)


def test_passes_are_independent_of_each_other_over_chunks() -> None:
    found = vd.mc_predict(linear_net(), torch.ones(1, 6).double(), 3000, chunk=7, generator=generator())
    assert found.samples is not None
    for lag in (1, 7):
        series = found.samples[:, 0, 0] - found.mean[0, 0]
        assert abs((series[lag:] * series[:-lag]).mean() / found.variance[0, 0]) < 4.5 / math.sqrt(3000)


@given(st.integers(1, 4), st.integers(2, 9), st.integers(1, 10), st.booleans(), st.sampled_from(ENGINES))
@settings(max_examples=30, deadline=None)
def test_shapes(examples: int, samples: int, chunk: int, keep: bool, engine: str) -> None:
    net = classifier()
    found = vd.mc_predict(net, X[:examples], samples, outputs="logits", chunk=chunk, keep=keep, engine=engine)
    assert found.mean.shape == found.variance.shape == found.probabilities.shape == (examples, 4)
    assert found.mutual_information.shape == found.predicted.shape == found.variation_ratio.shape == (examples,)
    assert (found.samples.shape == (samples, examples, 4)) if keep else found.samples is None
    assert found.chunk <= chunk
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(examples))


def test_maps_of_classes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Dropout2d(0.5), nn.Conv2d(8, 5, 1))
    found = vd.mc_predict(net, torch.randn(2, 3, 6, 7), 9, outputs="logits")
    assert found.probabilities.shape == (2, 5, 6, 7)
    assert found.mutual_information.shape == found.predicted.shape == (2, 6, 7)
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(2, 6, 7))


def test_random_weights_and_half_precision() -> None:
    net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 4))
    vd.convert_(net, vd.VariationalDropout(type="B", sharing="weight"))
    for model, x in ((net, X), (copy.deepcopy(net).bfloat16(), X.bfloat16())):
        found = vd.mc_predict(model, x, 10, outputs="logits")
        assert found.engine == "vmap"
        assert found.mean.dtype == torch.float32
        assert (found.std > 0).any()


# --------------------------------------------------------------------------------------------------- repeatability


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("x", [X, [X, X[:3]]], ids=["batch", "batches"])
def test_a_seed_has_one_answer_whatever_is_kept(engine: str, x: Any) -> None:
    net = classifier()
    call: Callable[..., vd.Prediction] = lambda **more: vd.mc_predict(net, x, 12, engine=engine, **more)  # noqa: E731
    one, two = call(generator=generator(5)), call(generator=generator(5))
    assert torch.equal(one.samples, two.samples)
    assert torch.equal(one.mean, call(generator=generator(5), keep=False).mean)
    assert not torch.equal(one.samples, call(generator=generator(6)).samples)
    source = generator(5)
    first, second = call(generator=source), call(generator=source)
    assert torch.equal(first.samples, one.samples)
    assert not torch.equal(second.samples, one.samples)


@pytest.mark.parametrize("engine", ENGINES)
def test_torchs_own_generator_gives_one_number_and_is_otherwise_left_alone(engine: str) -> None:
    net = classifier()
    torch.manual_seed(3)
    one = vd.mc_predict(net, X, 10, engine=engine)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    two = vd.mc_predict(net, X, 50, engine=engine)
    assert torch.equal(torch.get_rng_state(), after)
    three = vd.mc_predict(net, X, 10, engine=engine)
    torch.manual_seed(3)
    assert torch.equal(vd.mc_predict(net, X, 10, engine=engine).samples, one.samples)
    assert not torch.equal(one.samples, three.samples)
    assert two.passes == 50


def test_falling_back_gives_what_the_loop_gives() -> None:
    net = Branches()
    auto = vd.mc_predict(net, X, 10, generator=generator())
    assert torch.equal(auto.samples, vd.mc_predict(net, X, 10, engine="loop", generator=generator()).samples)


# --------------------------------------------------------------------------------------------------- left behind


class Fails(nn.Module):
    """Breaks in the third call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = classifier(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 2:
            raise LookupError("no third time")
        return self.inner(x)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("broken", [False, True])
def test_everything_is_as_it_was(engine: str, broken: bool) -> None:
    net = Fails() if broken else nn.Sequential(classifier(), nn.BatchNorm1d(4))
    net.train()
    flags = {module: module.training for module in net.modules()}
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x, source = X.clone().requires_grad_(), generator()
    rng, slow, grad = torch.get_rng_state(), torch._C._functorch._is_vmap_fallback_enabled(), torch.is_grad_enabled()
    if broken:
        with pytest.raises((LookupError, RuntimeError), match="no third time"):
            vd.mc_predict(net, x, 10, engine=engine, chunk=2, generator=source)
    else:
        found = vd.mc_predict(net, x, 10, engine=engine, generator=source)
        assert not found.mean.requires_grad
    assert torch.equal(torch.get_rng_state(), rng)
    assert {module: module.training for module in net.modules()} == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert x.grad is None
    assert all(p.grad is None for p in net.parameters())
    assert torch._C._functorch._is_vmap_fallback_enabled() == slow
    assert torch.is_grad_enabled() == grad
    assert torch.overrides._len_torch_function_stack() == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("engine", ENGINES)
def test_it_may_be_called_without_gradients(mode: Callable[[], Any], engine: str) -> None:
    net = classifier()
    with mode():
        inputs = X * 1
        found = vd.mc_predict(net, inputs, 10, engine=engine, chunk=3)
    assert (found.std > 0).any()
    assert not found.mean.is_inference()


# ------------------------------------------------------------------------------------------------------ the engine


class Branches(nn.Module):
    """What it computes depends on its noise."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.linear(x), 0.5)
        return 2 * h if h.sum().item() > 0 else h


class Rolls(nn.Module):
    """Depth by Python's random numbers, beside dropout."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.linear, self.draw = nn.Linear(5, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.linear(x), 0.5)
        return h + 100 if self.draw() < 0.5 else h


def test_vmap_refuses_and_the_loop_tells_why() -> None:
    found = vd.mc_predict(Branches(), X, 10)
    assert (found.engine, found.chunk) == ("loop", 1)
    assert "vmap refused" in found.reason
    assert ".item()" in found.reason
    assert found.reason in repr(found)
    with pytest.raises(RuntimeError, match=r"must be able to run the model, but vmap refused .*; use engine='auto'"):
        vd.mc_predict(Branches(), X, 10, engine="vmap")
    assert vd.mc_predict(classifier(), X, 10, engine="loop").reason == "it was asked for"
    assert vd.mc_predict(classifier(), X, 10).reason == ""


def test_noise_that_is_not_torchs_is_drawn_for_every_pass() -> None:
    numpy = pytest.importorskip("numpy")
    random.seed(0)
    numpy.random.seed(0)
    for draw in (random.random, numpy.random.random):
        found = vd.mc_predict(Rolls(draw), X, 40)
        assert found.engine == "loop"
        assert "Python's or numpy's random numbers" in found.reason
        assert found.samples is not None
        assert 0.2 < (found.samples.mean((1, 2)) > 50).float().mean() < 0.8


def test_code_of_others_is_seen_wherever_it_is() -> None:
    def rolls(*_: object) -> None:
        random.random()

    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5))

    class Mine(nn.Linear):
        pass

    hooked, before, written, ours = net(), net(), net(), net()
    hooked[0].register_forward_hook(rolls)
    before[0].register_forward_pre_hook(rolls)
    written[0].forward = lambda x: rolls() or F.linear(x, written[0].weight)  # type: ignore[method-assign]
    vd.convert_(ours, vd.VariationalDropout())
    for model in (hooked, before, written):
        assert vd.mc_predict(model, X, 10).engine == "loop"
        assert vd.mc_predict(model, X, 10, engine="loop").passes == 10
    assert seeds.may_be_foreign(nn.Sequential(Mine(2, 2)))
    assert not seeds.may_be_foreign(net())
    assert not seeds.may_be_foreign(ours)
    handle = nn.modules.module.register_module_forward_hook(rolls)
    try:
        assert vd.mc_predict(net(), X, 10).engine == "loop"
    finally:
        handle.remove()
    assert vd.mc_predict(net(), X, 10).engine == "vmap"


def test_recurrent_dropout_runs_at_once_and_varies() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(5, 8, 2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0][:, -1]

    found = vd.mc_predict(Last(), X.unsqueeze(1), 10)
    assert found.engine == "vmap"
    assert (found.std > 0).all()


def test_compiled_models_run_as_they_were_written() -> None:
    net = classifier()
    with torch.no_grad():
        plain = vd.mc_predict(net, X, 10, generator=generator())
    compiled = torch.compile(net, backend="eager")
    assert torch.equal(vd.mc_predict(compiled, X, 10, generator=generator()).samples, plain.samples)


def test_too_little_memory_halves_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    at_once = Engine._at_once

    def limited(self: Engine, count: int, *args: Any) -> Any:
        counts.append(count)
        if count > 5:
            raise torch.OutOfMemoryError("full")
        return at_once(self, count, *args)

    monkeypatch.setattr(Engine, "_at_once", limited)
    found = vd.mc_predict(classifier(), X, 20)
    assert (found.engine, found.passes, found.chunk) == ("vmap", 20, 5)
    assert found.samples is not None
    assert len(found.samples) == 20
    assert counts == [20, 10, 5, 5, 5, 5]
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        vd.mc_predict(classifier(), X, 20, chunk=10)


def test_refused_is_what_vmap_could_not_do() -> None:
    engine = Engine(Branches(), None, "vmap", None, None)
    with pytest.raises(Refused, match="vmap refused"), torch.no_grad(), vd.stochastic(engine.model):
        engine.run(vd.prediction.structure.Call((X,), {}), 4, lambda piece: None)


# ---------------------------------------------------------------------------------------------------------- inputs


def test_a_loader_gives_what_one_batch_gives() -> None:
    net, y = linear_net(), torch.arange(40)
    x = torch.randn(40, 6, generator=generator(), dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, y), batch_size=16)  # the last batch is a part of one
    passes = 1500
    whole = vd.mc_predict(net, x, passes, generator=generator(1))
    batches = vd.mc_predict(net, loader, passes, generator=generator(2))
    assert batches.mean.shape == whole.mean.shape == (40, 3)
    assert batches.samples is not None
    assert batches.samples.shape == (passes, 40, 3)
    z = (whole.mean - batches.mean) / ((whole.variance + batches.variance) / passes).sqrt()
    assert z.abs().max() < 5
    kinds: list[Any] = [list(x.split(16)), (batch for batch in x.split(16)), [(batch, 0) for batch in x.split(16)]]
    for kind in kinds:
        other = vd.mc_predict(net, kind, passes, generator=generator(2))
        assert torch.equal(other.mean, batches.mean)


def test_arguments_by_place_and_by_name() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return F.dropout(x, 0.5) + shift

    shift = torch.full((7, 5), 10.0)
    one = vd.mc_predict(Two(), (X, shift), 10, generator=generator())
    two = vd.mc_predict(Two(), {"x": X, "shift": shift}, 10, generator=generator())
    batches = vd.mc_predict(Two(), [{"x": X, "shift": shift, "labels": 3}], 10, generator=generator())
    assert torch.equal(one.samples, two.samples)
    assert torch.equal(one.samples, batches.samples)
    assert one.mean.mean() > 5


@pytest.mark.parametrize("engine", ENGINES)
def test_empty_batches(engine: str) -> None:
    net = classifier()
    assert vd.mc_predict(net, X[:0], 4, outputs="logits", engine=engine).probabilities.shape == (0, 4)
    assert vd.mc_predict(net, [X, X[:0], X[:2]], 4, engine=engine).mean.shape == (9, 4)


def test_bad_arguments() -> None:
    net = classifier()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"samples": 1}, ValueError, "2 or more, got 1; one pass has no spread, and is made by calling the model"),
        ({"samples": 2.0}, ValueError, "samples must be a whole number of passes"),
        ({"outputs": "scores"}, ValueError, "outputs must be one of logits, .* or None, got 'scores'"),
        ({"engine": "fast"}, ValueError, "engine must be one of auto, vmap, loop, got 'fast'"),
        ({"chunk": 0}, ValueError, "chunk must be a positive whole number or None, got 0"),
        ({"max_memory": -1}, ValueError, "max_memory must be a positive whole number or None, got -1"),
        ({"x": []}, ValueError, "x must have a batch, got an iterable without any"),
        ({"x": [()]}, ValueError, r"a batch must have an input, got an empty tuple; give \(input, ...\)"),
        ({"model": len}, TypeError, "model must be a torch.nn.Module, got builtin_function_or_method"),
    ]
    for arguments, kind, words in cases:
        with pytest.raises(kind, match=words):
            vd.mc_predict(**{"model": net, "x": X, **arguments})


# --------------------------------------------------------------------------------------------------------- outputs


class Several(nn.Module):
    """An output with a structure: ``make`` gets the noisy and the plain tensor."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.dropout, self.make = nn.Linear(5, 3), nn.Dropout(0.5), make

    def forward(self, x: Tensor) -> Any:
        h = self.linear(x)
        return self.make(self.dropout(h), h)


@pytest.mark.parametrize("engine", ENGINES)
def test_other_outputs_are_predictions_too(engine: str) -> None:
    net = Several(lambda noisy, plain: {"logits": noisy, "states": (plain, None, noisy.sum(1)), "loss": noisy.sum()})
    found = vd.mc_predict(net, X, 20, outputs="logits", engine=engine)
    assert found.name == "logits"
    assert list(found.outputs) == ["states.0", "states.2", "loss"]
    assert (found.outputs["states.0"].variance == 0).all()
    assert found.outputs["states.2"].mean.shape == (7,)
    assert found.outputs["loss"].mean.shape == ()
    several = vd.mc_predict(net, [X, X], 20, outputs="logits", engine=engine)
    assert list(several.outputs) == ["states.0", "states.2"]
    assert "first axis is not that of the examples" in several.left_off["loss"]


def test_select() -> None:
    net = Several(lambda noisy, plain: (plain, [noisy, noisy + 1]))
    for select in ("1.0", lambda output: output[1][0]):
        assert vd.mc_predict(net, X, 10, select=select).mean.shape == (7, 3)
    words = r"one tensor, or one called logits, got tuple with 0, 1\.0, 1\.1; say which with select="
    with pytest.raises(ValueError, match=words):
        vd.mc_predict(net, X, 10)
    with pytest.raises(ValueError, match=r"select must name a tensor of the output \(0, 1\.0, 1\.1\), got 'logits'"):
        vd.mc_predict(net, X, 10, select="logits")
    with pytest.raises(TypeError, match="select must return a tensor, got list"):
        vd.mc_predict(net, X, 10, select=lambda output: output[1])
    with pytest.raises(RuntimeError, match="does not reach this output; choose an output behind the noise with select"):
        vd.mc_predict(net, X, 10, select=0)


def test_outputs_of_transformers() -> None:
    pytest.importorskip("transformers")
    from tests import architectures

    net, (tokens,) = architectures.bert()
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    found = vd.mc_predict(net.eval(), batch, 10, outputs="logits")
    assert (found.name, found.engine) == ("logits", "vmap")
    assert (found.std > 0).all()
    with_labels = [{**batch, "labels": torch.zeros(len(tokens), dtype=torch.long)}] * 2
    assert len(vd.mc_predict(net, with_labels, 10, outputs="logits")) == 2 * len(tokens)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_that_do_not_vary_are_refused_with_the_cause(engine: str) -> None:
    plain = nn.Linear(5, 3)
    constant = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3), nn.Threshold(1e9, 1.0))
    dead = Several(lambda noisy, plain: plain)
    cases: list[tuple[nn.Module, str]] = [
        (plain, r"no noise was found in the model; give it dropout \(vd.layers\), or random weights"),
        (nn.Sequential(plain, nn.Dropout(0.0)), r"the rate of all noise is 0 \(1\); set the rates that it was trained"),
        (constant, r"got 20 equal passes: either nothing of the noise \(0\) reaches the output, or what follows"),
        (dead, "vary between passes, .*dropout"),
    ]
    for net, words in cases:
        with pytest.raises(RuntimeError, match=words):
            vd.mc_predict(net, X, 20, engine=engine)


def test_noise_that_is_left_off_is_named() -> None:
    net = nn.Sequential(nn.Linear(5, 3))
    vd.convert_(net, vd.VariationalDropout())
    with vd.estimator("none"), pytest.raises(RuntimeError, match="0 was left off: its weights are at their means"):
        vd.mc_predict(net, X, 10)


def test_an_output_that_does_not_vary_is_known_after_a_pass_or_two() -> None:
    calls: list[int] = []
    net = Several(lambda noisy, plain: plain)
    net.register_forward_hook(lambda *_: calls.append(1))
    for engine, count in (("vmap", 1), ("loop", 100)):
        calls.clear()
        with pytest.raises(RuntimeError, match="must vary between passes"):
            vd.mc_predict(net, X, 100, engine=engine)
        assert len(calls) == count
    calls.clear()
    still = nn.Linear(5, 3)
    still.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(RuntimeError, match="must vary between passes"):
        vd.mc_predict(still, X, 100, engine="loop")
    assert len(calls) == 2  # nothing random has run


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_must_be_numbers_with_examples(engine: str) -> None:
    x = X.clone()
    x[2, 0] = torch.nan
    with pytest.raises(ValueError, match=r"outputs must be numbers, got nan for 1 of 7 examples; look at the inputs"):
        vd.mc_predict(classifier(), x, 10, engine=engine)
    with pytest.raises(ValueError, match="examples on its first axis, got a tensor without axes"):
        vd.mc_predict(Several(lambda noisy, plain: noisy.sum()), X, 10, engine=engine)
    with pytest.raises(TypeError, match=r"must be floating point, got torch\.int64; let the model return its scores"):
        vd.mc_predict(Several(lambda noisy, plain: noisy.argmax(1)), X, 10, engine=engine)


# ---------------------------------------------------------------------------------------------------------- progress


def test_a_bar_that_is_asked_for_counts_all_passes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    bar = progress.Bar(True, True, [1, 2], 10)
    with bar:
        bar.advance(10)
        assert bar.bar.tasks[0].completed == 10
        assert bar.bar.tasks[0].total == 20
    vd.mc_predict(classifier(), [X, X], 10, progress=True)
    assert capsys.readouterr().out == ""


def test_nobody_is_shown_a_bar_without_long_work_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not progress.Bar(None, True, [1], 10).wanted  # tests have no terminal
    assert not progress.Bar(False, True, [1], 10).wanted
    stream = progress.Bar(True, True, iter([1]), 10)
    assert stream.total is None
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    with stream:
        stream.advance(1)
        assert stream.bar is None


def test_seeds_are_lent() -> None:
    before = torch.get_rng_state()
    with seeds.lent([]):
        seeds.sow(4, [])
        one = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with seeds.lent([]):
        seeds.sow(4, [])
        assert torch.equal(torch.rand(3), one)


# ---------------------------------------------------------------------------------------------------------- devices


def test_everything_in_a_batch_goes_to_the_device() -> None:
    Pair = NamedTuple("Pair", [("x", Any), ("more", Any)])  # noqa: UP014 - it is of this test
    x = torch.ones(2, 3)
    batch = Pair(x, {"a": [x, (x, "word")], "b": None})
    there = moved(batch, "meta")
    assert isinstance(there, Pair)
    assert [t.device.type for t in (there.x, there.more["a"][0], there.more["a"][1][0])] == ["meta"] * 3
    assert (there.more["a"][1][1], there.more["b"]) == ("word", None)


class Homeless(nn.Module):
    """A model that notes where its input is, and has something on two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(3, 2), nn.Linear(3, 2, device="meta")
        self.seen: set[str] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(x.device.type)
        return F.dropout(self.first(x.new_ones(2, 3, device="cpu")), 0.5, self.training)


def test_batches_go_where_they_are_asked_to() -> None:
    for device, place in ((None, "cpu"), ("cpu", "cpu"), (torch.device("cpu"), "cpu"), ("meta", "meta")):
        model = Homeless()
        prediction = vd.mc_predict(model, [torch.ones(2, 3)], samples=4, engine="loop", device=device)
        assert model.seen == {place}
        assert prediction.mean.device.type == "cpu"


def test_a_device_where_the_model_is_not() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    words = r"device must be where the model is, cpu, got meta; move the model first, with model.to\('meta'\)"
    with pytest.raises(ValueError, match=words):
        vd.mc_predict(net, torch.ones(2, 3), device="meta")


def test_a_prediction_goes_to_another_device_whole() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": F.dropout(x, 0.5, self.training), "hidden": x}

    prediction = vd.mc_predict(Two(), torch.randn(4, 3), samples=5, outputs="logits")
    there = prediction.to("meta")
    assert {t.device.type for t in (there.mean, there.samples, there.mutual_information)} == {"meta"}
    assert there.outputs["hidden"].mean.device.type == "meta"
    assert (there.passes, there.engine, there.sources) == (prediction.passes, prediction.engine, prediction.sources)
    assert prediction.mean.device.type == "cpu"


# ------------------------------------------------------------------------------------- forwards that write to inputs


class Halves(nn.Module):
    """Writes to what it is given, as careless code does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return self.inner(x)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("careless", ["first", "flattened", "halves"])
def test_a_forward_that_writes_to_its_input_sees_the_input_in_every_pass(careless: str, engine: str) -> None:
    torch.manual_seed(0)
    head, x = nn.Linear(8, 2), torch.randn(4, 8)
    kept = x.clone()
    careful = nn.Sequential(nn.Dropout(0.5), head)
    model = {
        "first": nn.Sequential(nn.Dropout(0.5, inplace=True), head),
        "flattened": nn.Sequential(nn.Flatten(), nn.Dropout(0.5, inplace=True), head),
        "halves": Halves(careful),
    }[careless]
    got = vd.mc_predict(model, x, samples=3000, engine=engine)
    wanted = vd.mc_predict(careful, kept / 2 if careless == "halves" else kept, samples=3000)
    assert torch.equal(x, kept)
    error = (wanted.variance / 3000 * 2).sqrt()
    assert ((got.mean - wanted.mean) / error).abs().max() < 5
    torch.testing.assert_close(got.std, wanted.std, rtol=0.1, atol=0)


class Jitter(nn.Module):
    """Noise that is never 0, so that what comes behind it differs from pass to pass."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.randn_like(x)


@pytest.mark.parametrize("shape", ["contiguous", "channels last", "noisy already"])
@pytest.mark.parametrize(("kind", "units"), [(nn.Dropout, 1), (nn.Dropout2d, 30)])
def test_masks_are_drawn_for_all_passes_at_once(kind: Callable[[float], nn.Module], units: int, shape: str) -> None:
    """Outside of vmap as inside of it: the law, and which dimensions share a draw."""
    x = torch.ones(3, 4, 5, 6)
    x = x.contiguous(memory_format=torch.channels_last) if shape == "channels last" else x
    model = nn.Sequential(Jitter(), kind(0.25)) if shape == "noisy already" else kind(0.25)
    found = vd.mc_predict(model, x, 400, generator=generator())
    assert found.engine == "vmap"
    assert found.samples is not None
    zero = found.samples == 0
    maps = zero.flatten(3)
    assert bool((maps.all(-1) | ~maps.any(-1)).all()) == (units > 1)
    error = math.sqrt(0.25 * 0.75 / (zero.numel() / units))
    assert abs(zero.double().mean() - 0.25) < 5 * error
    assert not torch.equal(zero[0], zero[1])


class Seen(Tensor):
    """A tensor with functions of its own, as data sets may give."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Seen.calls += func is torch.mul
        return super().__torch_function__(func, types, args, kwargs or {})


def test_code_of_others_runs_with_functions_of_its_own() -> None:
    """In the loader and in select, as everywhere."""

    def batches() -> Iterator[Tensor]:
        for _ in range(2):
            yield torch.mul(X.as_subclass(Seen), 1).as_subclass(Tensor)

    def chosen(output: Tensor) -> Tensor:
        torch.mul(X.as_subclass(Seen), 1)
        return output

    Seen.calls = 0
    vd.mc_predict(classifier(), batches(), 4, select=chosen, engine="loop")
    assert Seen.calls == 2 + 2 * 4


class Own(nn.Module):
    """Dropout, and noise from a generator of its own, which is not torch's."""

    def __init__(self, rng: Any, p: float) -> None:
        super().__init__()
        self.rng, self.linear, self.dropout = rng, nn.Linear(5, 3), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear(x)) + 100 * self.rng.random()


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_generators_that_a_module_has_are_seen(p: float) -> None:
    """One draw for all passes at once would be no noise at all, and no error."""
    numpy = pytest.importorskip("numpy")
    for rng in (random.Random(0), numpy.random.default_rng(0), numpy.random.RandomState(0)):
        found = vd.mc_predict(Own(rng, p), X, 60)
        assert found.engine == "loop"
        assert "Python's or numpy's random numbers" in found.reason
        assert 20 < found.std.mean() < 40  # 100 / sqrt(12)


class Counts(nn.Module):
    """Noise, and a count of steps that hangs on the same flag."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop_rate, self.steps = nn.Linear(5, 3), 0.5, 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.training:
            self.steps += 1
            x = x * (torch.rand_like(x) > self.drop_rate)
        return x


def test_noise_that_stayed_off_is_told_with_the_answer() -> None:
    found = vd.mc_predict(nn.Sequential(Counts(), nn.Dropout(0.01)), X, 200)
    assert list(found.noise_left_off) == ["0"]
    assert "noise left off: 0: it is not known as noise" in repr(found)
    many = vd.mc_predict(
        nn.Sequential(*[nn.Sequential(Counts(), nn.Linear(3, 5)) for _ in range(6)], nn.Dropout(0.3)), X
    )
    assert repr(many).count("noise left off") == 5
    assert "noise left off: 2 more" in repr(many)
    assert vd.mc_predict(classifier(), X, 10).noise_left_off == {}


def test_threads_take_turns() -> None:
    """Two models, two generators: each thread has the answer that it would have had alone."""
    nets = [nn.Sequential(nn.Linear(5, 200), nn.Dropout(0.5), nn.Linear(200, 2)) for _ in range(2)]

    def predict(net: nn.Module) -> Tensor:
        return vd.mc_predict(net, X, 100, engine="loop", generator=torch.Generator().manual_seed(1)).mean

    alone, before = [predict(net) for net in nets], torch.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(predict, nets))
    for one, other in zip(alone, together, strict=True):  # products of another thread may be summed in another order
        torch.testing.assert_close(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_no_model_or_no_input_is_refused() -> None:
    numpy = pytest.importorskip("numpy")
    with pytest.raises(TypeError, match=r"model must be one network, got an Ensemble, .*; use ensemble.predict\(x\)"):
        vd.mc_predict(vd.Ensemble(classifier(), 3), X)
    with pytest.raises(
        TypeError, match=r"vardrop.mc_predict: x must be a tensor, .*, got a ndarray; write torch.as_tens"
    ):
        vd.mc_predict(classifier(), numpy.zeros((3, 5)))
    with pytest.raises(TypeError, match=r"vardrop.Ensemble.predict: x must be a tensor, .*, got a str"):
        vd.Ensemble(classifier(), 3).predict("x")
    with pytest.raises(ValueError, match="chunk must be a positive whole number or None, got True"):
        vd.mc_predict(classifier(), X, chunk=True)
    lazy = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.Dropout())
    with pytest.raises(RuntimeError, match="must know its shapes, got the lazy '1'; run a forward first"):
        vd.mc_predict(lazy, X)


def test_packed_sequences_are_one_input() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 6, 4), [6, 4, 2], batch_first=True)
    found = vd.mc_predict(nn.LSTM(4, 5, 2, dropout=0.5, batch_first=True), packed, 20, select="0.data")
    assert found.mean.shape == (12, 5)
