"""All noise on, all else off: every way in which dropout at prediction time silently stays off, or does too much."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

import vardrop as vd
from tests.layer_contract import LAYERS, Layer
from vardrop.prediction import noise_mode
from vardrop.prediction.noise_functions import attention

Mode = Callable[[], torch.autograd.grad_mode._DecoratorContextManager]
MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]
State = tuple[dict[str, bool], dict[str, Tensor]]


def state(model: nn.Module) -> State:
    """Flags and buffers."""
    flags = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    return flags, {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same_state(model: nn.Module, before: State) -> None:
    flags, buffers = state(model)
    assert flags == before[0]
    assert buffers.keys() == before[1].keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, before[1][name]), name


def run(model: nn.Module, *inputs: Tensor) -> Tensor:
    output = model(*inputs)
    return output if isinstance(output, Tensor) else output[0]


def varies(model: nn.Module, *inputs: Tensor) -> bool:
    return not torch.equal(run(model, *inputs), run(model, *inputs))


class Functional(nn.Module):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


class Attention(nn.Module):
    """Causal attention as nanoGPT writes it."""

    def __init__(self, rate: float = 0.4) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.dropout = rate

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(*x.shape[:2], 2, 12).transpose(1, 2).split(4, -1)
        rate = self.dropout if self.training else 0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=rate, is_causal=True)


class WithPadding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, -1] = True
        with warnings.catch_warnings(action="ignore"):  # the nested tensors of evaluation are a prototype
            return self.encoder(x, src_key_padding_mask=padding)


class GaussianNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return x


def encoder_layer(p: float = 0.5) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=p, batch_first=True)


def converted_out_proj() -> nn.Module:
    layer = encoder_layer(0.0)
    vd.convert_(layer, vd.VariationalDropout(rate=0.4), where="*out_proj")
    return layer


def converted(plain: nn.Module, config: object = None) -> nn.Module:
    vd.convert_(plain, config or vd.VariationalDropout(type="B", rate=0.4))
    return plain


class SelfAttention(nn.MultiheadAttention):
    def __init__(self, fused: bool) -> None:
        super().__init__(8, 2, dropout=0.5, batch_first=True)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=not self.fused)[0]


TRAPS: dict[str, Callable[[], nn.Module]] = {
    "encoder-layer": encoder_layer,
    "encoder": lambda: nn.TransformerEncoder(encoder_layer(), 2),
    "encoder-with-padding": WithPadding,
    "decoder-layer": lambda: Twice(nn.TransformerDecoderLayer(8, 2, 16, dropout=0.5, batch_first=True)),
    "mha": lambda: SelfAttention(fused=False),
    "mha-fused": lambda: SelfAttention(fused=True),
    "lstm": lambda: nn.LSTM(8, 4, 2, dropout=0.5),
    "gru": lambda: nn.GRU(8, 4, 2, dropout=0.5),
    "functional": Functional,
    "sdpa": Attention,
    "converted-out-proj": converted_out_proj,
    "converted-layer": lambda: converted(encoder_layer(0.0)),
    "converted-lstm": lambda: converted(nn.LSTM(8, 4, 2)),
    "type-a": lambda: converted(nn.Linear(8, 4), vd.VariationalDropout(type="A", rate=0.4)),
    "mean-field": lambda: converted(nn.Linear(8, 4), vd.GaussianPosterior()),
    "sparse": lambda: converted(nn.Linear(8, 4), vd.SparseVariationalDropout()),
    "fixed": lambda: converted(nn.Linear(8, 4), vd.GaussianDropout(rate=0.3)),
    "bare": lambda: nn.Dropout(0.5),
    "alpha": lambda: nn.AlphaDropout(0.5),
    "feature-alpha": lambda: nn.FeatureAlphaDropout(0.5),
    "channels": lambda: nn.Dropout1d(0.5),
    "rrelu": nn.RReLU,
    "own-noise": GaussianNoise,
    "in-place": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5, inplace=True)),
    "data-parallel": lambda: nn.DataParallel(nn.Sequential(nn.Linear(8, 8), Functional())),
}


class Twice(nn.Module):
    """Gives a decoder its input as the memory too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("name", TRAPS)
