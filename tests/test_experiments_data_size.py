"""Dropout against the amount of data: what a cell trains on, what it learns, and what its rows are boiled down to."""

from __future__ import annotations

import math

import pytest
import torch

import vardrop as vd
from vardrop.data import places
from vardrop.data.text import encode, load_text
from vardrop.reproduce.experiments import _chars, data_size
from vardrop.reproduce.results import Result

# --- the text ------------------------------------------------------------------------------------------------------


@pytest.fixture
def only(tmp_path, monkeypatch):
    """A root that is the only place where a text can be found."""
    monkeypatch.setenv("VARDROP_DATA", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places.pooch, "os_cache", lambda name: tmp_path / "cache" / name)
    (tmp_path / "root" / "text").mkdir(parents=True)
    return tmp_path / "root"


def test_a_text_is_found_in_the_order_of_all_data_sets(only, tmp_path, monkeypatch):
    for place in (tmp_path / "cache" / "vardrop", tmp_path / "data", tmp_path / "told", only):
        (place / "text").mkdir(parents=True, exist_ok=True)
        (place / "text" / "tinyshakespeare.txt").write_text(place.name, encoding="utf-8")
        if place.name == "told":
            monkeypatch.setenv("VARDROP_DATA", str(place))
        assert load_text("tinyshakespeare", only if place is only else None) == place.name


