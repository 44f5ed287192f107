"""The page on uncertainty: synthetic numbers in, and the page must say them, by itself and when the slider moves."""

import copy
import json
import math
import re

import numpy as np
import pytest
import torch

from vardrop.evaluation.referral import histograms, position_of, referral
from vardrop.report import uncertainty_figures as figures
from vardrop.report.examples import Shown, data_uri
from vardrop.report.uncertainty import Group, start, write_uncertainty
from vardrop.report.uncertainty_words import headline, honesty, positions
from vardrop.uncertainty import risk_coverage

THIN = "\N{NARROW NO-BREAK SPACE}"


def bins_of(sure, right, number=10):
    edges = np.linspace(0, 1, number + 1)
    place = np.clip(np.digitize(sure, edges) - 1, 0, number - 1)
    rows = []
    for i in range(number):
        chosen = place == i
        mean = {"confidence": sure, "accuracy": right}
        means = {name: float(values[chosen].mean()) if chosen.any() else None for name, values in mean.items()}
        rows.append({"low": edges[i], "high": edges[i + 1], "count": int(chosen.sum()), **means})
    return rows


def make_evaluation(n=400, task="classification", rule=True, seed=0):
    """What `vardrop evaluate` writes, of a model that is invented: it is wrong more often where its entropy is high."""
    rng = np.random.default_rng(seed)
    entropy = rng.gamma(0.6, 0.35, n)
    wrong = rng.random(n) < np.clip(entropy / 2, 0, 0.7)
    error = float(wrong.mean())
    loss = rng.normal(0, 0.3 + entropy) ** 2 if task == "regression" else wrong.astype(float)
    away = {"notMNIST": rng.gamma(3.0, 0.4, n), "noise": rng.gamma(4.0, 0.4, n)}
    sure = np.clip(1 - entropy / 2, 0.1, 1)
    coverage, chosen = 0.9, np.argsort(entropy)[: round(0.9 * n)]
    histogram = histograms({"": entropy, **away})
    histogram["test"] = histogram["shares"].pop("")
    score = {"key": "predictive_entropy", "name": "predictive entropy", "unit": "nats"}
    if task == "regression":
        score = {"key": "std", "name": "standard deviation", "unit": ""}
    named = {"name": score["name"], "label": f"{score['name']} ({score['unit']})", **histogram}
    detection = {"auroc": 0.93, "fpr95": 0.2}
    numbers = {"error": error, "nll": 0.41, "brier": 0.2, "ece": 0.034, "confidence": float(sure.mean())}
    result = {
        "run": "run", "data": "digits", "model": "mlp:2x128", "method": "vd-a2", "task": task, "examples": n,
        "validation_examples": 144, "notes": [], "how": "100 passes with the noise on.",
        "command": "vardrop evaluate run", "test": numbers,
        "calibrated": numbers | {"temperature": 1.31, "ece": 0.012},
        "reliability": {"before": bins_of(sure, ~wrong), "after": bins_of(sure**1.2, ~wrong)},
        "selection": {
            "score": score, "aurc": 0.021,
            "at": [{"coverage": 0.95, "accuracy": 0.97}, {"coverage": 0.8, "accuracy": 0.99}],
            "rule": {
                "target_error": 0.04, "threshold": 0.77, "validation": {"coverage": 0.91, "error": 0.04},
                "test": {"coverage": coverage, "error": float(loss[chosen].mean())},
            } if rule else None,
        },
        "referral": referral(loss, entropy, away),
        "ood": {name: {"examples": n, score["key"]: detection} for name in away},
        "histograms": {score["key"]: named},
    }  # fmt: skip
    if task == "regression":
        result |= {
            "test": {"rmse": float(np.sqrt(loss.mean())), "log_likelihood": -1.2},
            "calibrated": None, "reliability": {}, "ood": {}, "histograms": {},
            "intervals": [{"nominal": p, "observed": p**1.5} for p in np.linspace(0.1, 0.95, 10).tolist()],
        }  # fmt: skip
        result["selection"]["at"] = [{"coverage": 0.9, "rmse": 0.5}]
        result["referral"]["elsewhere"] = {}
    return json.loads(json.dumps(result))  # as it is in the file


def make_groups(n=4, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 1, 8, 8)).astype(np.uint8)
    shown = [Shown("3", "5", 1.5 - 0.1 * i, True, data_uri(image)) for i, image in enumerate(images)]
    return [
        Group("Most uncertain", "entropy", "Highest predictive entropy.", shown),
        Group("Sure and wrong", "sure", "Mistakes.", []),
    ]


