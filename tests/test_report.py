"""Reports: figures against hand-made runs, what is missing is said, nothing is executed."""

import dataclasses
import itertools
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure
from scipy import stats

from oversight_rl.cli import main
from oversight_rl.experiments.oversight import figures
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.experiments.oversight.grid import GridRuns
from oversight_rl.reports import page, tables, verdict
from oversight_rl.reports.figures import level_axis
from oversight_rl.reports.figures import spread as spread_apart
from oversight_rl.reports.gather import gather
from oversight_rl.runs.folder import RunFolder
from oversight_rl.runs.rows import Facts, Row

GATE = ["gate/labeled_diamond", "gate/labeled_ghost", "gate/unlabeled"]
TITLES = {part.name: part.title for part in figures.PARTS}
DRAWN = [name for name in TITLES if name != "reward_models"]  # which is a table
LEVELS, SEEDS = (0.01, 0.1), range(5)
RETURNS = {  # by method: mean return at the two levels
    "routing": (0.5, 0.7),
    "naive": (0.2, 0.75),
    "reward_model_plain": (0.8, 0.85),
    "ipw_hidden_flag": (0.9, 0.9),
}


def make_run(path, method, level, seed, value, settings=None, behaviors=("diamond", "ghost")):
    """A finished run with given returns, written by what writes real ones."""
    config = Config.model_validate(
        {"method": method, "oversight": level, "seeds": [seed], **(settings or {})}
    )
    folder = RunFolder.create(path, config)
    first, second = behaviors
    policies = ["mixture", first, second, f"{first}=0.5,{second}=0.5"]
    if method not in ("routing", "no_routing"):
        policies = ["single"]
    on_grid = behaviors == ("diamond", "ghost")
    rows = []
    for policy in policies:
        deployed = policy in (first, "single")
        found = {
            "ground_truth_return": value if deployed else -value,
            "return_se": 0.0,
            **{f"p_{first}": 0.8, f"p_{second}": 0.15, "p_timeout": 0.05},
            **{f"p_{first}_flagged": 0.25, f"p_{second}_flagged": 0.1, "episode_length": 7.0},
            **({"p_ghost_on_path": 0.05, "window_return": value / 2} if on_grid else {}),
            "optimal_return": 0.93 if on_grid else math.nan,
        }
        rows.append(Row.of(Facts(method, seed, level, 1000, 3.0), policy, found, deployed=deployed))
    for update, share in ((0, 0.0), (10, 0.5), (20, 1.0)):
        scaled = [
            dataclasses.replace(
                r,
                figures={**r.figures, GridRuns.score: share * r.figures[GridRuns.score]},
                env_steps=50 * update,
            )
            for r in rows
            if "=" not in r.policy
        ]
        folder.log_rows(update, scaled, GridRuns)
        points = {"loss/policy": 0.1}
        if len(policies) > 1:
            kinds = (f"labeled_{first}", f"labeled_{second}", "unlabeled")
            points |= {f"gate/{kind}": 0.5 for kind in kinds}
        if method == "reward_model_plain":
            columns = [column for column, _ in figures.REWARD_MODEL.values()]
            points |= dict(zip(columns, (0.99, 0.9, 0.01, 0.123), strict=True))
        folder.log_training(update, points)
    folder.finish(config, rows, GridRuns)


def spread(seed):
    return (seed - 2) / 100


def make_runs(folder):
    for method, means in RETURNS.items():
        for level, mean in zip(LEVELS, means, strict=True):
            for seed in SEEDS:
                path = folder / f"{method}-{level}" / f"seed_{seed}"
                make_run(path, method, level, seed, mean + spread(seed))
    return folder


