"""Digits that the noise pays for, and files that give back what went in."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vardrop as vd
from vardrop import optional
from vardrop.sparsity import coding
from vardrop.sparsity.coding import decode, encode, gaps, places
from vardrop.sparsity.compressed import plain_state

CONFIGS = {
    "sparse": vd.SparseVariationalDropout(),
    "B": vd.VariationalDropout(type="B", sharing="weight"),
    "A": vd.VariationalDropout(type="A"),
    "output": vd.VariationalDropout(type="B", sharing="neuron", unit="output"),
    "gaussian": vd.GaussianPosterior(std=0.03),
}


def lenet5(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    convs = [nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


# ----------------------------------------------------------------------------------------------------------- digits


def significand(x: float) -> int:
    """How many binary digits a number has from its first one to its last one, from its exact fraction."""
    numerator = abs(float(x)).as_integer_ratio()[0]
    while numerator and numerator % 2 == 0:
        numerator //= 2
    return numerator.bit_length()


@settings(max_examples=100, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False, width=32), st.integers(1, 30))
def test_rounding_is_the_nearest_number_of_so_many_digits(x: float, digits: int) -> None:
    rounded = vd.sparsity.round_significant(torch.tensor([x], dtype=torch.float64), digits).item()
    assert significand(rounded) <= digits
    assert abs(rounded - x) <= 2.0**-digits * abs(x)
    if x:
        step = 2.0 ** (math.frexp(x)[1] - digits)
        assert abs(rounded - x) <= step / 2


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_digits_are_few_and_rounding_is_below_the_noise(config: vd.VariationalDropout) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 4))
    vd.convert_(model, config)
    with torch.no_grad():
        for module in (model[0], model[2]):
            noise = getattr(module, module.vardrop_noise["weight"].key)
            noise.add_(2 * torch.randn(noise.shape))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    small = vd.quantize_to_noise(model)
    digits = vd.sparsity.significant_digits(model)
    for name, mean in model.named_parameters():
        assert torch.equal(mean, before[name])
        rounded = dict(small.named_parameters())[name]
        if name not in digits:
            assert torch.equal(rounded, mean)
            continue
        alpha = vd.dropout_rates(model, as_="alpha")[name].float()
        alpha = (alpha[:, None] if config is CONFIGS["output"] else alpha).expand(mean.shape)
        assert ((rounded - mean).abs() <= alpha.sqrt() * mean.abs() * 1.001).all()
        wanted = (-0.5 * alpha.log2()).ceil().clamp(1, 24)
        assert ((digits[name] - wanted).abs() <= (wanted - -0.5 * alpha.log2() > 0.999)).all()
        assert all(
            significand(value) <= count
            for value, count in zip(rounded.flatten().tolist(), digits[name].flatten().tolist(), strict=True)
        )


def test_more_digits_and_fewer() -> None:
    layer = nn.Linear(50, 1)
    vd.convert_(layer, vd.VariationalDropout(max_alpha=math.inf, alpha=2.0**3))
    assert vd.sparsity.significant_digits(layer)["weight"].unique().tolist() == [1]
    assert not vd.quantize_to_noise(layer, minimum=0).eval().weight.any()
    assert vd.sparsity.significant_digits(layer, extra=3)["weight"].unique().tolist() == [3]
    assert vd.sparsity.significant_digits(layer, extra=99)["weight"].unique().tolist() == [24]
    rounded = vd.quantize_to_noise(layer, other_digits=2)
    assert significand(rounded.bias.item()) <= 2
    assert torch.equal(rounded.get_parameter("weight_log_alpha"), layer.get_parameter("weight_log_alpha"))


def test_a_trained_network_loses_nothing_that_can_be_measured() -> None:
    """Likelihood and KL of a network that learned its noise, before and after; random digits would not do."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator)
    y = ((x[:, 0] * x[:, 1] + x[:, 2]) > 0).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 2))
    vd.convert_(model, vd.SparseVariationalDropout(log_variance=-6.0))
    elbo = vd.ELBO(model, num_data=400, warmup=200)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(500):
        optimizer.zero_grad()
        elbo(nn.functional.cross_entropy(model(x), y)).backward()
        optimizer.step()
    vd.sparsify_(model)
    small = vd.quantize_to_noise(model).eval()
    mean_digits = vd.sparsity.significant_digits(model)["0.weight"]
    assert mean_digits[mean_digits > 0].double().mean() < 6
    with torch.no_grad():
        before, after = (nn.functional.cross_entropy(each.eval()(x), y).item() for each in (model, small))
        noisy = [nn.functional.cross_entropy(model.train()(x), y).item() for _ in range(30)]
    assert after < before + 0.03
    assert after < sum(noisy) / len(noisy) + 0.02  # rounding is gentler than the noise it was trained to bear
    kls = [vd.kl_divergence(each).item() for each in (model, small)]
    assert kls[1] == pytest.approx(kls[0], rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"minimum": -1}, "minimum must be a whole number of 0 or more, got -1"),
        ({"extra": 0.5}, r"extra must be a whole number of 0 or more, got 0\.5"),
        ({"other_digits": 0}, "other_digits must be at least 1, got 0"),
        ({"other_digits": 1.5}, r"other_digits must be a whole number or None, got 1\.5"),
    ],
)
def test_digits_that_are_none_are_refused(arguments: dict[str, object], words: str) -> None:
    layer = nn.Linear(2, 2)
    vd.convert_(layer, vd.VariationalDropout())
    with pytest.raises(ValueError, match=words):
        vd.quantize_to_noise(layer, **arguments)  # type: ignore[arg-type]


