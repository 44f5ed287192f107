"""The page of `vardrop prune`: invented numbers in, and the page must say them, by itself and when the slider moves."""

import copy
import re

import numpy as np
import pytest

from vardrop.report import pruning_figures as figures
from vardrop.report.pruning import write_pruning
from vardrop.report.pruning_words import headline, part, settings, size, smaller, stages, times, totals, tuned

THIN = "\N{NARROW NO-BREAK SPACE}"
WEIGHTS = [4 * 16, 4 * 3]


def make_found(task="classification", sized=True, validation=True, first="pixels"):
    """What `vardrop prune` writes, of a network on pictures of 4 × 4 that is invented."""
    rng = np.random.default_rng(0)
    order = rng.permutation(64)
    positions = []
    for i, threshold in enumerate(np.arange(-2, 5).tolist()):
        left = 64 * (i + 1) // 7
        mask = np.isin(np.arange(64), order[:left]).reshape(4, 16)
        positions.append(
            {
                "threshold": threshold,
                "kept": [int(mask.sum()), 6 + i],
                "error": 0.5 / (i + 1) if validation else None,
                "bytes": 100 + 40 * i if sized else None,
                "inputs": mask.sum(0).tolist(),
                "chosen": threshold == 3,
            }
        )
    chosen = positions[5]["kept"]
    measure = "rmse" if task == "regression" else "error"
    removed = [all_ - left for all_, left in zip(WEIGHTS, chosen, strict=True)]
    sizes = {"float32": 300, "csr": 200, "compressed": 80 if sized else None}
    names = ("1", "3")
    firsts = {
        "pixels": {"kind": "pixels", "shape": [1, 4, 4]},
        "columns": {"kind": "columns", "shape": [16]},
        "filters": {"kind": "filters", "weights": rng.integers(-1, 2, (4, 2, 3, 3)).tolist()},
    }  # fmt: skip
    return {
        "run": "runs/sparse", "data": "digits", "model": "mlp:4", "method": "sparse-vd", "task": task,
        "measure": measure, "test_examples": 359, "validation_examples": 144 if validation else 0,
        "goal": {"threshold": None, "words": "a threshold of 3 on log α"}, "threshold": 3.0,
        "weights": sum(WEIGHTS), "removed": sum(removed),
        "layers_removed": [
            {"name": f"{name}.weight", "weights": all_, "removed": gone}
            for name, all_, gone in zip(names, WEIGHTS, removed, strict=True)
        ],
        "test": {name: {"nll": 0.3, measure: 0.08 + 0.01 * i} for i, name in enumerate(("dense", "sparse", "compact"))},
        "validation": {"dense": 0.07, "sparse": 0.08, "compact": 0.09} if validation else {},
        "finetuning": {"epochs": 0, "lr": 1e-4, "best_epoch": None, "lines": []}, "quantized": False,
        "compaction": {"parameters": [83, 60], "multiply_adds": [76, 50], "left": {"3": "one could go, but stays"}},
        "positions": positions, "notes": ["A note."], "command": "vardrop prune runs/sparse --out small",
        "layers": [
            {
                "name": name, "kind": "Linear 16 → 4", "compact": "Linear 16 → 3", "weights": all_, "removed": gone,
                "parameters": [all_ + 3, all_], "multiply_adds": [all_, all_ // 2], "bytes": sizes,
            }
            for name, all_, gone in zip(names, WEIGHTS, removed, strict=True)
        ],
        "files": {"compact.safetensors": 300, "compact.safetensors.json": 20},
        "bytes": {
            "dense": {"float32": 332}, "sparse": {"csr": 280, "compressed": 250 if sized else None},
            "compact": {"float32": 240, "csr": 220, "compressed": 120 if sized else None},
        },
        "first": firsts[first],
    }  # fmt: skip


def text_of(path):
    """The page without plotly, which is in it."""
    return re.sub(r"<script>/\*\*.*?</script>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def found():
    return make_found()


class TestWords:
    def test_a_position_in_words(self, found):
        at = settings(found)[5]
        left = sum(found["positions"][5]["kept"])
        assert (at.asked, at.left, at.error, at.size) == ("3.00", str(left), f"8.33{THIN}%", f"300{THIN}bytes")
        assert at.words == (
            f"{left} of 76 weights are left, with an error of 8.33{THIN}% on 144 validation examples; the file takes "
            f"300{THIN}bytes. This is what was chosen."
        )
        assert settings(found)[0].asked == "−2.00"
        assert settings(found)[4].value == pytest.approx(10)

    def test_the_first_sentences(self, found):
        left = 76 - found["removed"]
        assert headline(found) == (
            f"{left} of 76 weights are left, one in {76 / left:.1f}, and the error on 359 test examples goes from "
            f"8.00{THIN}% to 10.00{THIN}%."
        )
        found["test"]["compact"]["error"] = 0.08
        assert headline(found).endswith(f"stays at 8.00{THIN}%.")
        assert "60 parameters instead of 83, and needs 50 multiply-adds for an example instead of 76" in smaller(found)
        assert f"120{THIN}bytes, 2.8 times less than 332{THIN}bytes of float32." in smaller(found)
        assert "compressed" not in smaller(make_found(sized=False))

    def test_without_files_and_validation(self):
        at = settings(make_found(sized=False, validation=False))[2]
        assert at.words.endswith("weights are left.")
        assert (at.value, at.bytes, at.size, at.error) == (None, None, "–", "–")

    def test_numbers(self):
        at = settings(make_found("regression"))[0]
        assert "a root mean squared error of 0.5 on" in at.words
        assert (at.value, at.error) == (0.5, "0.5")
        assert "the RMSE on 359 test examples goes from 0.08 to 0.1." in headline(make_found("regression"))

    def test_units(self):
        assert [part(*pair) for pair in ((0, 9), (9, 9), (1, 3), (1, 10_000), (99_999, 100_000))] == [
            f"{text}{THIN}%" for text in ("0.0", "100.0", "33.3", "0.01", "100.00")
        ]
        assert size(123_456) == f"123{THIN}kB"
        assert [times(100, 3), times(1000, 3), times(1, 0)] == ["33.3", "333", "1.0"]

    def test_stages_totals_and_fine_tuning(self, found):
        assert [row["test"] for row in stages(found)] == [f"{text}{THIN}%" for text in ("8.00", "9.00", "10.00")]
        total = totals(found["layers"])
        assert (total["weights"], total["removed"], total["parameters"]) == (76, found["removed"], [82, 76])
        assert total["bytes"]["compressed"] == 160
        assert totals(make_found(sized=False)["layers"])["bytes"]["compressed"] is None
        assert tuned(found) == ""
        found["finetuning"] = {"epochs": 3, "lr": 1e-4, "best_epoch": 2, "lines": []}
        assert (
            tuned(found) == "Trained on for 3 epochs at a learning rate of 0.0001; the weights are those after epoch 2."
        )
        found["finetuning"]["best_epoch"] = None
        assert "none was better" in tuned(found)
        found["validation_examples"] = 0
        assert "the last ones" in tuned(found)


class TestFigures:
    def test_the_curve_has_every_position(self, found):
        slider = settings(found)
        traces = {trace.name: trace for trace in figures.trade(slider, 5, (120, 9.0), False).data}
        assert list(traces["all thresholds"].x) == [row["bytes"] for row in found["positions"]]
        np.testing.assert_allclose(traces["all thresholds"].y, [100 * row["error"] for row in found["positions"]])
        assert (traces[figures.MARKER].x, traces["as written"].y) == ((300,), (9.0,))

    def test_without_files_it_counts_weights(self):
        slider = settings(make_found(sized=False))
        assert [figures.amount(each) for each in slider] == [sum(each.kept) for each in slider]

    def test_the_bars_are_shares(self):
        kept, removed = figures.layers(["a", "b"], [10, 4], [1, 3]).data
        np.testing.assert_allclose(kept.x, [10, 75])
        np.testing.assert_allclose(removed.x, [90, 25])

    def test_pixels_are_summed_over_colours(self):
        counts = np.arange(12)
        np.testing.assert_array_equal(
            figures.pixels(counts.tolist(), (3, 2, 2)).data[0].z, counts.reshape(3, 2, 2).sum(0)
        )

    def test_every_weight_of_a_filter_is_there_once(self):
        weights = np.arange(1, 2 * 3 * 2 * 2 + 1).reshape(2, 3, 2, 2).astype(float)
        weights[0, 0, 0, 0] = 0
        figure = figures.filters(weights.tolist())
        drawn = [value for row in figure.data[0].z for value in row if value is not None]
        assert sorted(drawn) == sorted(weights[weights != 0].tolist())
        assert len(figure.layout.shapes) == 2


class TestPage:
    def test_the_sentences_and_the_tables(self, tmp_path, found):
        text = text_of(write_pruning(found, tmp_path / "index.html"))
        for words in (
            headline(found), smaller(found), settings(found)[5].words, "A note.", "What is left of sparse-vd on digits",
            "Linear 16 → 4, compact: Linear 16 → 3", "one could go, but stays", "vardrop prune runs/sparse --out small",
            "Input pixels that are still read", "by a threshold of 3 on log α",
        ):  # fmt: skip
            assert words in text, words

    def test_plotly_is_inside_once_and_nothing_is_loaded(self, tmp_path, found):
        out = write_pruning(found, tmp_path / "index.html")
        whole = out.read_text(encoding="utf-8")
        assert whole.count("plotly.js v") == 1
        assert "default-src 'none'" in whole
        assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=[\"']?(https?:)?//", text_of(out))

    @pytest.mark.parametrize(
        ("first", "words"), [("columns", "Input columns"), ("filters", "The filters of the first")]
    )
    def test_other_first_layers(self, tmp_path, first, words):
        text = text_of(write_pruning(make_found(first=first), tmp_path / "index.html"))
        assert words in text
        assert "Input pixels" not in text

    def test_without_validation_and_files(self, tmp_path):
        text = text_of(write_pruning(make_found(sized=False, validation=False), tmp_path / "index.html"))
        assert 'id="trade"' not in text
        assert 'id="cut-size"' not in text
        assert 'id="layers"' in text

    def test_text_from_files_is_escaped(self, tmp_path, found):
        found["data"] = found["notes"][0] = "</script><script>alert(1)</script>"
        found["layers_removed"][0]["name"] = "<i>1"
        whole = write_pruning(found, tmp_path / "index.html").read_text(encoding="utf-8")
        assert "<script>alert" not in whole


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    found = make_found()
    return write_pruning(found, tmp_path_factory.mktemp("page") / "index.html"), found


class TestInABrowser:
    PARTS = ("asked", "left", "share", "error", "size", "words")

    def shown(self, page):
        return {part: page.text_content(f"#cut-{part}") for part in self.PARTS}

    def told(self, setting):
        return {part: getattr(setting, part) for part in self.PARTS}

    def data(self, page, figure, trace):
        return page.evaluate(f"(({{x, y, z}}) => ({{x, y, z}}))(document.getElementById('{figure}').data.at({trace}))")

    def marker(self, page):
        find = "name => (({x, y}) => [x[0], y[0]])(document.getElementById('trade').data.find(t => t.name === name))"
        return page.evaluate(find, figures.MARKER)

    def test_the_slider_moves_everything(self, page, written):
        path, found = written
        slider = settings(found)
        page.goto(path.as_uri())
        assert self.shown(page) == self.told(slider[5])
        assert self.marker(page) == pytest.approx([300, slider[5].value])
        page.fill("#cut", "1")  # fires an input event, as the mouse does
        at = slider[1]
        assert self.shown(page) == self.told(at)
        assert self.marker(page) == pytest.approx([at.bytes, at.value])
        shares = [100 * kept / all_ for kept, all_ in zip(at.kept, WEIGHTS, strict=True)]
        assert self.data(page, "layers", 0)["x"] == pytest.approx(shares)
        assert self.data(page, "layers", 1)["x"] == pytest.approx([100 - share for share in shares])
        np.testing.assert_array_equal(self.data(page, "first", 0)["z"], np.reshape(at.inputs, (4, 4)))
        assert page.get_attribute("#cut", "aria-valuetext") == f"{at.asked}, {at.left} weights left"
        for name in ("trade", "layers", "first"):
            assert page.locator(f"#{name} .trace, #{name} .bars, #{name} .heatmaplayer image").count() > 0, name

    def test_the_mouse_drags_it(self, page, written):
        path, found = written
        page.goto(path.as_uri())
        box = page.locator("#cut").bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] * 5 / 6, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.5, middle, steps=4)
        page.mouse.up()
        assert page.input_value("#cut") == "3"
        assert self.shown(page) == self.told(settings(found)[3])
        assert page.url.endswith("#threshold=1")

    def test_the_keyboard_alone_is_enough(self, page, written):
        path, found = written
        slider = settings(found)
        page.goto(path.as_uri())
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "cut"
        for key, at in (("ArrowLeft", 4), ("End", 6), ("Home", 0), ("ArrowRight", 1)):
            page.keyboard.press(key)
            assert self.shown(page) == self.told(slider[at]), key

    def test_the_address_holds_the_threshold(self, page, written):
        path, found = written
        slider = settings(found)
        page.goto(path.as_uri() + "#threshold=-1.2")
        assert self.shown(page) == self.told(slider[1])  # the nearest
        page.evaluate("location.hash = '#threshold=40'")
        page.wait_for_function("document.getElementById('cut').value === '6'")
        page.evaluate("location.hash = '#threshold=x'")
        assert self.shown(page) == self.told(slider[6])  # which is no threshold

    @pytest.mark.parametrize(("first", "bare"), [("filters", False), ("columns", True)])
    def test_a_phone_shows_all_of_it(self, page, tmp_path, first, bare):
        found = copy.deepcopy(make_found(first=first, sized=not bare, validation=not bare))
        page.set_viewport_size({"width": 360, "height": 740})
        page.goto(write_pruning(found, tmp_path / "index.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.locator("#cut").bounding_box()["width"] > 150
        page.fill("#cut", "2")
        assert page.text_content("#cut-left") == settings(found)[2].left
        if first == "columns":
            assert self.data(page, "first", 0)["y"] == settings(found)[2].inputs