def test_passes_vary_inside_and_are_what_they_were_outside(name: str, mode: Mode) -> None:
    torch.manual_seed(0)
    model = TRAPS[name]().eval()
    x = torch.randn(4, 5, 8)
    before = state(model)
    with mode():
        plain = run(model, x)
        with vd.stochastic(model) as noise:
            assert noise.sources
            assert noise.left_off == {}
            assert varies(model, x)
        assert torch.equal(run(model, x), plain)
    assert noise.put_back == []
    assert_same_state(model, before)


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_every_layer_of_ours_is_on(layer: Layer) -> None:
    module = layer.make(0.5).eval()
    x = torch.ones(layer.shape)
    with vd.stochastic(module) as noise:
        assert [source.rate for source in noise.sources] == [0.5]
        assert not torch.equal(layer.run(module, x), layer.run(module, x))
    assert not module.training


def test_layers_that_wrap_others_leave_what_is_inside_in_evaluation() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    for wrapper in (vd.layers.StochasticDepth(block, 0.5), vd.layers.LayerDrop([block, block], 0.5)):
        wrapper.eval()
        before = state(wrapper)
        with vd.stochastic(wrapper):
            assert not block[1].training
            results = {tuple(wrapper(torch.ones(1, 4)).flatten().tolist()) for _ in range(20)}
        assert len(results) > 1
        assert_same_state(wrapper, before)
    for wrapped in (
        vd.layers.ConcreteDropout(vd.rates.learned(0.5), nn.Linear(4, 4)),
        vd.layers.DropConnect(0.5, nn.Linear(4, 4)),
    ):
        with vd.stochastic(wrapped.eval()):
            assert varies(wrapped, torch.ones(2, 4))


# ------------------------------------------------------------------------------------------- what must not be switched


@pytest.mark.parametrize("was_training", [False, True])
def test_buffers_of_batch_norm_keep_their_bits(was_training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.5), nn.Flatten())
    model.train()(torch.randn(8, 3, 6, 6))
    model.train(was_training)
    before = state(model)
    with vd.stochastic(model) as noise:
        assert not model[1].training
        assert varies(model, torch.randn(4, 3, 6, 6))
    assert noise.put_back == []
    assert_same_state(model, before)


def test_frozen_parts_of_a_model_in_training_are_frozen_afterwards() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    before = state(model)
    with vd.stochastic(model):
        assert [module.training for module in model.modules()] == [False, False, False, True]
    assert_same_state(model, before)


class CustomNorm(nn.Module):
    """Dropout and batch norm in one forward, both of them functional."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.mean, self.var, training=self.training)
        x = F.instance_norm(x, self.mean, self.var, use_input_stats=self.training)
        return F.dropout(x, 0.5, training=self.training)


def test_functional_norms_keep_to_their_running_statistics() -> None:
    model = CustomNorm().eval()
    x = 3 + torch.randn(64, 4, 5)
    kept = model(x)
    with vd.stochastic(model) as noise:
        assert model.training
        y = model(x)
        assert varies(model, x)
    assert torch.allclose(y[y != 0], 2 * kept[y != 0])
    assert noise.put_back == []


class Counting(nn.Module):
    """Noise that keeps a book, behind the back of the code that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))
        self.register_buffer("moved", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        note(self, x)
        return F.dropout(x, 0.5, self.training)


def note(module: Counting, x: Tensor) -> None:
    module.calls += 1
    module.last = x.detach()[:2]


@pytest.mark.parametrize("mode", MODES[:2], ids=lambda mode: mode.__name__)
def test_buffers_that_change_anyway_are_put_back_and_named(mode: Mode) -> None:
    model = nn.Sequential(Counting()).eval()
    with mode():
        model(torch.ones(2))
    last, before = model[0].last, state(model)
    with vd.stochastic(model) as noise, mode():
        model(torch.randn(2))
        model[0].moved = torch.zeros(3)
    assert noise.put_back == ["0"]
    assert "buffers put back: 0" in str(noise)
    assert model[0].last is last
    assert model[0].moved.shape == (3,)  # somebody meant it
    model[0].moved = torch.zeros(1)
    assert_same_state(model, before)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.5
        self.attention = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.drop(F.dropout(x, self.rate, self.training))
        return (x, x.mean()) if self.training else x


def test_outputs_of_training_stay_away() -> None:
    model = Auxiliary().eval()
    with vd.stochastic(model) as noise:
        assert not model.training
        assert isinstance(model(torch.ones(3)), Tensor)
        assert [source.kind for source in noise.sources] == ["functional dropout", "Dropout"]
        model.drop.p = 0.0
        assert varies(model, torch.ones(50))


class Mixed(Attention):
    """Attention whose dropout hangs on a flag that something else hangs on too."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training:
            y = y.relu()
        return y


def test_noise_that_cannot_be_had_alone_is_left_off_and_named() -> None:
    model = nn.Sequential(Mixed()).eval()
    with vd.stochastic(model) as noise:
        assert not varies(model, torch.randn(2, 3, 8))
    assert noise.sources == []
    assert noise.left_off == {"0": "its code also does something else in training: if self.training"}
    assert "left off: 0: its code also" in str(noise)


WITHOUT_SOURCE = """
class {name}(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.drop_rate = rate
    def forward(self, x):
        return torch.nn.functional.dropout(x, self.drop_rate) if self.training else x
"""


def without_source(name: str, rate: float) -> nn.Module:
    made: dict[str, type[nn.Module]] = {"__name__": "elsewhere"}  # type: ignore[dict-item]
    exec(WITHOUT_SOURCE.format(name=name), {"nn": nn, "torch": torch}, made)
    return made[name](rate)


def test_code_that_cannot_be_read_is_judged_by_its_name() -> None:
    model = nn.Sequential(without_source("MyDropout", 0.5), without_source("Strange", 0.5), without_source("Dull", 0.0))
    with vd.stochastic(model.eval()) as noise:
        assert [module.training for module in model] == [True, False, False]
    assert [source.name for source in noise.sources] == ["0"]
    assert noise.left_off == {"1": "its code cannot be read, so that it is not known what hangs on its flag"}


class OnlyFused(nn.Module):
    """A rate that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_drop = 0.3

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_fused_attention_without_its_dropout_is_noted_when_it_runs() -> None:
    model = nn.Sequential(OnlyFused())
    with vd.stochastic(model) as noise:
        model(torch.randn(2, 3, 8))
    assert noise.left_off == {"0": "its fused attention ran without dropout, although it has attn_drop = 0.3"}


class PatchDropout(nn.Module):
    prob = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x[:, ::2] if self.training else x


def test_dropout_that_changes_shapes_stays_off() -> None:
    with vd.stochastic(nn.Sequential(PatchDropout())) as noise:
        assert noise.left_off == {"0": "it drops tokens, and shapes would change"}


def test_a_model_without_noise_says_so() -> None:
    with vd.stochastic(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), vd.layers.Dropout(0.0))) as noise:
        pass
    assert noise.sources == []
    assert str(noise) == "sources of noise: none that could be found"