@pytest.fixture
def runs(tmp_path):
    return make_runs(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The same runs and their report, to be looked at only."""
    folder = make_runs(tmp_path_factory.mktemp("runs"))
    page.write(folder)
    return folder


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def read_page(directory):
    return Page((directory / "report.html").read_text())


def test_the_summary_holds_the_statistics(runs, capsys):
    main(["report", str(runs)])
    table = pd.read_csv(runs / "summary.csv")
    assert list(table.columns[:9]) == [
        "method", "assumes", "train_oversight", "n_seeds", "iqm", "ci_low", "ci_high",
        "lowest", "highest",
    ]  # fmt: skip
    assert len(table) == 8
    for row in table.itertuples():
        mean = RETURNS[row.method][LEVELS.index(row.train_oversight)]
        values = [mean + spread(seed) for seed in SEEDS]
        assert row.iqm == pytest.approx(stats.trim_mean(values, 0.25))
        assert row.lowest == pytest.approx(min(values))
        assert row.highest == pytest.approx(max(values))
        assert (row.ci_low, row.ci_high) == (row.lowest, row.highest)  # of five seeds: their range
        assert row.n_seeds == 5
        assert row.window_return == pytest.approx(row.iqm / 2)
    paper = table.set_index(["method", "train_oversight"])["paper_window_return"]
    assert paper["routing", 0.1] == 0.51
    assert paper["naive", 0.01] == 0.02
    assert np.isnan(paper["reward_model_plain", 0.1])
    assert set(table[table.method == "ipw_hidden_flag"]["assumes"]) == {"hidden flags"}
    said = capsys.readouterr().out
    assert "note:" not in said  # nothing is missing
    assert "report.html" in said


def test_the_verdict_says_who_wins(runs):
    """Returns differ by more than the spread of seeds."""
    outcome = verdict.verdict(gather(runs))
    assert outcome.lines == [
        "With labels alone, by IQM of the return: reward_model_plain wins at 1% (0.80) and "
        "10% (0.85).",
        "With more: hidden flags, ipw_hidden_flag has no rival at 1% (0.90, +0.10) and "
        "10% (0.90, +0.05).",
        "Where it flips: with labels alone nowhere (never beaten: reward_model_plain).",
    ]
    assert outcome.grid.set_index("method").T.to_dict("list") == {
        "routing": ["labels", "loss", "loss"],
        "reward_model_plain": ["labels", "win", "win"],
        "naive": ["labels", "loss", "loss"],
        "ipw_hidden_flag": ["hidden flags", "sole", "sole"],
    }


def test_the_verdict_is_the_same_on_the_page_and_in_the_terminal(runs, capsys):
    main(["report", str(runs)])
    outcome, said = verdict.verdict(gather(runs)), capsys.readouterr().out
    text = read_page(runs).text
    for line in outcome.lines:
        assert line in said
        assert line in [part.strip() for part in text]
    for cells in outcome.grid.itertuples(index=False):
        assert re.search(" +".join(cells), said)
        ranks = text[text.index("rank, by what is assumed") :]
        shown = [part.strip() for part in ranks[ranks.index(cells[0]) :] if part.strip()]
        assert shown[2 : 2 * len(LEVELS) + 1 : 2] == list(cells[2:])  # each after its number


def test_the_verdict_says_where_it_flips(runs):
    for level in LEVELS:
        shutil.rmtree(runs / f"reward_model_plain-{level}")
    outcome = verdict.verdict(gather(runs))
    assert "routing wins at 1% (0.50); naive wins at 10% (0.75)" in outcome.lines[0]
    assert outcome.lines[2] == (
        "Where it flips: with labels alone from routing to naive between 1% and 10%."
    )


def test_neighboring_levels_are_told_together():
    def standing(best, score):
        return verdict.Standing(best, score, {best: verdict.WIN, "other": verdict.LOSS})

    at = {0.01: standing("a", 0.8), 0.02: standing("b", 0.5), 0.05: standing("b", 0.7)}
    at |= {0.1: standing("b", 0.6), 0.2: standing("a", 0.9), 0.3: standing("a", 0.9)}
    alone = {level: standing("c", 0.4) for level in (0.02, 0.05, 0.1)}
    assert verdict._winners(at, alone) == (
        "a wins at 1% (0.80), 20% (0.90) and 30% (0.90); "
        "b wins at 2% to 10% (0.50 to 0.70, +0.10 to +0.30)"
    )
    alone[0.1] = standing("c", 0.7)  # a loss is told apart
    assert "b wins at 2% (0.50, +0.10), 5% (0.70, +0.30) and 10% (0.60, -0.10)" in (
        verdict._winners(at, alone)
    )
    del alone[0.1]  # and where nobody assumes less
    assert "b wins at 2% (0.50, +0.10), 5% (0.70, +0.30) and 10% (0.60)" in (
        verdict._winners(at, alone)
    )


def test_one_run_ranks_nobody(runs):
    for seed in (1, 2, 3, 4):
        shutil.rmtree(runs / "reward_model_plain-0.1" / f"seed_{seed}")
    outcome = verdict.verdict(gather(runs))
    assert outcome.lines[0].endswith(
        "too few seeds to rank, reward_model_plain leads at 10% (0.83)."
    )
    at_ten = dict(zip(outcome.grid["method"], outcome.grid["10%"], strict=True))
    assert at_ten == {
        "routing": "too few", "naive": "too few", "reward_model_plain": "too few",
        "ipw_hidden_flag": "sole",
    }  # fmt: skip


def test_improvement_is_the_share_of_pairs_won(runs):
    table = tables.improvement(gather(runs))
    assert table.loc["reward_model_plain", "routing"] == 1.0
    assert table.loc["routing", "naive"] == pytest.approx((1 + 0) / 2, abs=0.01)
    assert np.isnan(table.loc["naive", "naive"])
    off = ~np.eye(len(table), dtype=bool)
    assert (table + table.T).to_numpy()[off] == pytest.approx(1.0)


def test_the_page_is_one_file_with_every_figure(written):
    found = read_page(written)
    text = " ".join(found.text)
    for heading in TITLES.values():
        assert heading in text
    for tag, attributes in found.tags:
        assert tag not in ("script", "iframe", "object", "link", "img"), tag
        for name in ("src", "href", "xlink:href"):
            local = "#" if tag != "a" else ("#", "./")  # nothing is fetched
            assert attributes.get(name, "#").startswith(local)
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", (written / "report.html").read_text()))
    assert used
    for name in used:  # clip paths and markers of one figure are not taken for another's
        assert ids.count(name) == 1, name
    assert "prefers-color-scheme: dark" in (written / "report.html").read_text()
    assert "12.3%" not in text
    assert "0.123" in text  # calibration of the reward model on unlabeled endings
    for name in ("headline", *DRAWN):
        assert (written / "figures" / f"{name}.svg").read_text().startswith("<?xml")
        image = matplotlib.image.imread(written / "figures" / f"{name}.png")
        assert image[..., :3].std() > 0.01


def test_every_picture_says_what_it_is(written):
    found = read_page(written)
    pictures = [a for tag, a in found.tags if tag == "svg" and "aria-hidden" not in a]
    assert len(pictures) > len(DRAWN)
    ids = {attributes.get("id"): tag for tag, attributes in found.tags}
    for attributes in pictures:
        assert attributes["role"] == "img"
        title, text = attributes["aria-labelledby"].split()
        assert (ids[title], ids[text]) == ("title", "desc")
    for name in ("headline", *DRAWN):
        root = ElementTree.parse(written / "figures" / f"{name}.svg").getroot()
        assert root.get("role") == "img"
        first, second = root[0], root[1]
        assert [e.tag.rpartition("}")[2] for e in (first, second)] == ["title", "desc"]
        assert first.text
        assert second.text


def test_marks_say_their_values(written):
    root = ElementTree.parse(written / "figures" / "returns.svg").getroot()
    told = {e.text for e in root.iter() if e.tag.endswith("title")}
    assert "naive at 1%: 0.200 (0.180 to 0.220)" in told
    assert {f"naive at 1%, one seed: {0.2 + spread(s):.3f}" for s in SEEDS} <= told
    assert "routing, as published, at 10%: 0.51" in told
    text = (written / "figures" / "endings_by_flag.svg").read_text()
    assert "naive at 10%: diamond, not flagged 55.0%" in text
    assert (
        "reward_model_plain beats routing: 1.00"
        in (written / "figures/improvement.svg").read_text()
    )


def test_from_a_number_to_runs_and_what_they_show(runs):
    seen = runs / "naive-0.1" / "seed_3"
    (seen / "pictures").mkdir()
    (seen / "pictures" / "rollouts.gif").write_bytes(b"GIF89a")
    (seen / "play.html").write_text("<p>")
    shutil.copytree(runs / "naive-0.1" / "seed_4", runs / "javascript:1")
    shutil.rmtree(runs / "naive-0.1" / "seed_4")
    page.write(runs)
    tags = read_page(runs).tags
    links = [attributes["href"] for tag, attributes in tags if tag == "a"]
    anchors = {attributes.get("id") for _, attributes in tags}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    assert "./javascript%3A1/" in links
    for link in links:
        assert link.startswith("#") or (runs / unquote(link)).exists(), link
    assert "./naive-0.1/seed_3/play.html" in links
    assert "./naive-0.1/seed_3/pictures/rollouts.gif" in links
    assert sum(link.endswith("/") for link in links) == 40  # one for each run


def test_methods_are_ranked_within_what_they_assume(written):
    assert tables.ranked(gather(written)) == {
        "labels": ["reward_model_plain", "routing", "naive"],
        "hidden flags": ["ipw_hidden_flag"],
    }


def test_labels_at_the_ends_of_lines_do_not_touch():
    wanted, heights = [0.1, 0.11, 0.12, 0.5, 0.98, 0.99], [0.05, 0.1, 0.05, 0.05, 0.05, 0.05]
    places = spread_apart(wanted, heights, 0.0, 1.0)
    lows = [place - height / 2 for place, height in zip(places, heights, strict=True)]
    highs = [place + height / 2 for place, height in zip(places, heights, strict=True)]
    assert lows[0] >= -1e-9
    assert highs[-1] <= 1 + 1e-9
    assert all(low >= high - 1e-9 for low, high in zip(lows[1:], highs[:-1], strict=True))
    assert places[3] == 0.5  # what has room stays


def test_panels_that_are_compared_have_one_scale(written):
    found = gather(written)
    own = [axes for axes in figures.returns(found).axes if "paper" not in axes.get_title()]
    for panels in (own, figures.learning_curves(found).axes, figures.steering(found).axes):
        assert len({axes.get_ylim() for axes in panels}) == 1
        for axes in panels:
            assert axes.get_legend() is None  # names stand beside the data


def test_odd_names_are_drawn_in_short_and_without_warnings(tmp_path, recwarn):
    world = {f"max_steps_{i}": i for i in range(3)}
    for number, text in enumerate(["$x$" * 40, "plain words " * 20]):
        settings = {"algo": "ppo", "env": "X-v0", "env_settings": {"odd": text} | world}
        for seed in (0, 1):
            make_run(tmp_path / f"{number}-{seed}", "routing", 0.1, seed, 0.5, settings)
    page.write(tmp_path)
    assert not recwarn.list
    assert text in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("level", [0.0, 0.1, 1.0])
def test_one_level_stands_in_the_middle(level, recwarn):
    axes = Figure().subplots()
    place = level_axis(axes, [level])(level)
    low, high = axes.get_xlim()
    assert low * high == pytest.approx(place**2)
    assert low < 0.8 * place < 1.25 * place < high  # marks that are shifted are seen, too
    assert not recwarn


def test_figures_show_the_numbers(runs):
    figure = figures.returns(gather(runs))
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    assert list(lines["routing, as published"].get_ydata()) == [0.28, 0.51]
    (axes,) = [a for a in figure.axes if a.get_title() == "assume labels, one expert"]
    naive = next(line for line in axes.get_lines() if line.get_label() == "naive")
    assert list(naive.get_ydata()) == pytest.approx([0.2, 0.75])
    dots = np.concatenate([x.get_ydata() for x in axes.get_lines() if x.get_linestyle() == "None"])
    assert len(dots) == 2 * 2 * 5  # two methods, two levels, every seed


def test_what_is_missing_is_said_and_the_rest_reported(runs, capsys):
    shutil.rmtree(runs / "naive-0.01" / "seed_3")
    (runs / "naive-0.1" / "seed_1" / "result.json").unlink()
    (runs / "routing-0.1" / "seed_0" / "result.json").write_text("[{")
    (runs / "routing-0.1" / "seed_2" / "config.yaml").write_text("method: rooting")
    (runs / "routing-0.01" / "seed_4" / "metrics.csv").write_text('update\n"')
    for seed in (1, 2, 3, 4):
        shutil.rmtree(runs / "reward_model_plain-0.1" / f"seed_{seed}")
    shutil.rmtree(runs / "ipw_hidden_flag-0.1")
    old = runs / "naive-0.01" / "seed_0" / "config.yaml"
    old.write_text(re.sub("commit: .*", "commit: 0123abc", old.read_text()))
    shutil.copytree(runs / "naive-0.01" / "seed_1", runs / "again")
    main(["report", str(runs)])
    said = capsys.readouterr().out
    for line in (
        "Not finished and left out: seed_1 in naive-0.1.",
        "routing-0.1/seed_0 cannot be read and is left out",
        "routing-0.1/seed_2 cannot be read and is left out",
        "routing-0.01/seed_4 cannot be read and is left out",
        "naive at 0.01 lacks seeds 3.",
        "reward_model_plain at 0.1 lacks seeds 1, 2, 3, 4; one seed has no interval",
        "ipw_hidden_flag has no run at oversight 0.1",
        "2 different versions",
        "naive-0.01/seed_1 repeats again",
    ):
        assert line in said, line
        assert line in " ".join(read_page(runs).text), line
    assert "Traceback" not in said
    table = pd.read_csv(runs / "summary.csv").set_index(["method", "train_oversight"])
    assert table.loc[("reward_model_plain", 0.1), "n_seeds"] == 1
    assert np.isnan(table.loc[("reward_model_plain", 0.1), "ci_low"])
    assert table.loc[("routing", 0.1), "n_seeds"] == 3


@pytest.mark.parametrize("content", ["nothing", "no folder", "unfinished"])
def test_without_a_finished_run_there_is_no_report(tmp_path, capsys, content):
    path = tmp_path / "runs"
    if content != "no folder":
        path.mkdir()
    if content == "unfinished":
        RunFolder.create(path / "x", Config())
    with pytest.raises(SystemExit) as stop:
        main(["report", str(path)])
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (path / "report.html").exists()


def test_settings_that_runs_vary_tell_them_apart(tmp_path):
    for coefficient in (0.5, 2.0):
        for seed in (0, 1):
            make_run(
                tmp_path / f"{coefficient}-{seed}", "routing", 0.1, seed, coefficient / 4,
                {"reinforce": {"gate_coef": coefficient}, "ppo": {"gate_coef": coefficient + seed}},
            )  # fmt: skip
    found = gather(tmp_path)
    assert found.names == [
        "routing (reinforce.gate_coef=[0.5])",
        "routing (reinforce.gate_coef=[2.0])",
    ]
    assert list(tables.summary(found)["iqm"]) == pytest.approx([0.125, 0.5])
    (outcome,) = (each.verdict for each in page.write(tmp_path))
    assert outcome.lines[0].startswith("With labels alone, by IQM of the return: too few seeds to")
    assert outcome.lines[2].endswith("nothing is told apart, for want of seeds.")
    assert gather(tmp_path).reference is None  # there is no one routing to show beside others


def test_runs_that_a_sweep_plans_and_has_not_begun_are_missing(runs):
    grid = {"method": [*RETURNS, "oracle"], "oversight": list(LEVELS), "seeds": list(range(6))}
    (runs / "sweep.yaml").write_text(yaml.safe_dump({"grid": grid}))
    missing = gather(runs).missing
    assert "Planned and not begun: seed_5 in naive-0.1." in missing
    assert "Planned and not begun: all of oracle-0.01 and oracle-0.1." in missing
    (runs / "sweep.yaml").write_text("grid: 5")
    assert any("sweep cannot be read" in line for line in gather(runs).missing)


def replaced(old, new):
    return lambda text: text.replace(old, new, 1)


DAMAGE = {
    "an empty result": ("result.json", lambda text: "[]"),
    "no list": ("result.json", lambda text: "3"),
    "an unknown method": ("result.json", replaced('"method": "naive"', '"method": "gone"')),
    "text for a number": (
        "result.json",
        replaced('"optimal_return": 0.93', '"optimal_return": "x"'),
    ),
    "an unknown method in a row more": (
        "result.json",
        lambda text: json.dumps([*json.loads(text), json.loads(text)[0] | {"method": "gone"}]),
    ),
    "a chance above 1": ("result.json", replaced('"p_timeout": 0.', '"p_timeout": 8.')),
    "a method that is none": ("metrics.csv", replaced(",naive,", ",gone,")),
    "no truth value": ("metrics.csv", replaced("False", "3")),
    "text in a column": ("metrics.csv", replaced("\n0,", "\nx,")),
    "a number missing": ("metrics.csv", replaced("\n0,", "\n,")),
    "infinity": ("training.csv", lambda text: re.sub("\n[0-9]+,", "\ninf,", text, count=1)),
    "columns missing": ("metrics.csv", lambda text: "foo\n1\n"),
    "no update": ("training.csv", lambda text: "foo\n1\n"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_named_and_left_out(runs, damage):
    name, change = DAMAGE[damage]
    file = runs / "naive-0.1" / "seed_2" / name
    file.write_text(change(file.read_text()))
    found = gather(runs)
    assert any(line.startswith("naive-0.1/seed_2 cannot be read") for line in found.missing)
    assert len(found.deployed) == 39


def test_odd_provenance_does_no_harm(runs):
    config = runs / "naive-0.1" / "seed_2" / "config.yaml"
    text = config.read_text()
    config.write_text(text[: text.index("provenance:")] + "provenance: 5")
    found = gather(runs)
    assert len(found.deployed) == 40
    assert "unknown" in found.versions


def test_gates_are_drawn_if_there_is_anything_to_draw(runs):
    found = gather(runs)
    assert figures.gate(found) is not None
    found.training["gate/unlabeled"] = np.nan  # at full oversight nothing is unlabeled
    assert figures.gate(found) is not None
    for column in GATE:
        found.training[column] = np.nan
    assert figures.gate(found) is None


def drawn_labels(figure):
    return {label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]}


def test_behaviors_have_the_names_that_their_environment_gives(tmp_path):
    names = ("left_flagged", "right")  # the first of which looks like a part of another
    for seed in (0, 1):
        make_run(tmp_path / f"r{seed}", "routing", 0.1, seed, 0.5, behaviors=names)
        make_run(tmp_path / f"n{seed}", "naive", 0.1, seed, 0.4, behaviors=names)
    (found,) = (each.found for each in page.write(tmp_path))
    assert figures.behaviors(found) == list(names)
    halves = {f"{name}, {half}" for name in names for half in ("flagged", "not flagged")}
    assert drawn_labels(figures.endings_by_flag(found)) == halves | {"timeout"}
    gate = drawn_labels(figures.gate(found))
    assert gate == {"labeled left flagged", "labeled right", "unlabeled"}
    (axes,) = figures.steering(found).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["right", "half", names[0]]
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [0, 0.5, 1]
    assert list(line.get_ydata()) == [-0.5, -0.5, 0.5]
    columns = list(pd.read_csv(tmp_path / "summary.csv"))
    assert columns[9:14] == [
        "optimal_return", "p_left_flagged", "p_right", "p_timeout", "episode_length",
    ]  # fmt: skip
    text = (tmp_path / "report.html").read_text()
    assert "<td>left_flagged</td>" in text  # what is deployed
    assert "Ghosts on the shortest path" not in text


def test_what_old_curves_do_not_say_is_taken_from_the_result(runs):
    """Version 0.1 had no column that says which policy is deployed."""
    for path in runs.glob("*/*/metrics.csv"):
        pd.read_csv(path).drop(columns="deployed").to_csv(path, index=False)
    found = gather(runs)
    assert set(found.curves["policy"]) == {"diamond", "single"}
    assert len(found.curves) == len(found.deployed) * 3


def test_names_from_files_are_text_and_not_markup(runs):
    evil = "<img src=x onerror=alert(1)>"
    folder = runs / "naive-0.01" / evil.replace("/", "")
    shutil.copytree(runs / "naive-0.01" / "seed_0", folder)
    config = folder / "config.yaml"
    config.write_text(re.sub("commit: .*", f"commit: '{evil}'", config.read_text()))
    page.write(runs)
    found = read_page(runs)
    assert not [tag for tag, _ in found.tags if tag in ("img", "script")]
    assert evil in " ".join(found.text)


def test_the_papers_figure_is_carried_along():
    paper = figures.paper_figure()
    assert set(paper) == {"routing", "naive", "filtering"}
    assert paper["routing"][0.003] == 0.10
    assert paper["filtering"][0.4] == 0.75
    source = Path(tables.__file__).parents[1] / "data" / "paper_figure_6a.csv"
    assert "arXiv 2410.04332" in source.read_text()


def test_each_overseer_has_a_page_and_all_pages_lead_to_all(tmp_path, capsys):
    for overseer, offset in (("noisy", 0.2), ("uniform", 0.0)):
        for method, level, seed in itertools.product(("routing", "naive"), LEVELS, SEEDS):
            value = RETURNS[method][LEVELS.index(level)] - offset + 0.001 * seed
            path = tmp_path / overseer / f"{method}-{level}" / str(seed)
            make_run(path, method, level, seed, value, {"overseer": overseer})
    main(["report", str(tmp_path)])
    said = capsys.readouterr().out
    assert said.index("overseer uniform (report.html)") < said.index("noisy (report-noisy.html)")
    pages = {name: (tmp_path / name).read_text() for name in ("report.html", "report-noisy.html")}
    assert 'href="./report-noisy.html"' in pages["report.html"]
    assert 'href="./report.html"' in pages["report-noisy.html"]
    for text in pages.values():
        assert "0.70" in text  # naive at 10%, in the table of all overseers
        assert "routing (labels" not in text  # what the overseer sets is no other method
    table = pd.read_csv(tmp_path / "summary.csv").set_index(["overseer", "method"])
    iqm = table[table["train_oversight"] == 0.1]["iqm"]
    assert iqm["noisy", "naive"] == pytest.approx(iqm["uniform", "naive"] - 0.2)
    assert (tmp_path / "figures" / "noisy").is_dir()
