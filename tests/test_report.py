"""The pages are made from files alone, so the runs here are synthetic: known numbers in, and the page must say them."""

import dataclasses
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from safetensors.numpy import save_file

from vardrop.report import figures, write, write_comparison
from vardrop.report.examples import data_uri
from vardrop.report.reading import read

WEIGHTS = ("0.weight", "2.weight", "4.weight")


def quantiles(rates):
    return {"mean": float(rates.mean())} | {
        f"q{q:02d}": float(np.quantile(rates, q / 100)) for q in (5, 25, 50, 75, 95)
    }


def histogram(rates):
    counts, edges = np.histogram(rates, bins=30)
    return {
        "mean": float(rates.mean()), "min": float(rates.min()), "max": float(rates.max()),
        "edges": edges.tolist(), "counts": counts.tolist(),
    }  # fmt: skip


def make_run(path, method="vd-a2", task="classification", epochs=40, summary=True, examples=True, seed=0, channels=1):
    rng = np.random.default_rng(seed)
    noisy = method not in ("none", "binary")
    classification = task == "classification"
    error = "error" if classification else "rmse"
    path.mkdir(parents=True)
    config = {
        "data": "digits" if classification else "uci:yacht", "model": "mlp:3x400", "method": method, "sharing": None,
        "estimator": "local", "epochs": 100, "batch_size": 128, "lr": 1e-3, "seed": seed, "resume_me": False,
        "tensorboard": True, "data_dir": "my data",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    lines = []
    for epoch in range(1, epochs + 1):
        t = 1 - np.exp(-epoch / 12)
        rates = {
            name: quantiles(np.clip(rng.normal(0.2 + (0.1 + 0.1 * i) * t, 0.02 + 0.07 * t, 400), 0.01, 0.5))
            for i, name in enumerate(WEIGHTS if noisy else ())
        }
        train = 2.2 * np.exp(-epoch / 6) + 0.03
        val = 2.0 * np.exp(-epoch / 5) + 0.12 + 0.0008 * epoch + rng.normal(0, 0.003)
        line = {
            "epoch": epoch, "seconds": 0.4, "train_nll": train, "kl": 900 - 250 * t if noisy else 0.0,
            "kl_scale": 1 / 3, "val_nll": val, f"val_{error}": 0.02, "rates": rates,
        }  # fmt: skip
        lines.append(json.dumps(line))
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if summary:
        final = {
            name: histogram(np.clip(rng.normal(0.3 + 0.1 * i, 0.09, 400), 0.01, 0.5))
            for i, name in enumerate(WEIGHTS if noisy else ())
        }
        result = {
            f"test_{error}": 0.0187, "test_nll": 0.0712, "kl": 654.321 if noisy else 0.0, "rates": final,
            "seconds": 83.0, "epochs_run": epochs, "best_epoch": 26, "parameters": 350_410, "config": config,
            "device": "cpu, 2 threads",
            "versions": {"vardrop": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
        }  # fmt: skip
        (path / "summary.json").write_text(json.dumps(result))
    if examples:
        n = 16
        columns = {
            "label": rng.integers(0, 10, n) if classification else rng.normal(10, 4, n),
            "predicted": rng.integers(0, 10, n) if classification else rng.normal(10, 4, n),
            "score": rng.uniform(0.1, 9, n).astype(np.float32),
            "kind": np.repeat([0, 1], n // 2).astype(np.uint8),
        }
        if classification:
            columns["image"] = rng.integers(0, 256, (n, channels, 8, 8)).astype(np.uint8)
        else:
            columns["features"] = rng.normal(size=(n, 13)).astype(np.float32)
        save_file(columns, path / "examples.safetensors")
    return path


def page(path):
    """The HTML without the library inside it, to look for words."""
    return re.sub(r"<script>.*?</script>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


class TestPageOfARun:
    def test_the_headline_has_the_results_and_where_they_come_from(self, run):
        out = write(run)
        assert out == run / "report.html"
        text = page(out)
        for word in ("vd-a2 on digits", "1.87", "0.0712", "654.3", "1 min 23 s", "torch 2.13.0", "cpu, 2 threads"):
            assert word in text, word
        assert "variational dropout A with a third of the divergence" in text
        assert "350\N{NARROW NO-BREAK SPACE}410" in text

    def test_plotly_is_inside_once_and_nothing_is_loaded(self, run):
        text = write(run).read_text(encoding="utf-8")
        assert text.count("plotly.js v") == 1
        assert "default-src 'none'" in text  # the browser itself refuses whatever is overlooked here
        rest = page(run / "report.html")
        assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=[\"']?(https?:)?//", rest)
        assert not re.search(r"@import|url\(", rest)

    def test_the_same_files_make_the_same_page(self, run):
        first = write(run).read_bytes()
        assert write(run).read_bytes() == first

    def test_the_command_says_all_settings(self, run):
        command = read(run).command
        assert command.startswith("vardrop train --data digits --model mlp:3x400 --method vd-a2 --estimator local")
        assert "--batch-size 128 --lr 0.001 --seed 0 --tensorboard --data-dir 'my data' --out run-again" in command
        assert "sharing" not in command
        assert "resume" not in command

    def test_the_command_has_only_options_that_there_are(self, run):
        from typer.main import get_command

        from vardrop.cli import app
        from vardrop.training.config import Config

        settings = dataclasses.asdict(Config()) | {
            "tensorboard": True,
            "sharing": "layer",
            "data_dir": "data",
            "warmup": 5,
            "kl_scale": 0.5,
            "start": "runs/dense",
        }
        (run / "config.json").write_text(json.dumps(settings))
        given = {word for word in read(run).command.split() if word.startswith("--")}
        known = {option for parameter in get_command(app).commands["train"].params for option in parameter.opts}
        assert given <= known
        assert given == {f"--{name.replace('_', '-')}" for name in settings} | {"--out"}

    def test_pictures_have_the_pixels_and_the_labels(self, run):
        found = read(run).examples
        text = page(write(run))
        worst = np.flatnonzero(found.kind == 0)
        worst = worst[found.score[worst].argmax()]
        assert text.count("data:image/png;base64,") == 16
        first = text.index("data:image/png")
        assert text.index(data_uri(found.inputs[worst])) == first
        assert f"true <b>{found.label[worst]}</b>" in text[first:].split("</figure>")[0]

    @pytest.mark.parametrize("channels", [1, 3])
    def test_a_png_gives_back_the_image(self, channels):
        import base64
        import io

        from PIL import Image

        image = np.random.default_rng(0).integers(0, 256, (channels, 5, 7)).astype(np.uint8)
        with Image.open(io.BytesIO(base64.b64decode(data_uri(image).split(",")[1]))) as png:
            back = np.asarray(png).reshape(5, 7, channels)
        np.testing.assert_array_equal(np.moveaxis(back, -1, 0), image)

    def test_class_names_stand_where_the_file_has_them(self, run):
        columns = {
            "image": np.zeros((1, 1, 2, 2), np.uint8), "label": np.array([1]), "predicted": np.array([0]),
            "score": np.ones(1, np.float32), "kind": np.zeros(1, np.uint8),
        }  # fmt: skip
        save_file(columns, run / "examples.safetensors", metadata={"classes": '["Sandal", "Bag"]'})
        text = page(write(run))
        assert "true <b>Bag</b>" in text
        assert '<b class="wrong">Sandal</b>' in text
        assert "none of this kind" in text  # no uncertain ones in this file

    def test_regression_has_a_table_of_features(self, tmp_path):
        run = make_run(tmp_path / "run", task="regression")
        text = page(write(run))
        found = read(run).examples
        worst = found.inputs[np.flatnonzero(found.kind == 0)[found.score[found.kind == 0].argmax()]]
        assert "test RMSE" in text
        assert "Furthest off" in text
        assert "The first 10 of 13 features are shown. Features are standardised" in text
        assert "".join(f'<td class="n">{value:.2f}</td>' for value in worst[:10]) in text

    def test_text_from_files_is_escaped(self, run):
        config = json.loads((run / "config.json").read_text())
        config["data"] = "folder/<script>alert(1)</script>"
        (run / "config.json").write_text(json.dumps(config))
        for name in ("metrics.jsonl", "summary.json"):
            text = (run / name).read_text().replace("0.weight", "<b>w</b>").replace("cpu, 2 threads", "<i>cpu</i>")
            (run / name).write_text(text)
        text = write(run).read_text(encoding="utf-8")
        for markup in ("<script>alert", "<b>w</b>", "<i>cpu</i>"):
            assert markup not in text
        assert "&lt;script&gt;alert" in text


class TestFigures:
    def test_curves_are_the_numbers_of_the_file(self, run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        traces = {trace.name: trace for trace in figures.curves(read(run)).data}
        for name, key in (("training", "train_nll"), ("validation", "val_nll"), ("KL", "kl")):
            assert list(traces[name].x) == [line["epoch"] for line in lines]
            assert list(traces[name].y) == [line[key] for line in lines]

    def test_the_best_epoch_is_marked_in_both_panels(self, run):
        figure = figures.curves(read(run))
        assert [shape.x0 for shape in figure.layout.shapes] == [26, 26]
        assert [note.text for note in figure.layout.annotations] == ["best epoch 26"]

    def test_a_loss_that_is_not_finite_is_a_gap(self, run):
        lines = (run / "metrics.jsonl").read_text().splitlines()
        broken = json.loads(lines[3]) | {"val_nll": float("nan")}
        (run / "metrics.jsonl").write_text("\n".join([*lines[:3], json.dumps(broken), *lines[4:]]))
        validation = next(trace for trace in figures.curves(read(run)).data if trace.name == "validation")
        assert validation.y[3] is None
        assert None not in validation.y[4:]

    def test_negative_losses_have_a_linear_axis(self, tmp_path):
        run = make_run(tmp_path / "run")
        text = (run / "metrics.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in text]
        assert figures.curves(read(run)).layout.yaxis.type == "log"
        (run / "metrics.jsonl").write_text("\n".join(json.dumps(line | {"val_nll": -1.0}) for line in lines))
        assert figures.curves(read(run)).layout.yaxis.type is None

    def test_a_histogram_adds_up_to_all_rates(self, run):
        bars = figures.rates(read(run), "2.weight", 0.5).data[-1]
        final = read(run).final_rates["2.weight"]
        np.testing.assert_allclose(sum(bars.x), 100)
        np.testing.assert_allclose(np.dot(bars.x, bars.y) / 100, final["mean"], atol=np.diff(final["edges"])[0] / 2)

    def test_bands_are_ordered(self, run):
        low, high, inner_low, inner_high, median = (
            np.array(t.y) for t in figures.rates(read(run), "0.weight", 0.5).data[:5]
        )
        assert (low < inner_low).all()
        assert (inner_low < median).all()
        assert (median < inner_high).all()
        assert (inner_high < high).all()

    def test_one_rate_for_a_whole_layer_still_has_a_bar(self, run):
        summary = json.loads((run / "summary.json").read_text())
        row = {"mean": 0.3, "min": 0.3, "max": 0.3, "edges": [0.3, 0.3], "counts": [1]}
        summary["rates"] = dict.fromkeys(WEIGHTS, row)
        (run / "summary.json").write_text(json.dumps(summary))
        bars = figures.rates(read(run), "0.weight", 0.5).data[-1]
        assert list(bars.x) == [100]
        assert bars.width[0] > 0

    def test_the_middle_of_a_histogram(self):
        rates = np.random.default_rng(0).beta(2, 5, 20_000)
        low, high = figures._middle(histogram(rates))
        width = (rates.max() - rates.min()) / 30
        np.testing.assert_allclose([low, high], np.quantile(rates, [0.05, 0.95]), atol=width)

    def test_the_middle_is_within_the_extremes_where_bins_are_wide(self):
        row = {"min": 0.5, "max": 0.5, "edges": [0.0, 0.5, 1.0], "counts": [0, 7]}
        assert figures._middle(row) == (0.5, 0.5)

    def test_a_histogram_of_nothing_falls_back_to_the_extremes(self):
        assert figures._middle({"min": 0.1, "max": 0.2, "edges": [0.1, 0.2], "counts": [0]}) == (0.1, 0.2)


def test_numbers_to_predict_keep_their_digits(tmp_path):
    run = make_run(tmp_path / "run", task="regression")
    columns = {
        "features": np.zeros((1, 2), np.float32), "label": np.array([17.0]), "predicted": np.array([12345.0]),
        "score": np.ones(1, np.float32), "kind": np.ones(1, np.uint8),
    }  # fmt: skip
    save_file(columns, run / "examples.safetensors")
    text = page(write(run))
    assert "<b>17.00</b>" in text
    assert "<b>12345</b>" in text


def test_a_data_file_is_named_without_its_folders(run):
    config = json.loads((run / "config.json").read_text()) | {"data": "some/where/prices.csv"}
    (run / "config.json").write_text(json.dumps(config))
    text = page(write(run))
    assert "vd-a2 on prices.csv" in text
    assert "--data some/where/prices.csv" in text


class TestPartialRuns:
    def test_without_a_summary_the_last_epoch_stands_for_it(self, tmp_path):
        text = page(write(make_run(tmp_path / "run", summary=False, examples=False, epochs=5)))
        assert "still going" in text
        assert "last epoch" in text
        assert "2.00" in text  # validation error
        assert "The final distribution follows" in text
        assert "No examples have been recorded yet" in text
        assert "best epoch" not in text

    def test_with_a_config_alone(self, tmp_path):
        run = make_run(tmp_path / "run", summary=False, examples=False)
        (run / "metrics.jsonl").unlink()
        text = page(write(run))
        assert "no epoch has been finished" in text
        assert "there are no curves" in text
        (run / "metrics.jsonl").touch()
        assert "metrics.jsonl is empty" in page(write(run))

    def test_a_method_without_noise_says_why_there_are_no_rates(self, tmp_path):
        run = make_run(tmp_path / "run", method="none")
        text = page(write(run))
        assert "has no random weights, so it has no rates" in text
        assert "there is no KL divergence to show" in text
        assert {trace.name for trace in figures.curves(read(run)).data} == {"training", "validation"}

    def test_without_validation_only_training_is_drawn(self, run):
        text = (run / "metrics.jsonl").read_text().splitlines()
        lines = [json.loads(line) | {"val_nll": None, "val_error": None} for line in text]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert {trace.name for trace in figures.curves(read(run)).data} == {"training", "KL"}
        assert write(run).is_file()

    def test_repeated_epochs_are_said(self, run):
        text = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(text + text.splitlines()[-1] + "\n")
        assert len(read(run).metrics) == 40
        assert "some epochs more than once" in page(write(run))

    def test_a_method_of_another_version_has_its_name_only(self, run):
        config = json.loads((run / "config.json").read_text()) | {"method": "vd-z"}
        (run / "config.json").write_text(json.dumps(config))
        assert "with\n<code>vd-z</code>." in page(write(run))


def replace_line(run, line):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:2], line, *lines[3:]]))


def change_summary(run, **changes):
    (run / "summary.json").write_text(json.dumps(json.loads((run / "summary.json").read_text()) | changes))


class TestErrors:
    def test_no_run(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"needs the folder of a run, got .* \(a folder without config.json\)"
        ):
            write(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"\(no such folder\); `vardrop train --out DIR` makes one"):
            write(tmp_path / "nothing")

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            (
                '{"epoch": 3, "train',
                r"line 3 of .*metrics\.jsonl must be a JSON object, got '\{\"epoch\": 3, .* --resume",
            ),
            ("", r"line 3 of .* must be a JSON object, got ''"),
            ("[1, 2]", r"line 3 of .* must be a JSON object, got '\[1, 2\]'; is this the folder of a run"),
            ('{"step": 3}', r"line 3 of .* must have an epoch, an integer, got None"),
            ('{"epoch": 3, "kl": "x"}', r"kl in line 3 of .* must be a number, got 'x'; train the run again"),
            ('{"epoch": 3, "rates": {"w": {"mean": 1}}}', r"rates in line 3 of .* must have q05, .* for every weight"),
            ('{"epoch": 3, "rates": [1]}', r"rates in line 3 of .* got \[1\]"),
        ],
    )
    def test_a_broken_line_is_named(self, run, line, words):
        replace_line(run, line)
        with pytest.raises(ValueError, match=words):
            write(run)
        assert not (run / "report.html").exists()

    def test_foreign_config(self, run):
        (run / "config.json").write_text('{"architectures": ["Bert"]}')
        with pytest.raises(ValueError, match=r"config\.json must name the data, the model and the method .* data=None"):
            write(run)

    def test_foreign_summary(self, run):
        (run / "summary.json").write_text('{"accuracy": 1}')
        with pytest.raises(ValueError, match=r"summary\.json must have test_error or test_rmse, got accuracy"):
            write(run)

    def test_a_result_that_is_no_number(self, run):
        change_summary(run, test_nll="low")
        with pytest.raises(ValueError, match=r"test_nll in .*summary\.json must be a number, got 'low'"):
            write(run)

    @pytest.mark.parametrize("edges", [[0, 1], "none", [0, None, 1]])
    def test_a_histogram_that_is_none(self, run, edges):
        change_summary(run, rates={"w": {"mean": 0.1, "min": 0, "max": 1, "edges": edges, "counts": [1, 2]}})
        with pytest.raises(ValueError, match=r"the histogram of w in .* must have one more edge than counts"):
            write(run)

    def test_a_file_of_examples_that_is_none(self, run):
        (run / "examples.safetensors").write_bytes(b"not a safetensors file")
        with pytest.raises(
            ValueError, match=r"examples\.safetensors must be a safetensors file, got one that cannot be"
        ):
            write(run)

    @pytest.mark.parametrize("change", [{"image": np.zeros((16, 2, 8, 8), np.uint8)}, {"label": np.zeros(3)}])
    def test_examples_of_the_wrong_shape(self, run, change):
        found = read(run).examples
        columns = {name: getattr(found, name) for name in ("label", "predicted", "score", "kind")}
        save_file(columns | {"image": found.inputs} | change, run / "examples.safetensors")
        with pytest.raises(ValueError, match=r"must have image uint8\[n, 1 or 3, H, W\] or features \[n, F\].* got "):
            write(run)

    def test_nothing_to_compare(self, tmp_path):
        with pytest.raises(ValueError, match="a comparison needs at least one run, got none"):
            write_comparison([], tmp_path / "index.html")

    def test_a_page_that_cannot_be_written_leaves_the_old_one(self, run, monkeypatch):
        before = write(run).read_bytes()

        def full(*_args, **_kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pathlib.Path.replace", full)
        with pytest.raises(OSError, match=r"needs room and permission to write .*report\.html, got No space left"):
            write(run)
        assert (run / "report.html").read_bytes() == before
        assert not list(run.glob(".*.tmp"))


class TestComparison:
    def test_a_row_for_each_with_a_link_to_its_page(self, tmp_path):
        runs = [
            make_run(tmp_path / "all runs" / name, name, seed=i) for i, name in enumerate(("none", "vd-a2", "vd-b"))
        ]
        for run in runs[:2]:
            write(run)
        out = write_comparison(runs, tmp_path / "pages" / "index.html")
        text = page(out)
        assert re.findall(r'<a href="([^"]*)">', text) == [
            f"../all%20runs/{name}/report.html" for name in ("none", "vd-a2")
        ]
        assert "<b>vd-b</b>:  It has no page of its own yet" in text
        assert "The same network, <code>mlp:3x400</code>, in each." in text
        means = " · ".join(f"{row['mean']:.2f}" for row in read(runs[2]).final_rates.values())
        assert f"<td>{means}</td>" in text
        assert text.count("1.87") == 3

    def test_curves_and_rates_are_overlaid(self, tmp_path):
        runs = [read(make_run(tmp_path / name, name)) for name in ("none", "vd-a2", "vd-b")]
        labels = ["none", "vd-a2", "vd-b"]
        curves = figures.validation_curves(runs, labels)
        assert [trace.name for trace in curves.data if trace.mode == "lines"] == labels
        assert [trace.x[0] for trace in curves.data if trace.mode == "markers"] == [26, 26, 26]
        marks = figures.rates_by_layer(runs, labels).data
        assert [trace.name for trace in marks] == ["vd-a2", "vd-b"]
        np.testing.assert_allclose(marks[0].y, [row["mean"] for row in runs[1].final_rates.values()])

    def test_the_same_method_twice_has_the_folder_in_its_name(self, tmp_path):
        runs = [make_run(tmp_path / f"seed{seed}", seed=seed) for seed in (0, 1)]
        text = page(write_comparison(runs, tmp_path / "index.html"))
        assert "vd-a2 (seed0)" in text
        assert "vd-a2 (seed1)" in text

    def test_runs_of_another_kind_and_without_results(self, tmp_path):
        runs = [
            make_run(tmp_path / "a", "none", summary=False),
            make_run(tmp_path / "b", "binary", task="regression"),
        ]
        text = page(write_comparison(runs, tmp_path / "index.html"))
        assert "their errors and losses do not compare" in text
        assert "None of the runs has random weights" in text
        assert "still going" in text
        for run in runs:
            (run / "metrics.jsonl").unlink()
        assert "None of the runs has a validation loss" in page(write_comparison(runs, tmp_path / "index.html"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"),
        (float("inf"), "not finite"),
        (12345.6, "12\N{NARROW NO-BREAK SPACE}346"),
        (0.01234567, "0.01235"),
        (7, "7"),
    ],
)
def test_numbers_are_readable(value, words):
    from vardrop.report.pages import number

    assert number(value) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, "–"), (0.25, "0.2 s"), (59.97, "60.0 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")]
)
def test_durations_are_readable(seconds, words):
    from vardrop.report.pages import duration

    assert duration(seconds) == words


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the pages in")
def test_a_browser_draws_the_figures(run, tmp_path):
    write(run)
    pages = {run / "report.html": 4, write_comparison([run], tmp_path / "index.html"): 2}
    for path, plots in pages.items():
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=5000",
            "--dump-dom", path.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        drawn = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
        assert len(re.findall(r'class="main-svg"[^>]*', drawn)) >= plots
        assert drawn.count('class="plotly-graph-div js-plotly-plot"') == plots
        assert "CONSOLE" not in done.stderr  # a script error, or something the policy refused to load