def test_the_report_is_short_where_a_model_is_long() -> None:
    with vd.stochastic(nn.Sequential(*[nn.Dropout(0.1) for _ in range(9)], nn.LSTM(2, 2, 2, dropout=0.3))) as noise:
        lines = str(noise).split("\n")
    assert lines == [
        "sources of noise: 10",
        "  Dropout, p = 0.1: 0, 1, 2, 3 and 5 more",
        "  recurrent dropout, p = 0.3: 9",
    ]
    assert str(noise.sources[0]) == "0: Dropout, p = 0.1"


def test_weights_at_their_means_are_no_noise() -> None:
    model = converted(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
    with vd.estimator("none"), vd.stochastic(model) as noise:
        assert [source.kind for source in noise.sources] == ["Dropout"]
    assert noise.left_off == {"0": "its weights are at their means: the estimator is 'none'"}


@pytest.mark.parametrize("name", ["local", "per_example", "per_minibatch", "flipout"])
def test_estimators_work_inside_and_outside(name: str) -> None:
    model = converted(nn.Linear(4, 4)).eval()
    x = torch.ones(3, 4)
    with vd.estimator(name), vd.stochastic(model):
        assert varies(model, x)
    with vd.stochastic(model), vd.estimator(name):
        y = model(x)
        assert varies(model, x)
    assert torch.equal(y, y[:1].expand_as(y)) == (name == "per_minibatch")


# ---------------------------------------------------------------------------------------------- whatever may happen


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_errors_inside_leave_nothing_behind(error: type[BaseException]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), Functional(), Counting()).train()
    before = state(model)

    def fail() -> None:
        with vd.stochastic(model):
            model[4](torch.ones(2))
            raise error

    with pytest.raises(error):
        fail()
    assert_same_state(model, before)
    model.eval()
    assert not varies(model[3], torch.ones(4, 4))