def test_a_model_without_noise_has_no_digits_to_spare() -> None:
    with pytest.raises(ValueError, match="needs weights with learned noise, which says how many digits they are worth"):
        vd.quantize_to_noise(nn.Linear(2, 2))


# ----------------------------------------------------------------------------------------------------------- coding

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 12), max_size=4),
    st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    st.integers(0, 3),
    st.integers(0, 100),
)
def test_tensors_make_the_round_trip(dtype: torch.dtype, shape: list[int], kept: float, digits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 100
    x = vd.sparsity.round_significant(x, digits) if digits else x
    x = (x * (torch.rand(shape, generator=generator) < kept)).to(dtype)
    layout, data = encode(x)
    back, end = decode(layout, b"??" + data + b"!", 2, tuple(shape), dtype)
    assert end == len(data) + 2
    assert back.dtype == dtype
    assert torch.equal(back, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_of_all_kinds_make_the_round_trip(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    x = torch.tensor(
        [math.inf, -math.inf, math.nan, info.max, info.min, info.tiny, info.smallest_normal / 4, 1, -1.5, 0]
    )
    x = torch.cat([x.to(dtype), torch.randn(1000).to(dtype)])
    back, _ = decode(*encode(x), 0, tuple(x.shape), dtype)
    assert torch.equal(back.nan_to_num(nan=7), x.nan_to_num(nan=7))
    assert back.isnan().tolist() == x.isnan().tolist()


@given(st.sets(st.integers(0, 5000)))
def test_gaps_are_undone(found: set[int]) -> None:
    where = np.array(sorted(found), dtype=np.int64)
    assert np.array_equal(places(gaps(where)), where)


@given(st.integers(0, 2**40))
def test_numbers_are_undone(value: int) -> None:
    assert coding.read_number(b"?" + coding.number(value), 1) == (value, 1 + len(coding.number(value)))


def test_sparse_tensors_take_little_more_than_their_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    count, density = 400_000, 0.005
    x = vd.sparsity.round_significant(torch.randn(500, 800, generator=generator), 2)
    x *= torch.rand(500, 800, generator=generator) < density
    mine = len(encode(x)[1])
    values = torch.unique(x[x != 0], return_counts=True)[1].double()
    p = values / values.sum()
    entropy = float(values.sum() * -(p * p.log2()).sum())
    entropy += count * -(density * math.log2(density) + (1 - density) * math.log2(1 - density))
    assert entropy / 8 < mine < 1.12 * entropy / 8 + 200


# ------------------------------------------------------------------------------------------------------------ files


class Odd(nn.Module):
    """Tied weights, buffers of whole numbers, a scalar, several types."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(6)
        self.half = nn.Linear(6, 4).to(torch.bfloat16)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.tensor(0.7))


@pytest.mark.parametrize("make", [Odd, lenet5], ids=["odd", "lenet-5"])
def test_files_give_back_what_went_in(make: type[nn.Module], tmp_path: Path) -> None:
    model = make()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.fill_(1)
    size = vd.save_compressed(model, tmp_path / "model.vdc")
    vd.load_compressed(tmp_path / "model.vdc", other)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    assert size.bytes == (tmp_path / "model.vdc").stat().st_size
    assert size == vd.compressed_size(model)
    assert size.dense == 4 * sum(value.numel() for value in model.state_dict().values())
    assert sum(size.tensors.values()) < size.bytes
    assert f"{size.bytes:,} bytes, {size.ratio:.1f} x smaller" in str(size)
    assert [file.name for file in tmp_path.iterdir()] == ["model.vdc"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_converted_models_are_kept_as_their_means(config: vd.VariationalDropout, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    model = copy.deepcopy(plain)
    vd.convert_(model, config)
    assert set(plain_state(model)) == set(plain.state_dict())
    vd.save_compressed(model, tmp_path / "model.vdc")
    with torch.no_grad():
        other = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    vd.convert_(other, vd.GaussianPosterior())
    vd.load_compressed(tmp_path / "model.vdc", other.train())
    x = torch.randn(3, 5)
    assert torch.equal(other.eval()(x), plain(x))


def test_a_sparse_lenet_with_few_digits_is_a_small_file(tmp_path: Path) -> None:
    """As sparse as the published one (67, 98, 99.8 and 95% of the four layers), with log α between -6 and 0."""
    model = lenet5()
    with torch.no_grad():
        for module, kept in zip((model[0], model[3], model[7], model[9]), (0.33, 0.02, 0.002, 0.05), strict=True):
            module.weight.mul_(torch.rand(module.weight.shape) < kept)
    vd.convert_(model, vd.VariationalDropout(type="B", sharing="weight"))
    with torch.no_grad():
        for module in (model[0], model[3], model[7], model[9]):
            module.weight_log_alpha.uniform_(-6, 0)
    small = vd.quantize_to_noise(model, other_digits=6)
    vd.restore_(small)
    x = torch.randn(2, 1, 28, 28)
    compact = vd.compact(small, x).eval()
    size = vd.save_compressed(compact, tmp_path / "small.vdc")
    assert vd.compressed_size(small).ratio > 350
    assert lenet_bytes() / size.bytes > 450
    other = copy.deepcopy(compact)
    for tensor in other.state_dict().values():
        tensor.zero_()
    vd.load_compressed(tmp_path / "small.vdc", other)
    assert torch.equal(other(x), compact(x))


def file_of(model: nn.Module) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.vdc"
        vd.save_compressed(model, path)
        return path.read_bytes()


def lenet_bytes() -> int:
    return 4 * sum(p.numel() for p in lenet5().parameters())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_anywhere_is_seen(data: st.DataObject) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    content = bytearray(file_of(model))
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    before = model.weight.detach().clone()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.vdc"
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"the file must be whole, got|needs a file that vd.save_compressed wrote, got"
        ):
            vd.load_compressed(path, model)
    assert torch.equal(model.weight, before)


def test_words_for_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.vdc"
    vd.save_compressed(nn.Linear(6, 5), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"the file must be whole, got .* it is damaged or cut short, take another copy"
    ):
        vd.load_compressed(path, nn.Linear(6, 5))
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(
        ValueError, match=r"needs a file that vd\.save_compressed wrote, got .*, which begins with b'PK"
    ):
        vd.load_compressed(path, nn.Linear(6, 5))


@pytest.mark.parametrize(
    "other",
    [nn.Linear(5, 6), nn.Linear(6, 5, bias=False), nn.Linear(6, 5).double(), nn.Sequential(nn.Linear(6, 5))],
    ids=["shape", "bias", "type", "names"],
)
def test_files_of_other_models_are_refused(other: nn.Module, tmp_path: Path) -> None:
    vd.save_compressed(nn.Linear(6, 5), tmp_path / "model.vdc")
    before: dict[str, Tensor] = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"the model must have the tensors of the file, got '.*' with .* where .* has"):
        vd.load_compressed(tmp_path / "model.vdc", other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_missing_package_is_named() -> None:
    with pytest.raises(
        ModuleNotFoundError, match=r"save_compressed: needs nowhere, got an environment .*vardrop\[compress"
    ):
        optional.needed("nowhere", "save_compressed", "compress")


# ---------------------------------------------------------------------------------------------------- other formats


@pytest.mark.parametrize("make", [Odd, lenet5], ids=["odd", "lenet-5"])
def test_sparse_safetensors_give_back_what_went_in(make: type[nn.Module], tmp_path: Path) -> None:
    model = make()
    if isinstance(model, nn.Sequential):
        with torch.no_grad():
            model[0].weight.mul_(torch.rand(model[0].weight.shape) < 0.2)
            model[7].weight.mul_(torch.rand(model[7].weight.shape) < 0.01)
            model[7].weight[:3] = 0
    other = copy.deepcopy(model)
    for tensor in other.state_dict().values():
        tensor.detach().fill_(1)
    vd.sparsity.save_sparse(model, tmp_path / "model.safetensors")
    vd.sparsity.load_sparse(tmp_path / "model.safetensors", other)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    if isinstance(model, nn.Sequential):  # as torch reads rows
        from safetensors.torch import load_file

        file = load_file(tmp_path / "model.safetensors")
        crow, col, value = (file[f"7.weight.{part}"] for part in ("crow", "col", "value"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sparse CSR is in beta
            rows = torch.sparse_csr_tensor(crow, col, value, (500, 800)).to_dense()
        assert torch.equal(rows, model[7].weight)
        assert (tmp_path / "model.safetensors").stat().st_size < 0.2 * lenet_bytes()


def test_sparse_files_of_other_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    vd.sparsity.save_sparse(nn.Linear(6, 5), path)
    with pytest.raises(ValueError, match=r"the model must have the tensors that .* has, of the same shapes, got other"):
        vd.sparsity.load_sparse(path, nn.Linear(6, 4))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"needs a whole safetensors file, got .*; write it again with"):
        vd.sparsity.load_sparse(path, nn.Linear(6, 5))


class Tagger(nn.Module):
    """A selection of inputs, an encoder layer that loses a head and hidden units, and a size in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(30, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.conv = nn.Conv1d(8, 6, 3)
        self.last = nn.Linear(6 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.conv(self.encoder(self.first(x)).transpose(1, 2))).view(-1, 18))


def test_compact_networks_run_in_onnxruntime(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = Tagger().eval()
    with torch.no_grad():
        model.first.weight[:, 7:] = 0
        model.encoder.self_attn.out_proj.weight[:, :4] = 0
        model.encoder.linear1.weight[3:9] = 0
        model.conv.weight[2:4] = 0
    small = vd.compact(model, torch.randn(2, 5, 30))
    assert small.encoder.self_attn.num_heads == 1
    assert small.conv.out_channels == 4
    vd.sparsity.export_onnx(small, torch.randn(2, 5, 30), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = torch.randn(batch, 5, 30)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-4, atol=1e-5)
