"""`vardrop export`: files that other programs read, held against the network that they were made of."""

import json
import re
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open

import vardrop as vd
from commands import refused
from vardrop.evaluation.runs import open_run
from vardrop.pruning import exporting, load_network
from vardrop.training import Config, train
from vardrop.training.files import read_tensors, write_tensors


def with_zeros(folder, **options):
    """A run of which whole units and pixels are zero, as pruning leaves them."""
    settings = {"model": "mlp:24,16", "epochs": 1, "method": "sparse-vd", "warmup": 0, "average": 0.0} | options
    train(Config(**settings), folder, progress=False)
    tensors, about = read_tensors(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if name.endswith("weight"):
            value[torch.rand(value.shape, generator=generator) < 0.8] = 0
            value[: len(value) // 2] = 0
    write_tensors(folder / "model.safetensors", tensors, about)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return with_zeros(tmp_path_factory.mktemp("runs") / "run")


def outputs_of(run):
    opened = open_run(run)
    x = opened.data.test_x[:50]
    with torch.no_grad():
        return x, opened.task.network.eval()(x)


@pytest.mark.parametrize("small", [False, True])
def test_onnx_says_the_same_for_batches_of_any_size(run, tmp_path, vardrop_, small):
    path = tmp_path / "net.onnx"
    options = ["--compact"] if small else []
    status, out, _ = vardrop_("export", run, "--format", "onnx", "--out", path, *options)
    assert status == 0
    difference, largest = (float(number) for number in re.search(r"most (\S+) \(largest output (\S+)\)", out).groups())
    assert difference < 1e-4 * largest
    x, wanted = outputs_of(run)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 50):
        (got,) = session.run(None, {session.get_inputs()[0].name: x[:batch].numpy()})
        np.testing.assert_allclose(got, wanted[:batch].numpy(), atol=1e-4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx"]
    assert ("→" in out) is small


@pytest.mark.parametrize(("form", "ending"), [("safetensors", "safetensors"), ("compressed", "vdc")])
def test_the_other_formats_rebuild_themselves(run, tmp_path, vardrop_, form, ending):
    x, wanted = outputs_of(run)
    sizes = []
    for name, options in (("all", []), ("small", ["--compact"])):
        path = tmp_path / f"{name}.{ending}"
        status, out, _ = vardrop_("export", run, "--format", form, "--out", path, *options)
        assert (status, f"architecture: {path}.json" in out) == (0, True)
        with torch.no_grad():
            torch.testing.assert_close(load_network(path)(x), wanted, atol=1e-4, rtol=1e-4)
        sizes.append(sum(p.numel() for p in load_network(path).parameters()))
    assert sizes[1] < sizes[0] / 2
    assert len(list(tmp_path.iterdir())) == 4


def test_channels_of_an_onnx_file_are_rounded_to_what_its_runtime_is_fast_at(tmp_path, vardrop_):
    run = with_zeros(tmp_path / "run", model="conv:1")
    for form, name in (("onnx", "net.onnx"), ("safetensors", "net.safetensors")):
        status, *_ = vardrop_("export", run, "--format", form, "--compact", "--out", tmp_path / name)
        assert status == 0
    loaded = load_network(tmp_path / "net.safetensors")
    (_, second) = (module for module in loaded.modules() if isinstance(module, torch.nn.Conv2d))
    assert second.in_channels == 17  # of 32; of those that are constants one stays, for the border
    kernels = [each.dims for each in onnx.load(tmp_path / "net.onnx").graph.initializer if len(each.dims) == 4]
    assert [dims[1] for dims in kernels] == [1, 20]


def test_sparse_rows_are_those_of_any_reader(run, tmp_path, vardrop_):
    path = tmp_path / "net.safetensors"
    assert vardrop_("export", run, "--format", "safetensors", "--out", path)[0] == 0
    weight = open_run(run).task.network[1]._parameters["weight"].detach()
    with safe_open(path, framework="pt") as file:
        parts = [file.get_tensor(f"1.weight.{part}").long() for part in ("crow", "col")]
        values = file.get_tensor("1.weight.value")
    torch.testing.assert_close(torch.sparse_csr_tensor(*parts, values, weight.shape).to_dense(), weight)


def test_without_a_name_it_goes_to_the_run(tmp_path, vardrop_):
    run = with_zeros(tmp_path / "run")
    for form, name in (("compressed", "network.vdc"), ("safetensors", "network.safetensors")):
        assert vardrop_("export", run, "--format", form)[0] == 0
        assert (run / name).is_file()
    assert vardrop_("export", run, "--format", "compressed", "--compact")[0] == 0
    size = (run / "compact.vdc").stat().st_size
    assert size == vd.compressed_size(load_network(run / "compact.vdc")).bytes
    assert open_run(run).random  # it is still the run that it was


def test_numbers_come_with_the_units_of_the_target(tmp_path, vardrop_):
    lines = [f"{a},{a % 7},{100 * a}" for a in range(60)]
    (tmp_path / "d.csv").write_text("\n".join(["a,b,y", *lines]))
    run = with_zeros(tmp_path / "run", data=str(tmp_path / "d.csv"), model="mlp:1x8")
    path = tmp_path / "net.vdc"
    status, out, _ = vardrop_("export", run, "--format", "compressed", "--out", path)
    assert status == 0
    assert "target is mean + std * output" in out
    target = json.loads((tmp_path / "net.vdc.json").read_text())["target"]
    opened = open_run(run)
    with torch.no_grad():
        wanted = opened.task.likelihood.predict(opened.task.network(opened.data.test_x))
        got = target["mean"] + target["std"] * load_network(path)(opened.data.test_x)[:, 0]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-3)


def test_a_run_without_zeros_says_so(tmp_path, vardrop_):
    train(Config(model="mlp:1x8", epochs=1, method="none"), tmp_path / "run", progress=False)
    status, out, _ = vardrop_("export", tmp_path / "run", "--format", "compressed", "--compact")
    assert status == 0
    assert "no weight that is zero" in out


def test_double_precision(tmp_path, vardrop_):
    run = with_zeros(tmp_path / "run", precision="64-true", model="conv:0.1")
    for form in ("onnx", "compressed"):
        assert vardrop_("export", run, "--format", form, "--compact")[0] == 0
    assert next(load_network(run / "compact.vdc").parameters()).dtype == torch.float64


class TestRefusals:
    def test_names(self, run, tmp_path, vardrop_):
        out = ("--out", tmp_path / "a.vdc")
        refused(vardrop_("export", run, "--format", "onx", *out), "--format must be one of onnx, .* got 'onx'")
        refused(vardrop_("export", run, "--format", "onnx", *out), r"must end in \.onnx, got .*a\.vdc; rename it")
        refused(vardrop_("export", tmp_path, "--format", "onnx"), "RUN must be what `vardrop train")
        refused(vardrop_("export", run), "Missing option '--format'")
        for name in ("model.safetensors", "checkpoint.safetensors"):
            own = ("--out", run / name)
            refused(vardrop_("export", run, "--format", "safetensors", *own), "leave the run's own files alone")
        (tmp_path / "b.vdc").mkdir()
        refused(
            vardrop_("export", run, "--format", "compressed", "--out", tmp_path / "b.vdc"), "must be a file, got the"
        )
        (tmp_path / "file").write_text("")
        nowhere = ("--out", tmp_path / "file" / "a.vdc")
        refused(vardrop_("export", run, "--format", "compressed", *nowhere), "needs room and permission to write")

    @pytest.mark.parametrize(
        ("form", "package", "extra"),
        [
            ("onnx", "onnx", "export"),
            ("onnx", "onnxruntime", "export"),
            ("safetensors", "safetensors", "export"),
            ("compressed", "zstandard", "compress"),
        ],
    )
    def test_missing_packages(self, run, tmp_path, vardrop_, monkeypatch, form, package, extra):
        monkeypatch.setitem(sys.modules, package, None)
        words = rf"needs {package}, got an environment without it; pip install 'vardrop\[{extra}\]'"
        refused(vardrop_("export", run, "--format", form, "--out", tmp_path / "a"), words)

    def test_a_file_that_says_something_else_is_not_kept(self, run, tmp_path, vardrop_, monkeypatch):
        path = tmp_path / "net.vdc"
        path.write_text("old")
        monkeypatch.setattr(exporting, "load_network", lambda file: lambda x: load_network(file)(x) + 1)
        words = "the file must say what the network says, got outputs that differ by"
        refused(vardrop_("export", run, "--format", "compressed", "--out", path), words)
        assert [file.name for file in tmp_path.iterdir()] == ["net.vdc"]
        assert path.read_text() == "old"


@pytest.mark.parametrize("form", ["onnx", "safetensors"])
def test_what_a_table_went_through_stands_in_the_file(tmp_path, vardrop_, form):
    file = tmp_path / "prices.csv"
    rows = [(i, 7, 3 * i + 1) for i in range(40)]
    file.write_text("size,floor,price\n" + "\n".join(f"{a},{b},{y}.5" for a, b, y in rows))
    train(Config(model="mlp:1x8", epochs=1, data=str(file)), tmp_path / "run", progress=False)
    opened, path = open_run(tmp_path / "run"), tmp_path / f"net.{form}"
    status, out, _ = vardrop_("export", tmp_path / "run", "--format", form, "--out", path)
    assert (status, "Its inputs are columns that were standardised" in out) == (0, True)
    if form == "onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        about = json.loads(session.get_modelmeta().custom_metadata_map["vardrop"])
    else:
        about = json.loads((tmp_path / "net.safetensors.json").read_text())
    told, raw = about["inputs"], np.array(rows)[:, :2]
    assert told["columns"] == ["size", "floor"]
    assert told["std"][1] is None
    x = np.stack([(raw[:, 0] - told["mean"][0]) / told["std"][0], 0 * raw[:, 1]], 1)
    own = torch.cat([opened.data.train_x, opened.data.test_x])
    np.testing.assert_allclose(sorted(x.tolist()), sorted(own.tolist()), rtol=1e-5, atol=1e-6)
    assert about["target"]["mean"] == pytest.approx(opened.data.train_y.mean().item(), rel=0.2)