def passes(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    with vd.stochastic(model):
        while True:
            yield model(x)


def test_generators_may_be_closed_in_any_order() -> None:
    model = nn.Sequential(nn.Dropout(0.5), Functional()).train()
    model[0].eval()
    before = state(model)
    first, second, third = (passes(model, torch.ones(100)) for _ in range(3))
    for one in (first, second, third):
        next(one)
    for one in (first, third, second):
        one.close()
        if one is not second:
            assert not torch.equal(next(second), next(second))
    assert_same_state(model, before)
    assert not varies(model.eval(), torch.ones(100))


def test_blocks_may_be_nested_on_the_same_and_on_overlapping_models() -> None:
    model = nn.Sequential(nn.Dropout(0.5), Functional(), nn.BatchNorm1d(3)).train()
    before = state(model)
    with vd.stochastic(model):
        model[0].eval()  # by hand
        with vd.stochastic(model), vd.stochastic(model[0]), vd.stochastic(nn.Sequential(model[1], nn.Dropout(0.1))):
            assert model[0].training
            assert varies(model, torch.ones(9, 3))
        assert not model[0].training
        assert varies(model, torch.ones(9, 3))
    assert_same_state(model, before)


def test_closing_in_another_order_than_opening_restores_too() -> None:
    inner, outer = nn.Dropout(0.5).eval(), nn.Sequential(nn.Dropout(0.5)).eval()
    one, other = vd.stochastic(outer), vd.stochastic(inner)
    one.__enter__()
    with torch.device("meta"):  # another mode between ours
        other.__enter__()
        one.__exit__(None, None, None)
        other.__exit__(None, None, None)
        assert torch.empty(1).is_meta
    assert not torch.empty(1).is_meta
    assert not any(module.training for module in (*inner.modules(), *outer.modules()))


def in_thread(work: Callable[[], None]) -> list[BaseException]:
    errors: list[BaseException] = []

    def target() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target, name="worker")
    thread.start()
    thread.join(timeout=20)
    return errors


def test_another_thread_is_refused() -> None:
    model = nn.Sequential(nn.Dropout(0.5)).eval()

    def enter() -> None:
        with vd.stochastic(nn.Sequential(nn.ReLU(), model)):
            pass

    with vd.stochastic(model):
        errors = in_thread(enter)
        assert len(errors) == 1
        with pytest.raises(RuntimeError, match="held by one thread at a time, got '1', which is in a block of thread"):
            raise errors[0]
        assert model[0].training
        assert in_thread(lambda: vd.stochastic(copy.deepcopy(model)).__enter__()) == []
    assert in_thread(enter) == []
    assert not model[0].training


def test_a_thread_that_has_died_holds_nothing() -> None:
    model = nn.Dropout(0.5).eval()
    left_open = vd.stochastic(model)
    in_thread(lambda: left_open.__enter__() and None)
    with vd.stochastic(model):
        assert model.training
    left_open.__exit__(None, None, None)  # from another thread than it was opened in
    assert not model.training


def test_functional_dropout_of_other_models_is_left_alone() -> None:
    student, teacher = Functional().eval(), Functional().eval()
    x = torch.ones(50)
    with vd.stochastic(student):
        assert varies(student, x)
        assert not varies(teacher, x)
        assert torch.equal(F.dropout(x, 0.5, training=False), x)
        assert torch.equal(torch.dropout(x, 0.5, False), x)


class Rare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.dropout(x, 0.3, self.training)
        x = F.dropout2d(F.dropout3d(x[:, :, None, None], 0.3, self.training)[:, :, 0], 0.3, self.training)[:, :, 0]
        x = F.feature_alpha_dropout(F.alpha_dropout(x, 0.3, self.training), 0.3, self.training)
        return F.dropout1d(x, 0.3, self.training) if x.ndim == 3 else x


def test_rare_functional_dropouts_are_on_too() -> None:
    model = Rare().eval()
    with vd.stochastic(model):
        model.training = False  # it is the mode that has to do it
        assert varies(model, torch.ones(4, 5, 6))


def test_a_shared_module_is_one_source_and_restored_once() -> None:
    shared = nn.Dropout(0.5)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    before = state(model)
    with vd.stochastic(model) as noise:
        assert [source.name for source in noise.sources] == ["0"]
        assert varies(model, torch.ones(50))
    assert_same_state(model, before)


def test_modules_that_are_added_inside_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Dropout(0.5)).eval()
    with vd.stochastic(model):
        model.append(nn.Dropout(0.5).eval())
        model.append(nn.BatchNorm1d(3))
    assert [module.training for module in model] == [False, False, True]


def test_copies_made_inside_have_the_noise_of_their_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    with vd.stochastic(model):
        twin = copy.deepcopy(model)
    assert [module.training for module in twin] == [False, True]
    assert not model[1].training