def test_a_text_that_is_not_there_says_where_it_was_looked_for(only):
    with pytest.raises(FileNotFoundError, match="must be a file in a folder that is looked at, got none of") as caught:
        load_text("tinyshakespeare", only)
    words = str(caught.value)
    assert str(only / "text" / "tinyshakespeare.txt") in words
    assert "github.com/karpathy/char-rnn, or set VARDROP_DATA" in words
    with pytest.raises(ValueError, match="name of a text must be one of tinyshakespeare, got 'macbeth'"):
        load_text("macbeth", only)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\xff\xfe\x00", "must be in UTF-8, got other bytes"), (b"", "must have characters, got an empty file")],
)
def test_a_file_that_is_no_text_is_refused(only, content, words):
    (only / "text" / "tinyshakespeare.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_text("tinyshakespeare", only)


@pytest.mark.data
def test_the_real_text(data_root):
    text = load_text("tinyshakespeare", data_root)
    codes, alphabet = encode(text)
    assert (len(codes), len(alphabet)) == (1_115_394, 65)
    assert "".join(alphabet[i] for i in codes[:5000].tolist()) == text[:5000]


def test_parts_do_not_overlap_and_small_ones_begin_large_ones():
    codes = torch.arange(1000)
    whole, part = data_size.parts(codes, 100), data_size.parts(codes, 3)
    assert torch.cat(whole).equal(codes)
    assert [len(t) for t in whole] == [850, 50, 100]
    assert part.train.equal(codes[:26])
    assert part.validation.equal(whole.validation)
    assert part.test.equal(whole.test)


def test_windows_predict_every_character_once():
    windows = _chars.cover(torch.arange(100), 8)
    assert windows[:, 1:].flatten().tolist() == list(range(1, 97))
    assert (windows[:, :-1] + 1).equal(windows[:, 1:])
    drawn = _chars.draw(torch.arange(10), 200, 8, torch.Generator().manual_seed(0))
    assert drawn[:, 0].unique().tolist() == [0, 1]  # 10 characters hold two windows of 9
    assert drawn.max() == 9


def test_the_markov_text_has_pairs_that_say_what_follows():
    text = _chars.markov_text(4000, seed=0)
    assert text == _chars.markov_text(4000, seed=0) != _chars.markov_text(4000, seed=1)
    codes, alphabet = encode(text)
    size = len(alphabet)
    counts = torch.zeros(size, size, size).index_put_((codes[:-2], codes[1:-1], codes[2:]), torch.ones(()), True)

    def entropy(of: torch.Tensor) -> float:
        p = of / of.sum(-1, keepdim=True).clamp_min(1)
        return (torch.special.entr(p).sum(-1) * of.sum(-1)).sum().item() / of.sum().item()

    assert entropy(counts) < 0.5 * entropy(counts.sum((0, 1)))


# --- the network ---------------------------------------------------------------------------------------------------


def network(seed: int = 0) -> _chars.Transformer:
    torch.manual_seed(seed)
    return _chars.Transformer(alphabet=7, context=12, width=8, layers=2, heads=2)


def test_no_character_sees_those_after_it():
    model, codes = network(), torch.randint(7, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = codes.clone()
    changed[0, 6:] = (changed[0, 6:] + 1) % 7
    before, after = model(codes), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(-1).all()


def test_evaluation_is_the_mean_over_all_windows_and_has_no_noise():
    model = network()
    data_size.noisy_(model, "fixed", 0.5, width=8)
    windows = torch.randint(7, (10, 13), generator=torch.Generator().manual_seed(0))
    value = _chars.evaluate(model, windows, batch=4)  # 4, 4 and 2
    assert model.training
    model.eval()
    assert value == pytest.approx(_chars.mean_nll(model, windows).item(), rel=1e-6)


def test_rates_are_where_they_are_said_to_be():
    fixed = network()
    data_size.noisy_(fixed, "fixed", 0.3, width=8)
    dropouts = [module for module in fixed.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(dropouts) == 1 + 2 * 3
    assert all(module.p == 0.3 for module in dropouts)

    weights = network()
    learned = data_size.noisy_(weights, data_size.WEIGHTS, 0.1, width=8)
    assert len(learned) == 2 * 4 + 1
    scalars = 2 * (8 + 8 + 8 + 32) + 8  # the inputs of every linear layer
    assert vd.kl_divergence(weights).item() == pytest.approx(scalars * vd.kl.log_uniform(torch.tensor(1 / 9).log()))

    sites = network()
    learned = data_size.noisy_(sites, data_size.SITES, 0.1, width=8)
    assert len(learned) == 1 + 2 * 2
    assert all(block.attn_drop.p == 0 for block in sites.blocks)


def test_cells_of_cpu_are_balanced_when_killed():
    """The first half is one seed with everything in it."""
    cells = data_size.cells("cpu")
    first = [cell for cell in cells if cell["seed"] == 0]
    assert cells[: len(first)] == first
    assert {cell["percent"] for cell in first} == {1, 3, 10, 30, 100}


# --- rows ----------------------------------------------------------------------------------------------------------


def planted(nll) -> list[Result]:
    """Results of three sizes and two seeds whose nll is that of a function of percent, method, rate and seed."""
    rows = []
    for percent in (1, 10, 100):
        for seed in (0, 1):
            for method, rate in (("fixed", 0.0), ("fixed", 0.1), ("fixed", 0.4), (data_size.WEIGHTS, None)):
                value = nll(percent, method, rate, seed)
                learned = None if rate is not None else 0.5 / percent**0.5
                rows.append({
                    "table": "runs", "percent": percent, "method": method, "seed": seed, "rate": rate,
                    "val_nll": value, "test_nll": value + 0.05, "best_step": 5, "learned_rate": learned,
                    "learned_rate_at_the_end": learned,
                })  # fmt: skip
    return [Result("data-size", "smoke", {}, 0, {}, None, "here", 1, 1.0, rows)]


def world(percent, method, rate, seed):
    """The best rate is 0.4 / √percent, seeds lie 0.02 apart, and the learned rate is a little above the best."""
    right = 0.4 / percent**0.5
    return 2 - 0.1 * math.log10(percent) + (0.005 if rate is None else abs(rate - right)) + 0.02 * seed


def test_answers_of_planted_results():
    rows = data_size.summarise(planted(world))
    sizes = [row for row in rows if row["table"] == "sizes"]
    assert [row["best_fixed_rate"] for row in sizes] == [0.4, 0.1, 0.0]
    assert [row["spread"] for row in sizes] == pytest.approx([0.02 / math.sqrt(2)] * 3)
    assert sizes[0]["test_nll_rate_0"] == pytest.approx(2.46)
    answers = [row["value"] for row in rows if row["table"] == "answers"]
    fall, rises, zero, correlation, excess, fine = answers
    assert (fall, rises, zero, fine) == (0.4, 0, 0.0, 3)
    assert correlation > 0.95
    assert excess == pytest.approx(0.005 * math.sqrt(2) / 0.02)


def test_answers_that_are_no():
    def upside_down(percent, method, rate, seed):
        return world(101 - percent, method, rate, seed) + (1.0 if rate is None else 0.0)

    rows = data_size.summarise(planted(upside_down))
    fall, rises, zero, correlation, excess, fine = (row["value"] for row in rows if row["table"] == "answers")
    assert fall < 0
    assert rises >= 1
    assert zero > 5
    assert correlation < 0
    assert excess > 10
    assert fine == 0


def test_all_seeds_choose_among_the_rates_that_all_of_them_tried():
    """The second seed of 0.4 is so bad that another rate is better; what one seed alone tried is not chosen."""
    results = planted(world)
    (bad,) = (r for r in results[0].rows if (r["percent"], r["rate"], r["seed"]) == (1, 0.4, 1))
    bad["val_nll"] = 9.0
    lone = results[0].rows[0] | {"rate": 0.5, "val_nll": 0.0}
    more = Result("data-size", "smoke", {}, 0, {}, None, "here", 1, 1.0, [lone])
    for found in (results, [*results, more]):
        assert next(row["best_fixed_rate"] for row in data_size.summarise(found) if row["table"] == "sizes") == 0.1


def test_a_rate_that_never_varies_correlates_with_nothing():
    assert data_size._correlation([(0.1, 0.3), (0.1, 0.2)]) == 0.0
    assert data_size._correlation([]) == 0.0


def test_a_cell_runs_is_the_same_twice_and_leaves_the_generator_alone():
    config = next(cell for cell in data_size.cells("smoke") if cell["method"] == data_size.WEIGHTS)
    state = torch.get_rng_state()
    rows = data_size.run_cell(config)
    assert torch.get_rng_state().equal(state)
    assert data_size.run_cell(config) == rows
    run, *rates = rows
    assert math.isfinite(run["test_nll"])
    assert run["learned_rate"] == pytest.approx(sum(row["rate"] for row in rates) / len(rates))
    assert {row["where"] for row in rates} == {f"blocks.0.{name}.weight" for name in ("qkv", "out", "up", "down")} | {
        "head.weight"
    }


def test_the_figure_is_drawn_from_rows():
    drawn = data_size.figure(planted(world), [])
    left, _, right = drawn.axes
    assert left.get_xscale() == "log"
    assert [text.get_text() for text in right.get_legend().get_texts()][:2] == ["best fixed", data_size.WEIGHTS]