def text_of(path):
    """The HTML without scripts and styles, to look for words."""
    return re.sub(r"<(script|style)>.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def evaluation():
    return make_evaluation()


class TestReferral:
    def test_every_position_is_what_sorting_by_hand_says(self):
        rng = np.random.default_rng(1)
        loss, score, other = rng.random(37), rng.random(37), rng.random(20)
        columns = referral(loss, score, {"other": other}, steps=50)
        for i, share in enumerate(columns["share"]):
            h = math.floor(share * 37 + 0.5)
            ranked = sorted(range(37), key=lambda j: -score[j])
            kept = ranked[h:]
            assert (columns["handed"][i], columns["kept"][i]) == (h, 37 - h)
            assert columns["handed_loss"][i] == pytest.approx(sum(loss[j] for j in ranked[:h]))
            if not kept:
                assert columns["loss"][i] is columns["ideal"][i] is columns["threshold"][i] is None
                assert columns["elsewhere"]["other"][i] == 1
                continue
            assert columns["loss"][i] == pytest.approx(np.mean([loss[j] for j in kept]))
            assert columns["ideal"][i] == pytest.approx(np.sort(loss)[: 37 - h].mean())
            assert columns["threshold"][i] == max(score[j] for j in kept)
            assert columns["elsewhere"]["other"][i] == np.mean(other > columns["threshold"][i])

    def test_equal_scores_have_the_risk_of_a_random_order(self):
        rng = np.random.default_rng(2)
        loss, score = rng.random(60), rng.integers(0, 5, 60).astype(float)
        curve = risk_coverage(torch.from_numpy(score), torch.from_numpy(loss))
        columns = referral(loss, score, steps=60)
        np.testing.assert_allclose(columns["loss"][:-1], curve.risk.flip(0).numpy())

    def test_a_position_is_the_nearest(self):
        columns = referral(np.ones(10), np.arange(10.0))
        assert [position_of(columns, share) for share in (0, 0.0801, 0.5, 1)] == [0, 16, 100, 200]

    def test_bad_arrays(self):
        for loss, score in (([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])):
            with pytest.raises(ValueError, match="referral needs one loss and one score for each of at least one"):
                referral(np.array(loss), np.array(score))

    def test_histograms_share_their_bins_and_add_up(self):
        rng = np.random.default_rng(0)
        found = histograms({"a": rng.random(50), "b": 2 + rng.random(30)}, bins=7)
        assert len(found["edges"]) == 8
        assert found["edges"][0] == 0
        for shares in found["shares"].values():
            assert sum(shares) == pytest.approx(1)
        assert histograms({"flat": np.zeros(3)})["edges"][-1] > 0


class TestWords:
    def test_the_sentences_of_a_position_have_the_counts(self):
        evaluation = make_evaluation(n=2000)
        loss = evaluation["referral"]["handed_loss"]
        at = positions(evaluation)[40]  # 20 %
        gone, all_ = round(loss[40]), round(loss[-1])
        assert at.words.startswith(
            f"A person gets 400 of 2{THIN}000 test examples, those with a predictive entropy above "
        )
        assert f"{gone} of the {all_} mistakes are among them. The model answers the other 1{THIN}600, and " in at.words
        assert f"and {all_ - gone} of these answers are wrong" in at.words
        assert re.search(
            r"By the same rule the person would get [\d.]+.% of notMNIST and [\d.]+.% of noise\.", at.words
        )
        assert at.error == pytest.approx(100 * (all_ - gone) / 1600)

    def test_both_ends(self, evaluation):
        first, *_, last = positions(evaluation)
        assert first.words.startswith("The model answers all 400 test examples, and ")
        assert (first.threshold, first.rule) == (None, "–")
        assert last.words == "A person gets all 400 test examples. The model answers none."
        assert (last.error, last.left, last.rule) == (None, "–", "–")

    def test_the_headline(self, evaluation):
        slider = positions(evaluation)
        said = headline(evaluation, slider[20], slider[0])
        assert said == (
            f"Hand the 10{THIN}% least certain to a person and the error of the rest falls from {slider[0].left} to "
            f"{slider[20].left}."
        )
        assert headline(evaluation, slider[0], slider[0]).startswith("If the model answers everything by itself, its")
        worse = make_evaluation()
        worse["referral"] = referral(np.repeat([1.0, 0.0], 200), np.arange(400.0))  # sure where it is wrong
        slider = positions(worse)
        assert "does not fall: it is 56" in headline(worse, slider[20], slider[0])
        worse["referral"] = referral(np.zeros(400), np.arange(400.0))
        slider = positions(worse)
        assert headline(worse, slider[20], slider[0]) == "The model makes no mistake on its 400 test examples."
        worse["referral"] = referral(np.repeat([1.0, 0.0], 200), np.zeros(400))
        slider = positions(worse)
        assert "equally sure of all its answers" in headline(worse, slider[0], slider[0])
        assert "Its error is 50" in headline(worse, slider[0], slider[0])
        assert start(worse) == 0

    @pytest.mark.parametrize(("sure", "words"), [(0.99, "too sure"), (0.9, "about as sure"), (0.7, "not sure enough")])
    def test_confidence_in_words(self, evaluation, sure, words):
        evaluation["test"] |= {"error": 0.1, "confidence": sure}
        assert words in honesty(evaluation)[0]

    def test_it_says_when_strangeness_is_not_noticed(self, evaluation):
        evaluation["ood"]["noise"]["predictive_entropy"]["auroc"] = 0.4
        assert "93" in honesty(evaluation)[1]
        assert "hardly better than chance" in honesty(evaluation)[2]

    def test_numbers_have_a_root_mean_squared_error_and_no_mistakes(self):
        evaluation = make_evaluation(task="regression")
        at = positions(evaluation)[20]
        assert at.error == pytest.approx(math.sqrt(evaluation["referral"]["loss"][20]))
        assert "with a root mean squared error of" in at.words
        assert "mistake" not in at.words
        assert at.caught == ""


class TestFigures:
    def test_the_curve_is_the_columns(self, evaluation):
        slider = positions(evaluation)
        traces = {trace.name: trace for trace in figures.risk(slider, evaluation["referral"], 20, False).data}
        drawn = traces["least certain first"].y
        assert drawn[-1] is None
        np.testing.assert_allclose(drawn[:-1], 100 * np.array(evaluation["referral"]["loss"][:-1]))
        assert (traces[figures.MARKER].x, traces[figures.MARKER].y) == ((10.0,), (drawn[20],))

    def test_the_intervals_of_the_diagram_hold_their_point(self, evaluation):
        points = figures.reliability(evaluation["reliability"]["before"]).data[1]
        y, up, down = (np.array(values) for values in (points.y, points.error_y.array, points.error_y.arrayminus))
        assert (up >= 0).all()
        assert (down >= 0).all()
        assert (y + up <= 100 + 1e-9).all()
        assert (y - down >= -1e-9).all()

    def test_empty_bins_are_left_out(self, evaluation):
        rows = evaluation["reliability"]["before"]
        full = [row for row in rows if row["count"]]
        assert 0 < len(full) < len(rows)
        assert list(figures.reliability(rows).data[2].y) == [row["count"] for row in full]


class TestPage:
    def test_the_first_sentence_and_the_tables(self, tmp_path, evaluation):
        out = write_uncertainty(evaluation, make_groups(), tmp_path / "evaluation.html")
        text = text_of(out)
        slider = positions(evaluation)
        assert headline(evaluation, slider[20], slider[0]) in text
        for words in (
            "How sure is vd-a2 on digits?", f"Temperature 1.31: calibration error 1.2{THIN}%", "AURC",
            "Predictive entropy: AUROC 0.930", "notMNIST, 400 examples", "100 passes with the noise on.",
            f"95{THIN}%", "Most uncertain", "There are none.", slider[20].words,
        ):  # fmt: skip
            assert words in text, words
        assert text.count("data:image/png;base64,") == 4

    def test_plotly_is_inside_once_and_nothing_is_loaded(self, tmp_path, evaluation):
        out = write_uncertainty(evaluation, make_groups(), tmp_path / "evaluation.html")
        whole = out.read_text(encoding="utf-8")
        assert whole.count("plotly.js v") == 1
        assert "default-src 'none'" in whole
        assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=[\"']?(https?:)?//", text_of(out))

    def test_without_a_threshold_it_starts_at_a_tenth(self, tmp_path):
        evaluation = make_evaluation(rule=False)
        assert start(evaluation) == 20
        assert "starts at a tenth" in text_of(write_uncertainty(evaluation, [], tmp_path / "page.html"))

    def test_regression(self, tmp_path):
        shown = [Shown("1.000", "2.000", 0.5, False, features=[0.25, 1.5])]
        group = Group("Most uncertain", "std", "Highest standard deviation.", shown)
        out = write_uncertainty(make_evaluation(task="regression"), [group], tmp_path / "page.html")
        text = text_of(out)
        assert "Do its intervals hold?" in text
        assert "Does its confidence hold?" not in text
        assert '<td class="n">0.25</td><td class="n">1.50</td>' in text
        assert "vardrop evaluate RUN --ood noise" in text

    def test_text_from_files_is_escaped(self, tmp_path, evaluation):
        away = "</script><script>alert(1)</script>"
        for table in (
            evaluation["ood"],
            evaluation["referral"]["elsewhere"],
            evaluation["histograms"]["predictive_entropy"]["shares"],
        ):
            table[away] = copy.deepcopy(table["noise"])
        evaluation["data"] = "<i>digits</i>"
        whole = write_uncertainty(evaluation, [], tmp_path / "page.html").read_text(encoding="utf-8")
        assert "<script>alert" not in whole
        assert "<i>digits" not in whole


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    evaluation = make_evaluation()
    return write_uncertainty(evaluation, make_groups(), tmp_path_factory.mktemp("page") / "evaluation.html"), evaluation


class TestInABrowser:
    def shown(self, page):
        parts = ("asked", "handed", "left", "caught", "rule", "words")
        return {part: page.text_content(f"#hand-{part}") for part in parts}

    def told(self, position):
        return {part: getattr(position, part) for part in ("asked", "handed", "left", "caught", "rule", "words")}

    def marker(self, page):
        return page.evaluate(
            "name => document.getElementById('risk').data.filter(t => t.name === name).flatMap(t => [t.x[0], t.y[0]])",
            figures.MARKER,
        )

    def test_the_slider_moves_everything(self, page, written):
        path, evaluation = written
        slider = positions(evaluation)
        page.goto(path.as_uri())
        assert self.shown(page) == self.told(slider[20])
        page.fill("#hand", "37")  # fires an input event, as the mouse does
        at = slider[74]
        assert self.shown(page) == self.told(at)
        assert self.marker(page) == pytest.approx([37, at.error])
        assert page.evaluate("document.getElementById('risk').layout.shapes[0].x1") == 37
        assert page.get_attribute("#hand", "aria-valuetext") == f"{at.asked}, error of the rest {at.left}"
        line = "document.getElementById('strange-1-predictive_entropy').layout.shapes[0]"
        assert page.evaluate(f"{line}.x0") == pytest.approx(at.threshold)
        page.fill("#hand", "100")
        assert page.evaluate(f"{line}.visible") is False
        for name in ("risk", "reliability-before", "reliability-after", "strange-0-predictive_entropy"):
            assert page.locator(f"#{name} .trace, #{name} .bars").count() > 0, name

    def test_the_mouse_drags_it(self, page, written):
        path, evaluation = written
        page.goto(path.as_uri())
        box = page.locator("#hand").bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] * 0.1, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.5, middle, steps=4)
        page.mouse.up()
        value = float(page.input_value("#hand"))
        assert 45 < value < 55
        assert self.shown(page) == self.told(positions(evaluation)[round(2 * value)])
        assert page.url.endswith(f"#hand={value:g}")

    def test_a_phone_shows_all_of_it(self, page, written):
        page.set_viewport_size({"width": 360, "height": 740})
        page.goto(written[0].as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.locator("#hand").bounding_box()["width"] > 180

    def test_the_keyboard_alone_is_enough(self, page, written):
        path, evaluation = written
        slider = positions(evaluation)
        page.goto(path.as_uri())
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "hand"
        page.keyboard.press("ArrowRight")
        assert self.shown(page) == self.told(slider[21])
        page.keyboard.press("Home")
        assert self.shown(page) == self.told(slider[0])
        page.keyboard.press("End")
        assert self.shown(page) == self.told(slider[200])
        assert page.evaluate("document.getElementById('risk').data.at(-1).y[0]") is None

    def test_the_address_holds_the_position(self, page, written):
        path, evaluation = written
        slider = positions(evaluation)
        page.goto(path.as_uri() + "#hand=12.5")
        assert self.shown(page) == self.told(slider[25])
        page.evaluate("location.hash = '#hand=400'")
        page.wait_for_function("document.getElementById('hand').value === '100'")
        assert self.shown(page) == self.told(slider[200])
        page.goto("about:blank")
        page.goto(path.as_uri() + "#hand=x")
        assert self.shown(page) == self.told(slider[20])