def test_hooks_run_and_see_the_noise() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Identity()).eval()
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with vd.stochastic(model):
        model(torch.ones(50))
        model(torch.ones(50))
    assert not torch.equal(*seen)


def test_script_modules_have_their_dropout_modules_switched() -> None:
    with warnings.catch_warnings(action="ignore"):  # deprecated, and still met
        model = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).eval())
    x = torch.ones(4, 8)
    with vd.stochastic(model) as noise:
        assert [source.kind for source in noise.sources] == ["Dropout"]
        assert "only dropouts that are modules" in noise.left_off["Sequential"]
        assert varies(model, x)
    assert not varies(model, x)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("name", ["functional", "sdpa", "converted-layer"])
def test_compiled_models_vary_as_well(name: str) -> None:
    model = torch.compile(TRAPS[name]().eval(), backend="eager")
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        plain = model(x)
        with vd.stochastic(model):
            assert varies(model, x)
        assert torch.equal(model(x), plain)


def test_autocast_is_left_to_itself() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Functional()).eval()
    with vd.stochastic(model), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.ones(2, 8)).dtype == torch.bfloat16


def test_what_is_no_module_is_refused() -> None:
    with (
        pytest.raises(TypeError, match=r"vardrop.stochastic: model must be a torch.nn.Module, got function"),
        vd.stochastic(lambda x: x),  # type: ignore[arg-type]
    ):
        pass


# ------------------------------------------------------------------------------------------------- the law of the noise


def net_of_dropouts() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Dropout(0.2), nn.Linear(40, 60), nn.ReLU(), Functional(0.5), nn.Linear(60, 80), nn.Dropout(0.1),
        Functional(0.3),
    )  # fmt: skip


