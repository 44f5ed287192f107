"""`vardrop predict` and `vardrop evaluate`: real runs of seconds, and answers that can be checked by hand."""

import csv
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vardrop as vd
from commands import refused
from vardrop.data import load
from vardrop.evaluation.answers import Classes, Numbers, Passes, answer, with_temperature
from vardrop.evaluation.evaluate import evaluate
from vardrop.evaluation.examples import examples, strange
from vardrop.evaluation.measures import of_numbers, selection, strangeness
from vardrop.evaluation.output import write_table
from vardrop.evaluation.runs import open_run
from vardrop.training import Config, train


def trained(folder, **options):
    settings = {"model": "mlp:1x16", "epochs": 3, "average": 0.9, "lr": 1e-2} | options
    train(Config(**settings), folder, progress=False)
    return folder


def write_csv(path, rows, header=("a", "b", "y")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def prices(n=120, seed=0):
    """y = 3 a - b + noise, with columns in very different units."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(1000, 50, n), rng.normal(0, 0.01, n)
    return [[f"{x:.6g}" for x in row] for row in np.stack([a, b, 3 * a / 50 - 100 * b + rng.normal(0, 0.3, n)], 1)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "digits", epochs=8)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "quiet", method="none")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    file = write_csv(folder / "prices.csv", prices())
    return trained(folder / "prices", data=str(file), epochs=40)


@pytest.fixture(scope="module")
def evaluated(digits):
    return evaluate(open_run(digits), Passes(samples=15), ["noise", "shuffled"], target_error=0.05)


class TestRuns:
    def test_the_validation_rows_are_those_of_the_training(self, digits):
        """With the noise off their error is what the best epoch wrote down."""
        run = open_run(digits)
        best = json.loads((digits / "summary.json").read_text())["best_epoch"]
        line = json.loads((digits / "metrics.jsonl").read_text().splitlines()[best - 1])
        x, y = run.validation()
        found = answer(run, x, Passes(samples=1))
        assert (found.predicted != y).double().mean().item() == pytest.approx(line["val_error"])

    def test_without_validation_there_is_none(self, tmp_path):
        run = open_run(trained(tmp_path / "run", validation=0.0, epochs=1))
        assert run.validation() is None
        found = evaluate(run, Passes(samples=3)).result
        assert (found["calibrated"], found["selection"]["rule"]) == (None, None)
        assert "kept no validation rows" in " ".join(found["notes"])

    @pytest.mark.parametrize(("method", "random"), [("none", False), ("binary", True), ("sparse-vd", True)])
    def test_which_methods_have_noise(self, tmp_path, method, random):
        assert open_run(trained(tmp_path / "run", method=method, epochs=1)).random is random


class TestAnswers:
    def test_classes_are_those_of_mc_predict(self, digits):
        run = open_run(digits)
        x = run.data.test_x[:40]
        found = answer(run, x, Passes(samples=20, seed=3))
        direct = vd.mc_predict(
            run.task.network, [x], 20, outputs="logits", generator=torch.Generator().manual_seed(3)
        )  # fmt: skip
        for name in ("probabilities", "predictive_entropy", "mutual_information", "variation_ratio"):
            torch.testing.assert_close(getattr(found, name), getattr(direct, name).double(), msg=name)
        again = answer(run, x, Passes(samples=20, seed=3))
        assert torch.equal(again.probabilities, found.probabilities)
        assert not torch.equal(answer(run, x, Passes(samples=20, seed=4)).probabilities, found.probabilities)

    def test_numbers_are_in_the_units_of_the_data(self, table):
        run = open_run(table)
        found = answer(run, run.data.test_x, Passes(samples=50))
        assert isinstance(found, Numbers)
        rmse = found.loss(run.data.test_y).mean().sqrt()
        assert rmse < 0.5 * run.data.test_y.std()
        quiet = answer(run, run.data.test_x, Passes(samples=1))
        summary = json.loads((table / "summary.json").read_text())
        assert quiet.loss(run.data.test_y).mean().sqrt().item() == pytest.approx(summary["test_rmse"], rel=1e-5)
        assert -quiet.log_likelihood(run.data.test_y).mean().item() == pytest.approx(summary["test_nll"], rel=1e-5)

    def test_intervals_hold_their_share_of_the_mixture(self):
        samples = torch.randn(30, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
        found = Numbers(samples, 0.5)
        for share in (0.1, 0.5, 0.95):
            low, high = found.interval(share)
            torch.testing.assert_close(found.cdf(low), torch.full((7,), (1 - share) / 2, dtype=torch.float64))
            torch.testing.assert_close(found.cdf(high), torch.full((7,), (1 + share) / 2, dtype=torch.float64))

    def test_honest_intervals_are_observed_to_be(self):
        generator = torch.Generator().manual_seed(1)
        samples = torch.randn(40, 4000, dtype=torch.float64, generator=generator)
        which = torch.randint(40, (1, 4000), generator=generator)
        y = samples.gather(0, which)[0] + 0.5 * torch.randn(4000, generator=generator)
        for row in of_numbers(Numbers(samples, 0.5), y)["intervals"]:
            error = math.sqrt(row["nominal"] * (1 - row["nominal"]) / 4000)
            assert abs(row["observed"] - row["nominal"]) < 4 * error + 1e-3, row

    def test_a_temperature_divides_the_logits(self):
        logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(with_temperature(logits.softmax(-1), 2.5), (logits / 2.5).softmax(-1))
        assert with_temperature(torch.tensor([[1.0, 0.0]]), 3.0).isfinite().all()

    def test_refusals(self, digits, quiet):
        run = open_run(quiet)
        with pytest.raises(ValueError, match="a run without noise answers the same every time, got 5 passes of none"):
            answer(run, run.data.test_x, Passes(samples=5))
        with pytest.raises(ValueError, match="there must be at least one example to predict, got none"):
            answer(run, run.data.test_x[:0], Passes(samples=1))


class TestExamples:
    def test_a_new_file_is_standardised_by_the_training_rows(self, table, tmp_path):
        run = open_run(table)
        whole = prices()
        found = examples(run, str(write_csv(tmp_path / "same.csv", whole)))
        own = torch.cat([run.data.train_x, run.data.test_x])
        np.testing.assert_allclose(sorted(found.x.tolist()), sorted(own.tolist()), rtol=1e-5)
        one = examples(run, str(write_csv(tmp_path / "one.csv", whole[:1])))  # has no spread of its own
        torch.testing.assert_close(one.x, found.x[:1])
        assert one.y.item() == pytest.approx(float(whole[0][2]))

    def test_a_run_whose_file_has_changed_is_refused(self, tmp_path, vardrop_):
        file = write_csv(tmp_path / "prices.csv", prices())
        run = trained(tmp_path / "run", data=str(file), epochs=1)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        file.rename(elsewhere / file.name)
        with pytest.raises(FileNotFoundError, match="there must be a file"):
            open_run(run)
        assert open_run(run, elsewhere).data.columns == ("a", "b", "y")  # the same file in another place will do
        status, _, said = vardrop_("predict", run, "--data-dir", elsewhere, "--out", elsewhere / file.name)
        assert (status, "--out must not be a table that is read" in " ".join(said.split())) == (2, True)
        write_csv(file, [*prices(), ["1", "2", "3"]])
        words = r"prices.csv must be the file that .* was trained on, got another \(SHA-256 .*; put the old file back"
        with pytest.raises(ValueError, match=words):
            open_run(run)
        with pytest.raises(ValueError, match=words):
            train(Config(model="mlp:1x16", epochs=3, average=0.9, lr=1e-2, data=str(file)), run, resume=True)
        on = Config(model="mlp:1x16", epochs=1, data=str(file), start=str(run))  # weights are welcome on new rows
        assert train(on, tmp_path / "on", progress=False)["epochs_run"] == 1

    def test_the_target_may_be_missing_or_empty(self, table, tmp_path):
        run = open_run(table)
        bare = examples(run, str(write_csv(tmp_path / "bare.csv", [row[:2] for row in prices(5)], ("a", "b"))))
        assert (bare.known.any().item(), bare.x.shape) == (False, (5, 2))
        half = examples(run, str(write_csv(tmp_path / "half.csv", [["1", "2", "3"], ["1", "2", ""]])))
        assert half.known.tolist() == [True, False]

    def test_classes_of_a_file_are_found_by_name(self, tmp_path):
        rows = [[i % 7, i % 3, "high" if i % 7 > 3 else "low"] for i in range(60)]
        file = write_csv(tmp_path / "kinds.csv", rows)
        run = open_run(trained(tmp_path / "run", data=str(file), epochs=1))
        found = examples(run, str(write_csv(tmp_path / "new.csv", [[1, 2, "low"], [5, 1, "high"], [5, 1, ""]])))
        assert [run.data.classes[i] for i in found.y[:2]] == ["low", "high"]
        assert found.known.tolist() == [True, True, False]
        with pytest.raises(ValueError, match=r"label in line 2 of .* must be a class of the run, high, low, got 'mid'"):
            examples(run, str(write_csv(tmp_path / "new.csv", [[1, 2, "mid"]])))

    @pytest.mark.parametrize(
        ("header", "rows", "words"),
        [
            (("b", "a", "y"), [[1, 2, 3]], r"columns of .* must be those of the run's own file, a, b, y .*got b, a, y"),
            (("a", "b", "c", "y"), [[1, 2, 3, 4]], "must be those of the run's own file"),
            (("a", "b", "y"), [[1, 2, "dear"]], "target in line 2 of .* must be a number, got 'dear'"),
            (("a", "b", "y"), [[1, "", 3]], "every column of .* finite numbers, got '' in line 2, column 2"),
            (("a", "b", "y"), [], "must have rows below its header, got none"),
            ((1, 2, 3, 4), [[1, 2, 3, 4]], "must have 2 columns, or 3 with the target, got 4"),
        ],
    )
    def test_files_that_do_not_fit(self, table, tmp_path, header, rows, words):
        with pytest.raises(ValueError, match=words):
            examples(open_run(table), str(write_csv(tmp_path / "new.csv", rows, header)))

    def test_sets_that_do_not_fit(self, digits, table, tmp_path, monkeypatch):
        run = open_run(digits)
        file = write_csv(tmp_path / "new.csv", [[1, 2, 3]])
        with pytest.raises(ValueError, match=r"a run on images must be given images, got the table .*new\.csv"):
            examples(run, str(file))
        with pytest.raises(
            ValueError, match="a run on a table must be given a CSV file with its columns, got 'digits'"
        ):
            examples(open_run(table), "digits")
        with pytest.raises(ValueError, match="split must be one of test, train, got 'val'"):
            examples(run, split="val")
        with pytest.raises(ValueError, match="a strange set must not be the run's own, got 'digits'"):
            strange(run, "digits", 10, 0)
        other = load("digits")
        large = torch.zeros(3, 1, 28, 28)
        pictures = {"name": "Pictures", "task": "classification", "images": True, "classes": ("A", "B")}
        made = type(other)(
            train_x=large[:0], train_y=other.train_y[:0], test_x=large, test_y=other.test_y[:3], **pictures
        )
        monkeypatch.setattr("vardrop.evaluation.examples.load", lambda *_: made)
        with pytest.raises(ValueError, match="shape of those of digits, 1 × 8 × 8, got Pictures of 1 × 28 × 28"):
            strange(run, "mnist", 10, 0)
        made = type(other)(
            train_x=large[:0, :, :8, :8], train_y=other.train_y[:0], test_x=large[..., :8, :8], test_y=other.test_y[:3],
            **pictures,
        )  # fmt: skip
        found = examples(run, "mnist")
        assert not found.known.any()
        assert found.note == "The classes of Pictures are not those of digits, so its labels are left out."
        with pytest.raises(ValueError, match="Pictures must have train rows, got none; choose another --split"):
            examples(run, "mnist", "train")
        made = load("digits")
        monkeypatch.setattr("vardrop.evaluation.examples.load", lambda *_: type(made)(**vars(made) | {"images": False}))
        with pytest.raises(ValueError, match="a run on images must be given images, got 'tables' for a run on digits"):
            examples(run, "tables")

    def test_shuffled_keeps_what_one_pixel_or_column_says(self, digits, table):
        run = open_run(digits)
        found = strange(run, "shuffled", 50, seed=0)
        own = run.data.test_x[:50]
        assert not torch.equal(found.x, own)
        torch.testing.assert_close(found.x.flatten(1).sort(1).values, own.flatten(1).sort(1).values)
        run = open_run(table)
        found, own = strange(run, "shuffled", 20, seed=0), run.data.test_x[:20]
        assert not torch.equal(found.x, own)
        torch.testing.assert_close(found.x.sort(0).values, own.sort(0).values)
        assert strange(run, "noise", 20, seed=0).x.abs().max() <= 5
        assert not found.known.any()


class TestMeasures:
    def answers(self, n=300, seed=0):
        generator = torch.Generator().manual_seed(seed)
        p = (3 * torch.randn(n, 4, generator=generator, dtype=torch.float64)).softmax(-1)
        entropy = torch.special.entr(p).sum(-1)
        return Classes(p, entropy, torch.rand(n, generator=generator).double(), torch.zeros(n), 10), p.multinomial(
            1, generator=generator
        )[:, 0]

    def test_the_threshold_is_chosen_on_the_rows_kept_back_and_told_of_the_others(self):
        test, back = self.answers(seed=0), self.answers(seed=1)
        found = selection(test, back, 0.1)
        rule = found["rule"]
        kept = back[0].doubt <= rule["threshold"]
        assert back[0].loss(back[1])[kept].mean().item() == pytest.approx(rule["validation"]["error"])
        assert rule["validation"]["error"] <= 0.1
        kept = test[0].doubt <= rule["threshold"]
        assert rule["test"]["coverage"] == pytest.approx(kept.double().mean().item())
        assert rule["test"]["error"] == pytest.approx(test[0].loss(test[1])[kept].mean().item())
        half = selection(test, back, None)["rule"]["target_error"]
        assert half == pytest.approx(0.5 * back[0].loss(back[1]).mean().item())

    def test_accuracy_at_a_coverage_by_hand(self):
        answers, y = self.answers()
        order = answers.doubt.argsort()
        for row in selection((answers, y), None, None)["at"]:
            kept = order[: math.ceil(row["coverage"] * 300)]
            assert row["accuracy"] == pytest.approx(1 - answers.loss(y)[kept].mean().item())

    def test_no_threshold_where_none_is_good_enough(self):
        answers, y = self.answers()
        wrong = (answers.predicted + 1) % 4
        assert selection((answers, y), (answers, wrong), 0.1)["rule"] is None

    def test_strangeness_is_how_often_a_stranger_scores_higher(self):
        inside, outside = self.answers(60, 0)[0], self.answers(50, 1)[0]
        found, bins = strangeness(inside, {"away": outside})
        for key, scores in inside.scores.items():
            pairs = (outside.scores[key][None] > scores[:, None]).double().mean().item()
            assert found["away"][key]["auroc"] == pytest.approx(pairs)
            assert [sum(bins[key]["shares"]["away"]), sum(bins[key]["test"])] == pytest.approx([1, 1])
        assert strangeness(inside, {}) == ({}, {})


class TestPredict:
    def read(self, path):
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def test_a_row_for_every_test_example(self, vardrop_, digits, tmp_path):
        out = tmp_path / "new" / "answers.csv"
        status, said, err = vardrop_("predict", digits, "--samples", 10, "--out", out)
        assert (status, err) == (0, "")
        rows = self.read(out)
        data = load("digits")
        names = ["index", "label", "predicted", "probability", "entropy", "mutual_information", "variation_ratio"]
        assert list(rows[0]) == names
        assert [row["label"] for row in rows] == [data.classes[i] for i in data.test_y]
        error = np.mean([row["label"] != row["predicted"] for row in rows])
        assert f"error {100 * error:.2f} %" in said
        assert "359 examples of digits, 10 passes with the noise on" in said
        most = max(rows, key=lambda row: float(row["entropy"]))
        first = next(line for line in said.splitlines() if re.match(r"\s*\d+ ", line))
        assert first.split()[0] == most["index"]
        assert f"written: {out}" in said

    def test_the_same_seed_gives_the_same_file(self, vardrop_, digits, tmp_path):
        files = [tmp_path / f"{i}.csv" for i in range(3)]
        for file, seed in zip(files, (1, 1, 2), strict=True):
            vardrop_("predict", digits, "--samples", 3, "--limit", 20, "--seed", seed, "--out", file)
        assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
        assert len(self.read(files[0])) == 20

    def test_npz_and_parquet_have_what_csv_has(self, vardrop_, digits, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is of the extra parquet")
        for suffix in ("csv", "npz", "parquet"):
            out = tmp_path / f"answers.{suffix}"
            assert vardrop_("predict", digits, "--samples", 3, "--limit", 30, "--out", out)[0] == 0
        rows = self.read(tmp_path / "answers.csv")
        columns = parquet.read_table(tmp_path / "answers.parquet").to_pydict()
        with np.load(tmp_path / "answers.npz") as arrays:
            assert arrays["probabilities"].shape == (30, 10)
            for name in rows[0]:
                text = [row[name] for row in rows]
                assert list(map(str, columns[name])) == list(map(str, arrays[name].tolist()))
                if name == "predicted":
                    assert text == columns[name]
                else:
                    assert list(map(float, text)) == pytest.approx(list(map(float, columns[name])), rel=1e-5)

    def test_numbers_of_a_new_table(self, vardrop_, table, tmp_path):
        new = write_csv(tmp_path / "new.csv", [row[:2] for row in prices(12, seed=5)], ("a", "b"))
        out = tmp_path / "answers.csv"
        status, said, err = vardrop_("predict", table, "--data", new, "--samples", 30, "--out", out)
        assert (status, err) == (0, "")
        rows = self.read(out)
        assert list(rows[0]) == ["index", "mean", "std", "total_std", "lower", "upper"]
        truth = [float(row[2]) for row in prices(12, seed=5)]
        means = [float(row["mean"]) for row in rows]
        assert np.corrcoef(truth, means)[0, 1] > 0.9
        for row in rows:
            low, mean, high = (float(row[name]) for name in ("lower", "mean", "upper"))
            assert low < mean < high
            assert float(row["std"]) < float(row["total_std"])
        assert "least certain first, by std" in said
        known = write_csv(tmp_path / "known.csv", prices(12, seed=5))
        assert (
            "of the targets between lower and upper" in vardrop_("predict", table, "--data", known, "--samples", 3)[1]
        )

    def test_a_temperature_changes_the_probability_alone(self, vardrop_, digits, tmp_path):
        said = {}
        for name, options in {"plain": (), "soft": ("--temperature", 3), "fitted": ("--calibrate",)}.items():
            status, words, err = vardrop_(
                "predict", digits, "--samples", 5, "--limit", 40, "--out", tmp_path / f"{name}.csv", *options
            )
            assert (status, err) == (0, "")
            said[name] = words
        plain, soft, fitted = (self.read(tmp_path / f"{name}.csv") for name in ("plain", "soft", "fitted"))
        assert all(float(s["probability"]) < float(p["probability"]) for s, p in zip(soft, plain, strict=True))
        assert [row["predicted"] for row in soft] == [row["predicted"] for row in plain]
        assert [row["entropy"] for row in soft] == [row["entropy"] for row in plain] == [r["entropy"] for r in fitted]
        assert ", temperature 3:" in said["soft"]
        assert ", temperature" not in said["plain"]

    def test_without_noise_one_pass_will_do(self, vardrop_, quiet, tmp_path):
        refused(vardrop_("predict", quiet), "a run without noise answers the same.* ask for one with --samples 1")
        status, said, err = vardrop_("predict", quiet, "--samples", 1, "--out", tmp_path / "a.csv")
        assert (status, err) == (0, "")
        assert "one pass with the noise off" in said
        assert "mutual_information" not in self.read(tmp_path / "a.csv")[0]
        summary = json.loads((quiet / "summary.json").read_text())
        assert f"error {100 * summary['test_error']:.2f} %" in said

    def test_training_rows(self, vardrop_, digits):
        assert "1438 examples" in vardrop_("predict", digits, "--split", "train", "--samples", 1)[1]


class TestEvaluate:
    def test_the_folder_and_the_screen(self, vardrop_, digits, tmp_path):
        command = ("evaluate", digits, "--samples", 5, "--ood", "noise", "--target-error", 0.05, "--out", tmp_path)
        status, said, err = vardrop_(*command)
        assert (status, err) == (0, "")
        assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "evaluation.html"}
        result = json.loads((tmp_path / "evaluation.json").read_text())
        for words in (
            "error", "Brier score", "calibration error (ECE)", "at temperature", "AURC", "accuracy on the surest 95",
            "threshold for 5", "strange: noise", "AUROC, mutual information", f"page: {tmp_path / 'evaluation.html'}",
        ):  # fmt: skip
            assert words in said, words
        page = (tmp_path / "evaluation.html").read_text(encoding="utf-8")
        assert result["command"] in page
        assert "--target-error 0.05" in result["command"]
        assert page.count("data:image/png;base64,") > 16
        assert "Least certain" in page
        again = (tmp_path / "evaluation.json").read_bytes()
        assert vardrop_(*command)[0] == 0
        strip = re.compile(rb'"seconds": [\d.]+')
        assert strip.sub(b"", (tmp_path / "evaluation.json").read_bytes()) == strip.sub(b"", again)

    def test_the_numbers_by_hand(self, evaluated):
        result, answers, y = evaluated.result, evaluated.answers, evaluated.y
        p = answers.probabilities
        assert result["test"]["error"] == pytest.approx((p.argmax(1) != y).double().mean().item())
        assert result["test"]["nll"] == pytest.approx(-p[torch.arange(len(y)), y].log().mean().item())
        onehot = torch.nn.functional.one_hot(y, 10)
        assert result["test"]["brier"] == pytest.approx((p - onehot).square().sum(1).mean().item())
        counts = [row["count"] for row in result["reliability"]["before"]]
        assert sum(counts) == len(y) == result["examples"]
        gaps = [
            row["count"] * abs(row["confidence"] - row["accuracy"])
            for row in result["reliability"]["before"]
            if row["count"]
        ]
        assert result["test"]["ece"] == pytest.approx(sum(gaps) / len(y))
        assert result["calibrated"]["error"] == result["test"]["error"]
        assert result["selection"]["aurc"] < result["test"]["error"]
        assert result["referral"]["loss"][0] == pytest.approx(result["test"]["error"])
        json.dumps(result, allow_nan=False)

    def test_an_impossible_label_is_told_and_not_written_as_infinity(self, digits, monkeypatch):
        run = open_run(digits)
        found = answer(run, run.data.test_x[:30], Passes(samples=2))
        never = torch.zeros(30, 10, dtype=torch.float64)
        never[torch.arange(30), (run.data.test_y[:30] + 1) % 10] = 1
        made = Classes(never, found.predictive_entropy, found.mutual_information, found.variation_ratio, 2)
        monkeypatch.setattr("vardrop.evaluation.evaluate.answer", lambda *_: made)
        monkeypatch.setattr(type(run), "validation", lambda _: None)
        result = evaluate(run, Passes(samples=2), limit=30).result
        assert (result["test"]["nll"], result["test"]["error"]) == (None, 1)
        assert "held to be impossible" in " ".join(result["notes"])

    def test_strange_files_keep_their_names_apart(self, table, tmp_path):
        for folder, seed in (("one", 1), ("two", 2)):
            (tmp_path / folder).mkdir()
            write_csv(tmp_path / folder / "test.csv", prices(20, seed))
        files = [str(tmp_path / folder / "test.csv") for folder in ("one", "two")]
        result = evaluate(open_run(table), Passes(samples=3), files).result
        assert list(result["ood"]) == list(result["histograms"]["std"]["shares"]) == files
        assert list(evaluate(open_run(table), Passes(samples=3), files[:1]).result["ood"]) == ["test"]

    def test_examples_to_look_at(self, evaluated):
        rows = evaluated.sure_and_wrong(5)
        assert (evaluated.answers.predicted[rows] != evaluated.y[rows]).all()
        sure = evaluated.answers.probabilities.amax(1)
        wrong = evaluated.answers.predicted != evaluated.y
        assert sure[rows[0]] == sure[wrong].max()
        assert len(evaluated.sure_and_wrong(10_000)) == wrong.sum()
        assert evaluated.answers.doubt[evaluated.most_doubtful(1)] == evaluated.answers.doubt.max()

    def test_temperature_is_never_fitted_on_test_rows(self, digits, evaluated):
        run = open_run(digits)
        data = type(run.data)(**vars(run.data) | {"test_y": run.data.test_y.flip(0)})
        other = evaluate(type(run)(run.path, run.config, data, run.task), Passes(samples=15), target_error=0.05).result
        assert other["calibrated"]["temperature"] == evaluated.result["calibrated"]["temperature"]
        assert other["selection"]["rule"]["threshold"] == evaluated.result["selection"]["rule"]["threshold"]
        assert other["test"]["error"] != evaluated.result["test"]["error"]

    def test_without_noise_it_is_said(self, vardrop_, quiet, tmp_path):
        status, said, err = vardrop_("evaluate", quiet, "--out", tmp_path, "--ood", "shuffled")
        assert (status, err) == (0, "")
        assert "The method none has no noise, so this is one deterministic pass" in said
        assert "mutual information" not in said.split("no mutual information.")[1]
        result = json.loads((tmp_path / "evaluation.json").read_text())
        assert list(result["ood"]["shuffled"]) == ["examples", "predictive_entropy"]

    @pytest.mark.parametrize("samples", [1, 20])
    def test_numbers(self, vardrop_, table, samples):
        status, said, err = vardrop_("evaluate", table, "--samples", samples, "--ood", "noise")
        assert (status, err) == (0, "")
        result = json.loads((table / "evaluation.json").read_text())
        assert ("std" in result["ood"]["noise"]) == (samples > 1)
        assert result["referral"]["loss"][0] == pytest.approx(result["test"]["rmse"] ** 2)
        for words in ("RMSE", "log-likelihood", "within 95", "AURC", "RMSE on the surest 80"):
            assert words in said, words
        page = (table / "evaluation.html").read_text(encoding="utf-8")
        assert "Furthest off" in page
        assert ("equally sure of all its answers" in page) == (samples == 1)

    def test_a_perfect_model_has_no_temperature(self, digits, monkeypatch):
        run = open_run(digits)
        x = run.data.test_x[:50]
        said = answer(run, x, Passes(samples=1)).predicted
        monkeypatch.setattr(type(run), "validation", lambda _: (x, said))  # labels that it is never wrong about
        result = evaluate(run, Passes(samples=1)).result
        assert result["calibrated"] is None
        assert "has no best one" in " ".join(result["notes"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("samples", [1, 5])
def test_on_another_device(vardrop_, digits, tmp_path, samples):
    for command in ("predict", "evaluate"):
        status, _, err = vardrop_(command, digits, "--device", "cuda", "--samples", samples, "--limit", 20)
        assert status == 0, err


class TestWhatAUserCanPutRight:
    @pytest.mark.parametrize(
        ("command", "options", "words"),
        [
            ("predict", ["--samples", "0"], "samples must be at least 1, got 0; 1 is a pass with the noise off"),
            ("evaluate", ["--samples", "-3"], "samples must be at least 1, got -3"),
            ("predict", ["--limit", "0"], "--limit must be at least 1, got 0; leave it out for all"),
            ("predict", ["--out", "answers.xlsx"], r"--out must end in \.csv, \.parquet, \.npz, which says the format"),
            ("predict", ["--max-memory", "lots"], "--max-memory must be a size such as 500M or 2G, got 'lots'"),
            ("predict", ["--engine", "warp"], "engine must be one of auto, vmap, loop, got 'warp'"),
            ("predict", ["--temperature", "0"], "temperature must be above 0 and finite, got 0"),
            ("predict", ["--temperature", "2", "--calibrate"], "one of --temperature and --calibrate, got both"),
            ("predict", ["--data", "digit"], "name must be digits, .* did you mean digits"),
            ("predict", ["--data", "nothing.csv"], r"a run on images must be given images, got the table nothing\.csv"),
            ("predict", ["--split", "validation"], "split must be one of test, train, got 'validation'"),
            ("evaluate", ["--target-error", "-1"], "target_error must be finite and at least 0, got -1"),
            ("evaluate", ["--ood", "nois"], "name must be digits"),
            ("evaluate", ["--ood", "digits"], "a strange set must not be the run's own"),
            ("predict", ["--device", "tpu"], "device must be one of this machine, such as cpu, .* got 'tpu'"),
            ("evaluate", ["--device", "meta"], "device must be .* got 'meta': what is there has no numbers"),
        ],
    )
    def test_options(self, vardrop_, digits, command, options, words):
        refused(vardrop_(command, digits, *options), words)

    @pytest.mark.parametrize("command", ["predict", "evaluate"])
    def test_runs(self, vardrop_, digits, tmp_path, command):
        refused(vardrop_(command, tmp_path / "nothing"), r"RUN must be what `vardrop train.* \(no such folder\)")
        refused(vardrop_(command, tmp_path), r"\(a folder without config.json\); train one")
        for name in ("b", "a"):
            (tmp_path / "several" / name).mkdir(parents=True)
            (tmp_path / "several" / name / "config.json").touch()
        refused(vardrop_(command, tmp_path / "several"), r"take one of the 2 runs in it, such as .*several/a$")
        (tmp_path / "config.json").write_text((digits / "config.json").read_text())
        refused(
            vardrop_(command, tmp_path), "a run must have ended, got .* go on with `vardrop train --out .* --resume`"
        )
        for name in ("summary.json", "model.safetensors"):
            (tmp_path / name).write_bytes(b"broken")
        refused(vardrop_(command, tmp_path), r"model\.safetensors is damaged")
        refused(vardrop_(command), "Missing argument 'RUN'")

    def test_places_that_cannot_be_written_to(self, vardrop_, digits, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        words = r"needs room and permission to write .*, got .*; choose another --out"
        refused(vardrop_("predict", digits, "--samples", 1, "--out", tmp_path / "file" / "a.csv"), words)
        refused(vardrop_("evaluate", digits, "--samples", 1, "--out", tmp_path / "file"), words)
        monkeypatch.setattr("os.access", lambda _, mode: mode != os.W_OK)
        monkeypatch.setattr("vardrop.evaluation.answers.answer", None)  # it says so before any of the work
        refused(vardrop_("evaluate", digits, "--out", tmp_path / "closed"), r"write .*closed, got Permission denied")
        assert not list(tmp_path.glob(".*"))

    def test_a_full_disk_keeps_the_old_file(self, tmp_path, monkeypatch):
        out = write_table({"a": [1]}, tmp_path / "a.csv")

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pathlib.Path.replace", full)
        with pytest.raises(OSError, match=r"needs room and permission to write .*, got No space left on device"):
            write_table({"a": [2]}, out)
        assert out.read_text() == "a\n1\n"
        assert len(list(tmp_path.iterdir())) == 1

    def test_parquet_without_its_library(self, vardrop_, digits, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
        out = tmp_path / "a.parquet"
        refused(vardrop_("predict", digits, "--out", out), r"needs pyarrow, .* pip install 'vardrop\[parquet\]'")

    def test_a_temperature_is_for_classes(self, vardrop_, table):
        result = vardrop_("predict", table, "--samples", 1, "--temperature", 2)
        refused(result, "a temperature is for classes, got 2.0 for a run on prices, which predicts numbers")
        words = "a temperature is fitted on the validation rows of a classifier, got .*, one that predicts numbers"
        refused(vardrop_("predict", table, "--samples", 1, "--calibrate"), words)

    def test_help_teaches(self, vardrop_):
        for command in ("predict", "evaluate"):
            status, out, _ = vardrop_(command, "--help")
            assert status == 0
            assert f"vardrop {command} runs/first" in out
            assert command in vardrop_()[1]


@pytest.mark.parametrize(
    ("text", "size"), [("500M", 500 * 2**20), ("2g", 2 * 2**30), ("1.5 KiB", 1536), ("4096", 4096)]
)
def test_sizes(text, size):
    from vardrop.evaluation.commands import _bytes

    assert _bytes(text) == size


def test_a_table_that_is_read_is_not_written_over(vardrop_, table, tmp_path):
    new = write_csv(tmp_path / "new.csv", [row[:2] for row in prices(12, seed=5)], ("a", "b"))
    for out, options in ((new, ["--data", new]), (Path(open_run(table).config.data), [])):
        before = out.read_bytes()
        refused(
            vardrop_("predict", table, *options, "--samples", 2, "--out", out), "--out must not be a table that is read"
        )
        assert out.read_bytes() == before
