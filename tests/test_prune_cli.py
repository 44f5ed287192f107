"""`vardrop prune`: real runs of seconds, and folders whose numbers can be counted again."""

import dataclasses
import json
import re
import sys

import pytest
import torch
from torch import nn

import vardrop as vd
from commands import refused
from vardrop import cli
from vardrop.evaluation.runs import open_run
from vardrop.models import build
from vardrop.pruning import load_network
from vardrop.pruning.architecture import describe, rebuild
from vardrop.pruning.finetuning import train_on
from vardrop.pruning.folder import drafted
from vardrop.pruning.goals import Goal
from vardrop.pruning.network_file import tensor_bytes, write_network
from vardrop.pruning.sweep import Position, sweep, thresholds, with_chosen
from vardrop.training import Config, train
from vardrop.training.evaluation import evaluate
from vardrop.training.files import read_tensors


def trained(folder, **options):
    settings = {"model": "mlp:1x12", "epochs": 1, "average": 0.0, "method": "sparse-vd", "warmup": 0} | options
    train(Config(**settings), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A run that has learned which weights it needs."""
    folder = tmp_path_factory.mktemp("runs") / "sparse"
    return trained(folder, model="mlp:32,16", epochs=30, warmup=5, lr=5e-3, average=0.98, patience=0)


@pytest.fixture(scope="module")
def pruned(sparse, tmp_path_factory):
    """All of it: fine-tuned, rounded, compact."""
    out = tmp_path_factory.mktemp("pruned") / "small"
    with pytest.raises(SystemExit) as ended:
        cli.main(["prune", str(sparse), "--out", str(out), "--finetune-epochs", "2", "--quantize"])
    assert ended.value.code == 0
    return out


@pytest.fixture(scope="module")
def found(pruned):
    return json.loads((pruned / "prune.json").read_text())


def error_of(network, x, y):
    with torch.no_grad():
        return float((network.eval()(x).argmax(1) != y).double().mean())


class TestFolder:
    def test_it_is_a_run_whose_zeros_are_those_of_the_report(self, sparse, pruned, found):
        network, dense = open_run(pruned).task.network, open_run(sparse).task.network
        small = dict(network.named_parameters())
        removed = {layer["name"]: layer["removed"] for layer in found["layers_removed"]}
        assert {name: int((small[name] == 0).sum()) for name in removed} == removed
        log_alpha = vd.dropout_rates(dense, as_="log_alpha")
        for name in removed:  # exactly what was above 3, fine-tuning or not
            assert torch.equal(small[name] == 0, log_alpha[name] > 3), name
        assert sum(removed.values()) == found["removed"] > 0.3 * found["weights"]

    def test_the_compact_network_is_rebuilt_without_the_run(self, pruned, found):
        run = open_run(pruned)
        x, y = run.data.test_x, run.data.test_y
        with torch.no_grad():
            wanted = run.task.network(x)
            for name in ("compact.safetensors", "compact.vdc"):
                network = load_network(pruned / name)
                torch.testing.assert_close(network(x), wanted, atol=1e-4, rtol=1e-4)
                assert sum(p.numel() for p in network.parameters()) == found["compaction"]["parameters"][1]
                assert not any(hasattr(module, "vardrop_noise") for module in network.modules())
        assert found["test"]["compact"]["error"] == pytest.approx(error_of(network, x, y))
        told = json.loads((pruned / "compact.vdc.json").read_text())
        assert (told["input"], told["classes"]) == ([1, 8, 8], list("0123456789"))

    def test_errors_before_and_after_are_those_of_the_runs(self, sparse, pruned, found):
        for folder, stage in ((sparse, "dense"), (pruned, "rounded")):
            run = open_run(folder)
            assert found["test"][stage]["error"] == pytest.approx(
                error_of(run.task.network, run.data.test_x, run.data.test_y)
            )
            assert found["validation"][stage] == pytest.approx(error_of(run.task.network, *run.validation()))
        dense, summary = (json.loads((folder / "summary.json").read_text()) for folder in (sparse, pruned))
        assert dense["test_error"] == pytest.approx(found["test"]["dense"]["error"])
        assert summary["test_error"] == pytest.approx(found["test"]["rounded"]["error"])
        assert list(found["test"]) == ["dense", "sparse", "fine-tuned", "rounded", "compact"]

    def test_weights_have_the_digits_that_their_noise_pays_for(self, pruned):
        network = open_run(pruned).task.network
        again = vd.quantize_to_noise(network, other_digits=8)
        for one, two in zip(network.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0.5, atol=0)  # log alpha moves a little with a rounded weight
        biases = [p for name, p in network.named_parameters() if name.endswith("bias")]
        for bias in biases:
            assert torch.equal(bias, vd.sparsity.round_significant(bias, 8))

    def test_layers_add_up_to_what_compaction_says(self, found):
        for name in ("parameters", "multiply_adds"):
            sums = [sum(layer[name][i] for layer in found["layers"]) for i in (0, 1)]
            assert sums == found["compaction"][name]
        assert [layer["multiply_adds"][0] for layer in found["layers"]] == [64 * 32, 32 * 16, 16 * 10]

    def test_bytes_are_those_of_files(self, pruned, found):
        for name, size in found["files"].items():
            assert (pruned / name).stat().st_size == size
        assert found["bytes"]["compact"]["compressed"] == found["files"]["compact.vdc"]
        assert found["bytes"]["dense"]["float32"] == 4 * (64 * 32 + 32 + 32 * 16 + 16 + 160 + 10)
        first = found["layers"][0]
        left = first["weights"] - first["removed"]
        rows = 4 * (32 + 1) + 4 * left + 4 * left  # where each row begins, columns, values
        assert first["bytes"]["csr"] == rows + 4 * 32
        assert sum(layer["bytes"]["compressed"] for layer in found["layers"]) < found["bytes"]["sparse"]["compressed"]

    def test_other_thresholds_are_what_sparsify_makes_of_them(self, sparse, found):
        rows = found["positions"]
        assert [row["threshold"] for row in rows] == sorted(row["threshold"] for row in rows)
        (chosen,) = [row for row in rows if row["chosen"]]
        assert chosen["threshold"] == 3
        assert sum(chosen["kept"]) == found["weights"] - found["removed"]
        for row in (rows[2], chosen, rows[-3]):
            run = open_run(sparse)
            report = vd.sparsify_(run.task.network, threshold=row["threshold"])
            assert [layer.weights - layer.removed for layer in report.layers] == row["kept"]
            assert row["error"] == pytest.approx(error_of(run.task.network, *run.validation()))
            assert row["bytes"] == vd.compressed_size(run.task.network).bytes
            first = run.task.network[1]._parameters["weight"]
            assert row["inputs"] == (first != 0).sum(0).tolist()
        assert sum(rows[-1]["kept"]) == found["weights"]  # the slider ends where nothing is removed

    def test_other_commands_open_it(self, pruned, vardrop_):
        assert vardrop_("predict", pruned, "--samples", "3", "--limit", "5")[0] == 0
        status, out, _ = vardrop_("evaluate", pruned, "--samples", "3", "--limit", "50")
        assert (status, "page:" in out) == (0, True)
        assert vardrop_("report", pruned)[0] == 0
        more = ("prune", pruned, "--out", pruned.parent / "again")
        refused(vardrop_(*more, "--threshold", "50"), "nothing more is above .* a run that is pruned already")
        words = "must be above what is zero already"
        refused(vardrop_(*more, "--target-sparsity", "0.01"), words)
        assert vardrop_(*more, "--target-sparsity", "0.97")[0] == 0
        assert json.loads((pruned.parent / "again" / "prune.json").read_text())["removed"] >= 0.97 * (2048 + 512 + 160)


class TestGoals:
    def test_sparsity(self, sparse, tmp_path, vardrop_):
        status, out, _ = vardrop_("prune", sparse, "--out", tmp_path / "a", "--target-sparsity", "0.6", "--no-progress")
        assert status == 0
        assert "as it was trained" in out
        found = json.loads((tmp_path / "a" / "prune.json").read_text())
        assert 0 <= found["removed"] / found["weights"] - 0.6 < 0.01
        assert found["command"] == f"vardrop prune {sparse} --out {tmp_path / 'a'} --target-sparsity 0.6"
        assert found["finetuning"]["best_epoch"] is None

    def test_error_is_kept_on_the_rows_that_training_kept_back(self, sparse, tmp_path, vardrop_):
        status, _, _ = vardrop_("prune", sparse, "--out", tmp_path / "a", "--max-error-increase", "0.02")
        assert status == 0
        found = json.loads((tmp_path / "a" / "prune.json").read_text())
        assert found["validation"]["sparse"] <= found["validation"]["dense"] + 0.02
        (chosen,) = [row for row in found["positions"] if row["chosen"]]
        assert chosen["error"] == pytest.approx(found["validation"]["sparse"])

    def test_numbers_are_measured_in_the_units_of_the_target(self, tmp_path, vardrop_):
        rows = torch.randn(160, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 1.0, 0.0])
        lines = [f"{a},{b},{c},{300 * a + 7}" for a, b, c, _ in rows.tolist()]
        (tmp_path / "d.csv").write_text("\n".join(["a,b,c,y", *lines]))
        run = trained(tmp_path / "run", data=str(tmp_path / "d.csv"), model="mlp:1x6", epochs=20, lr=1e-2, warmup=40)
        out = tmp_path / "out"
        status, said, _ = vardrop_("prune", run, "--out", out, "--target-sparsity", "0.3", "--finetune-epochs", "1")
        assert status == 0
        assert "test RMSE" in said
        found = json.loads((out / "prune.json").read_text())
        opened = open_run(out)
        scores = evaluate(opened.task, opened.task, opened.data.test_x, opened.data.test_y)
        assert found["test"]["compact"]["rmse"] == pytest.approx(scores.mistake, rel=1e-4)
        assert found["first"] == {"kind": "columns", "shape": [3]}
        assert json.loads((out / "compact.safetensors.json").read_text())["target"]["std"] > 100

    def test_convolutions_in_double_precision(self, tmp_path, vardrop_):
        run = trained(tmp_path / "run", model="conv:0.1", precision="64-true", validation=0.0)
        out = tmp_path / "out"
        status, said, _ = vardrop_("prune", run, "--out", out, "--target-sparsity", "0.5", "--finetune-epochs", "1")
        assert status == 0
        assert "kept no validation rows" in said
        found = json.loads((out / "prune.json").read_text())
        assert found["first"]["kind"] == "filters"
        assert {row["error"] for row in found["positions"]} == {None}
        assert found["finetuning"]["best_epoch"] == 1
        assert next(load_network(out / "compact.vdc").parameters()).dtype == torch.float64
        words = "needs the rows that training kept back"
        refused(vardrop_("prune", run, "--out", tmp_path / "b", "--max-error-increase", "0.1"), words)

    def test_goals_that_cannot_be(self, sparse, tmp_path, vardrop_):
        out = ("--out", tmp_path / "a")
        for options, words in (
            (("--threshold", "3", "--target-sparsity", "0.5"), "one goal at a time, .* leave out all but one"),
            (("--threshold", "nan"), "--threshold must be a finite log alpha, got nan"),
            (("--target-sparsity", "90"), "--target-sparsity must be a share above 0 and below 1, got 90"),
            (("--max-error-increase", "-1"), "--max-error-increase must be 0 or more, got -1"),
            (("--finetune-epochs", "-1"), "--finetune-epochs must be 0 or more"),
            (("--finetune-lr", "0.1"), "--finetune-lr needs epochs to go with"),
            (("--finetune-epochs", "1", "--finetune-lr", "0"), "--finetune-lr must be positive and finite"),
            (("--threshold", "50"), "nothing is above the threshold of 50, .* lower --threshold"),
            (("--threshold", "-9"), r"--threshold must leave a weight in every layer, .* which empties 1\.weight"),
            (("--target-sparsity", "0.9999"), "--target-sparsity must leave a weight in every layer, .* at most 0.9"),
        ):
            refused(vardrop_("prune", sparse, *out, *options), words)
            assert not (tmp_path / "a").exists()
        assert list(tmp_path.iterdir()) == []

    def test_the_limit_that_a_refusal_names_is_allowed(self, sparse, tmp_path, vardrop_):
        _, _, err = vardrop_("prune", sparse, "--out", tmp_path / "a", "--target-sparsity", "0.9999")
        most = re.search(r"at most ([\d.]+) does not", err)[1]
        assert vardrop_("prune", sparse, "--out", tmp_path / "a", "--target-sparsity", most)[0] == 0
        _, _, err = vardrop_("prune", sparse, "--out", tmp_path / "b", "--threshold", "-9")
        least = re.search(r"at least (-?[\d.]+) does not", err)[1]
        assert vardrop_("prune", sparse, "--out", tmp_path / "b", "--threshold", least)[0] == 0

    @pytest.mark.parametrize(
        ("method", "words"),
        [
            ("none", "must have learned which weights it needs, .* no learned noise"),
            ("gaussian-b", "has no learned noise; sparse-vd learns a rate for every weight"),
            ("vd-a2", "no weight was learned to be noise alone, .* train with --method sparse-vd"),
        ],
    )
    def test_runs_that_were_never_trained_sparse(self, method, words, tmp_path, vardrop_):
        run = trained(tmp_path / "run", method=method, warmup=None)
        refused(vardrop_("prune", run, "--out", tmp_path / "out"), words)
        assert not (tmp_path / "out").exists()

    def test_an_error_that_allows_nothing(self, tmp_path, vardrop_, monkeypatch):
        run = trained(tmp_path / "run")
        monkeypatch.setattr("vardrop.sparsity.search.Search.sparsest", lambda self, *_: self.order.already)
        words = "nothing can be removed for a validation error at most 0 higher"
        refused(vardrop_("prune", run, "--out", tmp_path / "out", "--max-error-increase", "0"), words)


class TestPlace:
    def test_what_is_there_stays(self, sparse, pruned, tmp_path, vardrop_):
        refused(vardrop_("prune", sparse, "--out", pruned), "which holds an earlier result; .* --overwrite")
        refused(vardrop_("prune", sparse, "--out", sparse, "--overwrite"), "another folder than that of the run")
        refused(vardrop_("prune", sparse, "--out", sparse.parent, "--overwrite"), "another folder than that of the run")
        (tmp_path / "mine.txt").write_text("x")
        refused(vardrop_("prune", sparse, "--out", tmp_path, "--overwrite"), "must be new, empty, or what")
        refused(vardrop_("prune", tmp_path / "nothing", "--out", tmp_path / "b"), "RUN must be what `vardrop train")
        (tmp_path / "file").write_text("x")
        refused(vardrop_("prune", sparse, "--out", tmp_path / "file" / "b"), "needs room and permission to write")

    def test_an_earlier_result_is_replaced_if_that_is_all_there_is(self, tmp_path, vardrop_):
        run, out = trained(tmp_path / "run"), tmp_path / "out"
        options = ("prune", run, "--out", out, "--target-sparsity")
        assert vardrop_(*options, "0.5")[0] == 0
        assert vardrop_("export", out, "--format", "compressed", "--compact")[0] == 0
        assert vardrop_(*options, "0.6", "--overwrite")[0] == 0
        found = json.loads((out / "prune.json").read_text())
        assert found["removed"] >= 0.6 * found["weights"]
        (out / "notes.txt").write_text("mine")
        refused(vardrop_(*options, "0.7", "--overwrite"), "replaces only what vardrop wrote, got .*notes.txt")
        assert json.loads((out / "prune.json").read_text()) == found
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]

    def test_nothing_is_half_written(self, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        (out / "old").write_text("old")

        def full():
            with drafted(out) as draft:
                (draft / "new").write_text("new")
                raise OSError(28, "No space left")

        with pytest.raises(OSError, match=r"needs room and permission to write .* No space left"):
            full()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert [path.name for path in out.iterdir()] == ["old"]
        with drafted(out) as draft:
            (draft / "new").write_text("new")
        assert [path.name for path in out.iterdir()] == ["new"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_without_zstandard_there_are_no_compressed_files(self, tmp_path, vardrop_, monkeypatch):
        monkeypatch.setitem(sys.modules, "zstandard", None)
        run, out = trained(tmp_path / "run"), tmp_path / "out"
        status, said, _ = vardrop_("prune", run, "--out", out, "--target-sparsity", "0.5")
        assert status == 0
        assert "No compressed file was written: needs zstandard" in said
        assert not (out / "compact.vdc").exists()
        assert "compressed file has" not in (out / "index.html").read_text(encoding="utf-8")


class TestPieces:
    def test_fine_tuning_keeps_the_best_epoch_and_the_zeros(self, sparse):
        run = open_run(sparse)
        vd.sparsify_(run.task.network, target_sparsity=0.9)
        zeros = [p == 0 for p in run.task.network.parameters()]
        state = torch.random.get_rng_state()
        held = run.validation()
        start = error_of(run.task.network, *held)
        lines = list(train_on(run.task, run.data, held, run.config, 3, 1e-3))
        assert torch.equal(state, torch.random.get_rng_state())
        assert all(torch.equal(p == 0, zero) for p, zero in zip(run.task.network.parameters(), zeros, strict=True))
        best = min([start, *(line["val_error"] for line in lines)])
        assert error_of(run.task.network, *held) == pytest.approx(best)
        assert error_of(run.task.network, *held) < start  # nine weights in ten were gone

    def test_the_divergence_has_the_weight_that_it_had_in_the_run(self, sparse):
        left = []
        for weight in (0.0, 100.0):
            run = open_run(sparse)
            vd.sparsify_(run.task.network)
            list(train_on(run.task, run.data, None, dataclasses.replace(run.config, kl_scale=weight), 2, 1e-3))
            left.append(vd.kl_divergence(run.task.network).item())
        assert left[1] < 0.98 * left[0]

    def test_a_loss_that_explodes_is_told(self, sparse):
        run = open_run(sparse)
        vd.sparsify_(run.task.network)
        with pytest.raises(FloatingPointError, match="loss must stay finite while fine-tuning"):
            list(train_on(run.task, run.data, None, run.config, 2, 1e30))

    def test_thresholds_go_from_nothing_to_the_last_weight_of_a_layer(self, sparse):
        network = open_run(sparse).task.network
        at = thresholds(network)
        assert at == sorted(at, reverse=True)
        assert 10 < len(at) <= 42
        rows = list(sweep(network, at, None, sized=False))
        assert sum(rows[0].kept) == 32 * 64 + 16 * 32 + 160
        assert min(rows[-1].kept) > 0
        assert all(row.error is None and row.bytes is None for row in rows)

    def test_the_chosen_position_takes_the_place_of_its_equal(self):
        row = {"error": None, "bytes": None, "inputs": []}
        others = [Position(threshold=t, kept=[k], **row) for t, k in ((4.0, 9), (3.0, 5), (2.0, 4))]
        chosen = Position(threshold=3.0, kept=[5], chosen=True, **row)
        assert [(p.threshold, p.chosen) for p in with_chosen(others, chosen)] == [(2, False), (3, True), (4, False)]
        tied = Position(threshold=4.0, kept=[7], chosen=True, **row)  # some of those at the clip
        assert [(p.threshold, *p.kept) for p in with_chosen(others, tied)] == [(2, 4), (3, 5), (4, 7), (4, 9)]

    def test_goals_in_words(self):
        assert Goal().words == "a threshold of 3 on log α"
        assert Goal(target_sparsity=0.9).words == "a sparsity of at least 0.9"
        assert "at most 0.01 above" in Goal(max_error_increase=0.01).words

    def test_an_architecture_comes_back(self):
        for net in (build("lenet-5", (1, 28, 28), 10, (0.2, 0.5)), build("conv:0.1", (3, 32, 32), 10)):
            assert str(rebuild(json.loads(json.dumps(describe(net))))) == str(net)
        with pytest.raises(ValueError, match=r"must have layers of .* got torch.nn.modules.activation.Tanh"):
            describe(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
        for bad in ({"kind": "Tanh"}, {"kind": "Linear", "in_features": 3}, {}, {"kind": "Sequential", "layers": 3}):
            with pytest.raises(ValueError, match="an architecture must be of"):
                rebuild(bad)

    def test_files_of_networks_that_do_not_belong_together(self, tmp_path):
        net = nn.Sequential(nn.Linear(4, 3))
        path = tmp_path / "net.safetensors"
        write_network(net, path, "safetensors", {"hint": 1})
        assert tensor_bytes(path) == {"0.weight": 48, "0.bias": 12}
        beside = tmp_path / "net.safetensors.json"
        text = beside.read_text()
        beside.write_text(text.replace('"out_features": 3', '"out_features": 5'))
        with pytest.raises(ValueError, match="must have the tensors that"):
            load_network(path)
        beside.write_text("{}")
        with pytest.raises(ValueError, match=r"must hold the architecture of net.safetensors, got KeyError"):
            load_network(path)
        beside.unlink()
        with pytest.raises(FileNotFoundError, match="the weights and their architecture side by side"):
            load_network(path)

    def test_the_model_file_has_the_config_of_the_run(self, sparse, pruned):
        assert read_tensors(pruned / "model.safetensors")[1] == read_tensors(sparse / "model.safetensors")[1]