@pytest.mark.parametrize("batch", [2, 100], ids=["torch's masks", "our masks"])
def test_the_noise_has_the_law_that_it_has_in_training(batch: int) -> None:
    model, x, count = net_of_dropouts(), torch.randn(1, 40), 6000
    rows = x.expand(batch, 40)
    with torch.no_grad():
        trained = torch.cat([model.train()(rows) for _ in range(count // batch)]).double()
        with vd.stochastic(model.eval()):
            ours = torch.cat([model(rows) for _ in range(count // batch)]).double()
    for one, other in ((trained, ours), (trained.square(), ours.square())):
        error = ((one.var(0) + other.var(0)) / count).sqrt()
        assert ((one.mean(0) - other.mean(0)).abs() <= 4.5 * error).all()  # of 160 comparisons
    assert abs((trained == 0).double().mean() - (ours == 0).double().mean()) < 4 * (0.5 / (count * 80)) ** 0.5


def test_the_mean_and_variance_of_a_linear_layer_behind_dropout() -> None:
    model, x, count = nn.Sequential(nn.Dropout(0.25), nn.Linear(30, 5)).eval(), torch.randn(30), 20000
    with torch.no_grad(), vd.stochastic(model):
        y = model(x.expand(count, 30)).double()
    weight = model[1].weight.detach().double()
    mean, variance = model[1](x).detach().double(), (weight.square() @ x.double().square()) * 0.25 / 0.75
    assert ((y.mean(0) - mean).abs() <= 4 * (variance / count).sqrt()).all()
    kurtosis = ((y - y.mean(0)) ** 4).mean(0) / y.var(0) ** 2
    assert ((y.var(0) - variance).abs() <= 4 * variance * ((kurtosis - 1) / count).sqrt()).all()


@pytest.mark.parametrize("shape", [(30, 40, 6), (30, 40, 3, 2), (30, 40, 2, 2, 2)], ids=["1d", "2d", "3d"])
def test_channels_share_a_draw_and_have_their_rate(shape: tuple[int, ...]) -> None:
    model = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}[len(shape)](0.3).eval()
    with vd.stochastic(model):
        channels = torch.cat([model(torch.ones(shape)).flatten(2) for _ in range(5)])
    assert torch.equal(channels, channels[..., :1].expand_as(channels))
    dropped = (channels[..., 0] == 0).double()
    assert abs(dropped.mean() - 0.3) < 4 * (0.21 / dropped.numel()) ** 0.5


@pytest.mark.parametrize("name", ["bare", "channels", "alpha", "feature-alpha", "functional", "sdpa", "mha", "encoder"])
def test_under_vmap_every_sample_has_its_own_noise(name: str) -> None:
    model, x = TRAPS[name]().eval(), torch.randn(4, 5, 8)
    with torch.no_grad(), vd.stochastic(model):
        y = vmap(lambda _: run(model, x), randomness="different")(torch.arange(6))
    assert len({sample.numpy().tobytes() for sample in y}) == 6


class MaskInPlace(nn.Module):
    """As timm and torchvision draw masks."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        size = (x.shape[0], 1)
        if self.how == "new_empty":
            noise = x.new_empty(size)
        else:
            noise = torch.empty(size) if self.how == "empty" else torch.empty_like(x)
        return x * noise.bernoulli_(0.5)


@pytest.mark.parametrize("how", ["new_empty", "empty", "empty_like"])
def test_masks_that_are_drawn_in_place_differ_between_samples(how: str) -> None:
    model = MaskInPlace(how).eval()
    with vd.stochastic(model):
        y = vmap(lambda _: model(torch.ones(200, 3)), randomness="different")(torch.arange(4))
        same = vmap(lambda _: model(torch.ones(200, 3)), randomness="same")(torch.arange(4))
    assert len({sample.numpy().tobytes() for sample in y}) == 4
    assert torch.equal(same[0], same[3])
    assert abs(y.mean() - 0.5) < 4 * 0.5 / 800**0.5


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_dropout_under_vmap_has_a_mask_for_every_sample(kind: type[nn.RNNBase]) -> None:
    model, x = kind(8, 4, 2, dropout=0.5).eval(), torch.randn(5, 3, 8)
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 4, 2])
    with torch.no_grad(), vd.stochastic(model):
        for given in (x, packed):
            last = vmap(lambda _, given=given: model(given)[1], randomness="different")(torch.arange(3))
            state = last[0] if isinstance(last, tuple) else last
            assert torch.equal(state[0, 0], state[1, 0])  # of the first layer, before the mask
            assert (state[:, 1].std(0) > 0).all()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"mask": "bool"}, {"mask": "float"}])
def test_attention_in_steps_is_fused_attention(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    given: dict[str, object] = {"enable_gqa": True, **options}
    mask = given.pop("mask", None)
    if mask is not None:
        sees = torch.rand(2, 1, 5, 7) > 0.5
        sees[0, 0, 2] = False  # one query that sees nothing
        given["attn_mask"] = sees if mask == "bool" else torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)
    expected = F.scaled_dot_product_attention(q, k, v, **given)  # type: ignore[arg-type]
    assert torch.allclose(attention(q, k, v, **given), expected, atol=1e-5)  # type: ignore[arg-type]


def test_attention_with_dropout_has_its_mean_and_variance() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 4) for _ in range(3))
    y = torch.stack([attention(q, k, v, dropout_p=0.4) for _ in range(4000)]).double()
    weights = torch.softmax(q @ k.mT / 2, -1).double()
    mean, variance = weights @ v.double(), weights.square() @ v.double().square() * 0.4 / 0.6
    assert ((y.mean(0) - mean).abs() <= 4 * (variance / 4000).sqrt()).all()
    assert ((y.var(0) / variance - 1).abs() < 0.15).all()


def test_a_partial_last_batch_is_a_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), encoder_layer()).eval()
    with torch.no_grad(), vd.stochastic(model):
        for rows in torch.randn(10, 4).split(4):
            assert varies(model, rows)
        assert varies(model, torch.randn(1, 4))
        assert model(torch.randn(0, 4)).shape == (0, 8)


def test_layers_with_fused_kernels_are_on_where_there_is_noise_in_them_and_nowhere_else() -> None:
    model = nn.Sequential(encoder_layer(0.5), encoder_layer(0.0)).eval()
    vd.convert_(model[1], vd.VariationalDropout(), where="self_attn.out_proj")
    with vd.stochastic(nn.Sequential(model, encoder_layer(0.0).eval())) as noise:
        assert model[0].training
        assert model[1].training
        assert model[1].self_attn.training
    assert len(noise.sources) == 5
    silent = nn.Sequential(encoder_layer(0.0), nn.Linear(2, 2)).eval()
    with vd.stochastic(silent):
        assert not silent[0].self_attn.training


def test_watching_needs_an_open_block() -> None:
    seen: list[object] = []
    words = "a block must be open where functions are watched, got none; open one"
    with pytest.raises(RuntimeError, match=words), noise_mode.watched(seen.append):
        pass
    x = torch.ones(2)
    with vd.stochastic(nn.Dropout(0.5)):
        with noise_mode.watched(seen.append):
            y = torch.relu(x)
        torch.relu(x)
    assert len(seen) == 1
    assert seen[0] is y
