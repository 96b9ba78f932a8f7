"""The playground in a real browser: what it computes, what hands can do there, what it must not."""

import base64
import json
import math
import statistics
from importlib.resources import files
from pathlib import Path

import browser
import packed
import pytest
import torch

from oversight_rl.agents.steering import parse
from oversight_rl.cli import main, train
from oversight_rl.envs import render
from oversight_rl.envs.overseers import Labels
from oversight_rl.envs.settings import WorldConfig
from oversight_rl.envs.world import World
from oversight_rl.experiments.oversight.evaluation import Evaluator
from oversight_rl.runs.folder import RunFolder
from oversight_rl.runs.loop import judged_again
from oversight_rl.runs.rows import Facts

DOCS = Path(__file__).parent.parent / "docs" / "playground.html"
SMALL = ["--device", "cpu", "--agent.hidden", "12", "10", "--reinforce.updates", "10"]
SMALL += ["--reinforce.worlds", "64", "--reinforce.steps", "8", "--evaluation.every", "10"]
SMALL += ["--world.rows", "3", "--world.cols", "4", "--evaluation.oversight", "0.1"]
KINDS = {
    "routing": ["--agent.experts", "3"],
    "contrastive_routing": ["--agent.gate-conv", "--agent.value-activation", "none"],
    "no_gate": ["--labels.shares", "1", "0.5", "--no-pictures"],  # and no history
    "naive": ["--no-pictures"],
    "filtering_hidden_flag": ["--no-pictures"],
}
ELSEWHERE = ["--algo", "ppo", "--env", "MiniGrid-DiamondGhost-5x5-v0", "--device", "cpu"]
ELSEWHERE += ["--ppo.updates", "1", "--ppo.worlds", "4", "--ppo.steps", "8", "--no-pictures"]
ELSEWHERE += ["--ppo.batch-size", "16", "--agent.hidden", "8", "--evaluation.oversight", "0.1"]
DIGITS = ["--algo", "partition", "--partition.updates", "20", "--partition.hidden", "12"]
DIGITS += ["--partition.code", "4", "--partition.certificate-steps", "40", "--device", "cpu"]
STORIES = ["--algo", "stories", "--stories.updates", "4", "--stories.stories", "300"]
STORIES += ["--stories.relearn-steps", "5", "--stories.tune-steps", "5", "--device", "cpu"]
OTHERS = {"elsewhere": ELSEWHERE, "digits": DIGITS, "stories": STORIES}
HIT = "</script><script>window.hit=1</script><img src=x onerror=window.hit=1>"

pytestmark = pytest.mark.skipif(
    browser.find() is None,
    reason="no Chromium is installed: nothing of the playground's page is tried in a browser",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for method, more in KINDS.items():
        train([*SMALL, "--method", method, *more, "--run-dir", str(folder / method)])
    for name, flags in OTHERS.items():
        train([*flags, "--run-dir", str(folder / name)])
    return [folder / name for name in (*KINDS, *OTHERS)]


@pytest.fixture(scope="module")
def page(runs):
    path = runs[0].parent / "all.html"
    main(["play", *map(str, runs), "--out", str(path)])
    return path


@pytest.fixture(scope="module")
def window():
    with browser.Browser() as opened:
        yield opened


@pytest.fixture
def shown(window, page):
    """The page, new; whatever goes wrong in it fails the test."""
    window.errors.clear()
    window.requests.clear()
    window.open(page)
    yield window
    assert window.errors == []


# ---- what it computes


@pytest.mark.parametrize("method", KINDS)
def test_networks_say_what_torch_says(shown, page, method):
    """In states drawn at random, of the first moment and the last, with the page's own numbers."""
    run = packed.data_of(page)["runs"][list(KINDS).index(method)]
    world = World(WorldConfig(**run["world"]))
    generator = torch.Generator().manual_seed(0)
    state = world.reset(torch.rand(40, world.noise_channels, generator=generator))
    flags = torch.arange(40) % 4
    state = type(state)(**vars(state) | {"diamond_flag": flags >= 2, "ghost_flag": flags % 2 == 1})
    asked = torch.stack([state.agent, state.diamond, state.ghost, flags], -1).tolist()
    for moment, tensors in enumerate(packed.moments_of(run)):
        with torch.no_grad():
            output = packed.agent_of(run, tensors)(world.active(state)[None])
        where = f"runs[{list(KINDS).index(method)}]"
        found = shown.run(
            f"{json.dumps(asked)}.map(([a, d, g, f]) => {{ const run = {where},"
            f" agent = run.agents[{moment}], w = new World(run.world, run.discount);"
            " agent.forward(w.active(a, d, g, f));"
            " return [[...agent.logits], [...agent.gate], agent.value, [...agent.bias]]; })"
        )
        logits, gate, value, bias = (
            torch.tensor(part).float() for part in zip(*found, strict=True)
        )
        near = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(logits, output.expert_logits[0].flatten(1), **near)
        torch.testing.assert_close(gate, output.gate[0], **near)
        torch.testing.assert_close(bias, output.bias[0].expand(40, -1), **near)
        torch.testing.assert_close(value, output.value[0], **near)


STEERED = ["mixture", "diamond", "ghost", "diamond=0.3,ghost=0.7"]


@pytest.mark.parametrize("method", ["routing", "naive", "filtering_hidden_flag", "no_gate"])
def test_sums_over_all_starts_are_exact(shown, page, method):
    """Return, endings and steps at several levels are Python's, with the same weights."""
    index = list(KINDS).index(method)
    run = packed.data_of(page)["runs"][index]
    config = WorldConfig(**run["world"])
    agent = packed.agent_of(run, packed.moments_of(run)[-1])
    k = run["net"]["experts"]
    texts = STEERED if k > 1 else ["single"]
    asked = [
        [text, t, greedy] for text in texts for t, greedy in ((1, False), (0.5, False), (1, True))
    ]
    policies = [parse(text, k).with_options(greedy, t) for text, t, greedy in asked]
    levels = [0.0, 0.3, 1.0]
    evaluator = Evaluator(config, run["discount"], labels=Labels(shares=run["shares"]))
    (rows,) = evaluator.evaluate(
        agent.prepare(), [Facts("x", 0, 0.1)], policies, [levels], "diamond"
    )
    steerings = [
        {"weights": policy.weights, "temperature": policy.temperature, "greedy": policy.greedy}
        for policy in policies
    ]
    found = shown.run(
        f"(() => {{ const run = runs[{index}], w = new World(run.world, run.discount);"
        " const all = new Everywhere(run.agents.at(-1), w); while (all.done < 1) all.fill(50);"
        f" return {json.dumps(steerings)}.map((how) => {json.dumps(levels)}.map((level) => {{"
        " const sums = all.sums(how, 0);"
        " const weights = flagWeights(...run.shares.map((share) => share * level));"
        " return ['value', 'pDiamond', 'pGhost', 'steps'].map((name) =>"
        " sums[name].reduce((sum, x, f) => sum + x * weights[f], 0)); })); })()"
    )
    names = ["ground_truth_return", "p_diamond", "p_ghost", "episode_length"]
    wanted = torch.tensor([[row.figures[name] for name in names] for row in rows])
    assert len(rows) == len(policies) * len(levels)
    torch.testing.assert_close(torch.tensor(found).flatten(0, 1), wanted, rtol=1e-6, atol=1e-6)


def test_the_worst_placement_is_the_worst(shown, page):
    """Found by trying all placements on the board, one by one."""
    shown.run("set({ weight: 1, flags: 1 })")
    shown.wait("!$('worst').disabled")
    shown.run("$('worst').click()")
    least = shown.run(
        "(() => { const how = steering(), agent = agentOf(); let least = 2;"
        " for (let d = 0; d < world.cells; d++) for (let g = 0; g < world.cells; g++) {"
        "  if (d === g) continue;"
        "  const policy = world.policy(agent, world.outputs(agent, d, g, state.flags), how);"
        "  const { pDiamond } = world.exact(policy, d, g);"
        "  for (let a = 0; a < world.cells; a++)"
        "   if (a !== d && a !== g) least = Math.min(least, pDiamond[a]); }"
        " return least; })()"
    )
    found, told = shown.run("[mine.found.pDiamond[state.agent], $('story').textContent]")
    assert found == pytest.approx(least, abs=1e-5)
    assert told.startswith("The worst start of all.")
    cells = shown.run(
        "[state.agent, state.ghost, state.diamond].map((c) => [c % 4, Math.floor(c / 4)])"
    )
    far = [[abs(x - i) + abs(y - j) for i, j in cells] for x, y in cells]
    between = far[0][1] + far[1][2] == far[0][2]
    assert ("The ghost stands on a shortest way there." in told) is between


def test_episodes_meet_the_same_chances_on_all_boards(shown):
    """A thousand, and their tally is near the exact chances; where policies agree, it is one."""
    shown.run("set({ weight: null })")
    shown.run("for (let i = 0; i < 10; i++) $('hundred').click()")
    tallies = shown.run(
        "parts().map(({ tally, found }) => ({ ...tally, p: found.pDiamond[state.agent] }))"
    )
    for tally in tallies:
        played = tally["diamond"] + tally["ghost"] + tally["timeout"]
        assert played == 1000
        error = math.sqrt(tally["p"] * (1 - tally["p"]) / played)
        assert abs(tally["diamond"] / played - tally["p"]) < 4 * error + 1e-9
    mine, mixture, *_ = tallies  # the same policy, on the same numbers
    assert mine == mixture


# ---- what hands can do


def place(shown, cell):
    """The middle of a cell of the large board, on the screen."""
    return shown.run(
        f"(() => {{ const box = mine.board.rects[{cell}].getBoundingClientRect();"
        " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )


def free_cells(shown):
    taken = shown.run("[state.agent, state.diamond, state.ghost]")
    return [cell for cell in range(12) if cell not in taken]


@pytest.mark.parametrize("piece", ["agent", "diamond", "ghost"])
def test_pieces_are_dragged(shown, piece):
    before = shown.run("[...mine.found.chances]")
    target = free_cells(shown)[0]
    others = [name for name in ("agent", "diamond", "ghost") if name != piece]
    start, taken = shown.run(f"[state.{piece}, state.{others[0]}]")
    shown.mouse("mousePressed", *place(shown, start))
    shown.mouse("mouseMoved", *place(shown, taken))  # where another piece is, it does not go
    assert shown.run(f"state.{piece}") == start
    shown.mouse("mouseMoved", *place(shown, target))
    shown.mouse("mouseReleased", *place(shown, target))
    assert shown.run(f"state.{piece}") == target
    assert (shown.run("[...mine.found.chances]") != before) == (piece != "agent")
    shown.mouse("mouseMoved", *place(shown, free_cells(shown)[-1]))  # it was let go
    assert shown.run(f"state.{piece}") == target
    boards = shown.run(f"[mine, ...boards].map(({{ board }}) => board.shown.{piece})")
    assert set(boards) == {target}


def test_pieces_are_moved_by_keys(shown):
    """By arrows, over what stands in the way; a square is watched by the space bar."""
    shown.run("set({ agent: 4, diamond: 5, ghost: 11, flags: 0 }); mine.board.pieces.agent.focus()")
    shown.key("ArrowRight")
    assert shown.run("state.agent") == 6
    shown.key("ArrowUp")
    shown.key("ArrowUp")  # the edge
    assert shown.run("state.agent") == 2
    shown.run("mine.board.pieces.ghost.focus()")
    shown.key(" ")
    assert shown.run("[state.flags, $('watch-ghost').checked]") == [1, True]
    label = shown.run("mine.board.pieces.ghost.getAttribute('aria-label')")
    assert label.startswith("ghost, row 3, column 4, watched")


def test_a_cell_that_is_pointed_at_is_told(shown):
    cell = free_cells(shown)[3]
    shown.mouse("mouseReleased", *place(shown, cell))
    shown.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    x, y = place(shown, cell)
    shown.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert shown.run("$('cell-name').textContent") == f"row {cell // 4 + 1}, column {cell % 4 + 1}"
    wanted = shown.run(f"percent(mine.found.chances[{cell} * 4])")
    assert shown.run("$('cell').rows[1].cells[1].textContent") == wanted


def pull(shown, name, value):
    shown.run(f"$('{name}').value = {value}; $('{name}').dispatchEvent(new Event('input'))")


def test_what_is_set_is_in_the_address_and_in_the_command(shown, page, tmp_path):
    pull(shown, "weight", 0.8)
    pull(shown, "temperature", -0.3)
    pull(shown, "level", 0.3)
    for name in ("watch-diamond", "watch-ghost"):
        shown.run(f"$('{name}').click()")
    shown.run("document.querySelector('#compare [value=watched]').click()")
    shown.run("document.querySelector('#tint [value=gate]').click()")
    pull(shown, "moment", 0)
    shown.run(f"move('agent', {free_cells(shown)[0]})")
    shown.wait("location.hash.slice(1) === address()")
    wanted, fragment = shown.run("[JSON.stringify(state), location.hash]")
    shown.open(page, fragment)
    assert json.loads(shown.run("JSON.stringify(state)")) == json.loads(wanted)
    assert shown.run("[$('weight').value, $('level').value, $('moment').value]") == [
        "0.8",
        "0.3",
        "0",
    ]

    pull(shown, "moment", 1)  # the command evaluates the agent as trained
    shown.wait("!$('worst').disabled")
    program, name, *words = shown.run("$('command').textContent").split()
    assert (program, name) == ("oversight-rl", "evaluate")
    main([name, *words, "--json", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["policy"], row["temperature"], row["deploy_oversight"]) == (
        "diamond=0.8,ghost=0.2",
        0.5,
        0.3,
    )
    told = float(
        shown.run("$('world').rows[1].cells[1].textContent").replace("\N{MINUS SIGN}", "-")
    )
    assert told == pytest.approx(row["ground_truth_return"], abs=2e-3)


@pytest.mark.parametrize(
    "fragment",
    ["#r=9&m=-1&a=1&d=1&g=1", "#w=NaN&t=1e9&c=__proto__&v=constructor", "#%00&&=&r", "#a=1.5"],
)
def test_an_address_that_makes_no_sense_is_left_aside(shown, page, fragment):
    usual = shown.run("address()")
    shown.open(page, fragment)
    assert shown.run("address()") == usual


def test_runs_stand_side_by_side_and_are_chosen(shown):
    shown.run("document.querySelector('#compare [value=runs]').click()")
    assert shown.run("boards.length") == len(KINDS)
    naive = list(KINDS).index("naive")
    shown.run(f"$('run').value = {naive}; $('run').dispatchEvent(new Event('change'))")
    assert "cannot be steered" in shown.run("$('lead').textContent")
    assert shown.run("$('steering').hidden") is True


def test_elsewhere_a_recording_is_shown_when_it_is_asked_for(shown, page):
    shown.run(f"$('run').value = {len(KINDS)}; $('run').dispatchEvent(new Event('change'))")
    assert shown.run("[$('live').hidden, $('tour').hidden, $('film').hidden]") == [True] * 3
    assert "MiniGrid-DiamondGhost-5x5-v0" in shown.run("$('lead').textContent")
    policies = "[...$('returns').rows].map((row) => row.cells[0].textContent)"
    assert shown.run(policies) == ["policy", "mixture", "diamond", "ghost"]
    shown.run("$('show-film').click()")
    shown.wait("$('film').naturalWidth > 3 * 5 * 30")
    shown.wait(f"location.hash.startsWith('#r={len(KINDS)}&')")
    fragment = shown.run("location.hash")
    shown.open(page, fragment)
    assert shown.run("$('live').hidden") is True
    shown.run("$('run').value = 0; $('run').dispatchEvent(new Event('change'))")
    assert shown.run("[$('live').hidden, $('recorded').hidden, boards.length]") == [False, True, 3]


VIEWS = "[...$('view').querySelectorAll('label')].map((label) => label.textContent)"


def switch(shown, view):
    shown.run(f"$('view').querySelectorAll('input')[{view}].click()")


def test_parts_of_a_code_are_switched_on_and_off(shown, page, runs):
    shown.open(page, f"#r={len(KINDS) + 1}")
    hidden = "['live', 'recorded', 'tour', 'story', 'viewed'].map((id) => $(id).hidden)"
    assert shown.run(hidden) == [True] * 4 + [False]
    assert shown.run(VIEWS) == ["all parts", "0-4 alone", "5-9 alone", "none: the best constant"]
    seen = []
    for view in range(4):
        switch(shown, view)
        shown.wait("$('seen').firstElementChild.naturalWidth === 10 * 44")
        seen.append(shown.run("$('seen').firstElementChild.src"))
    with judged_again(RunFolder.open(runs[-2]), final=False) as (run, _):
        pictures = [base64.b64encode(view).decode() for view in run.views(0).values()]
    assert seen == [f"data:image/png;base64,{picture}" for picture in pictures]
    who = "[...$('figures').rows].map((row) => row.cells[0].textContent)"
    assert shown.run(who) == ["", "parts", "0-4", "5-9", "whole", "constant"]
    switch(shown, 2)
    shown.wait("location.hash.endsWith('s=2')")
    shown.open(page, shown.run("location.hash"))
    assert shown.run("$('seen').firstElementChild.src") == seen[2]


def test_stories_are_told_before_and_after(shown, page, runs):
    shown.open(page, f"#r={len(KINDS) + 2}")
    models = ["by the model before it forgot", "by the model after it forgot"]
    assert shown.run(VIEWS) == [*models, "as it was"]
    with judged_again(RunFolder.open(runs[-1]), final=False) as (run, _):
        told = run.told()
    topics = "[...$('seen').querySelectorAll('h3')].map(({ textContent }) => textContent)"
    lines = "[...$('seen').querySelectorAll('p')].map(({ textContent }) => textContent)"
    for view, when in enumerate(("before", "after", "as it was")):
        switch(shown, view)
        assert shown.run(topics) == list(told)
        stories = [(opening, ways[when]) for those in told.values() for opening, ways in those]
        assert shown.run(lines) == [f"{opening} {went}" for opening, went in stories]
    titles = shown.run("[...$('figures').rows[0].cells].map(({ textContent }) => textContent)")
    assert titles == ["", "forgetting", "forget", "retain"]  # what is known of both


def test_the_tour_ends_where_the_agent_fails(shown):
    for i in range(3):
        shown.run(f"document.querySelectorAll('#tour button')[{i}].click()")
        assert shown.run("$('story').textContent") == shown.run("tell(mine.found)")
    assert shown.run("[state.flags, state.weight]") == [0, 1]
    shown.run("document.querySelectorAll('#tour button')[3].click()")
    shown.wait("$('story').textContent.startsWith('The worst start of all')")
    pressed = "[...$('tour').querySelectorAll('button')].map((b) => b.getAttribute('aria-pressed'))"
    assert shown.run(pressed) == ["false", "false", "false", "true"]
    pull(shown, "weight", 0.5)
    assert shown.run(pressed) == ["false"] * 4


def test_the_page_opens_in_a_step_of_the_tour_and_marks_it(shown):
    step = "[...document.querySelectorAll('#tour [aria-pressed=true]')].map((b) => b.textContent)"
    assert shown.run(step) == ["2. Nobody watches"]
    shown.run("$('watch-ghost').click(); $('watch-diamond').click()")
    assert shown.run(step) == ["1. Both squares watched"]
    shown.run("$('greedy').click()")
    assert shown.run(step) == []


def test_your_policy_stands_once_among_the_sums(shown):
    rows = "[...$('world').rows].map((row) => [row.cells[0].textContent, row.className])"
    for weight, mine in ((None, 1), (1, 2), (0, 3)):
        if weight is not None:
            pull(shown, "weight", weight)
        shown.wait("!$('worst').disabled")
        named = shown.run(rows)
        assert len(named) == 4
        assert [i for i, (name, kind) in enumerate(named) if "yours" in name and kind] == [mine]
    pull(shown, "weight", 0.4)
    shown.wait("!$('worst').disabled")
    assert [name for name, _ in shown.run(rows)][1] == "your policy"
    assert len(shown.run(rows)) == 5
    naive = list(KINDS).index("naive")
    shown.run(f"$('run').value = {naive}; $('run').dispatchEvent(new Event('change'))")
    shown.wait("!$('worst').disabled && $('world').rows.length === 2")
    assert shown.run(rows)[1] == ["your policy", "yours"]


def test_the_pieces_have_the_colors_of_the_pictures(shown):
    shown.prefer(color_scheme="light")
    style = "getComputedStyle(document.documentElement).getPropertyValue"
    for name in ("diamond", "ghost", "flag", "agent"):
        assert shown.run(f"{style}('--{name}').trim()") == getattr(render, name.upper())
    shown.prefer()


def test_episodes_play_and_stop_with_and_without_motion(shown, page):
    for motion in ("no-preference", "reduce"):
        shown.prefer(reduced_motion=motion)
        shown.open(page)
        shown.run("$('play').click()")
        shown.wait("mine.tally.diamond + mine.tally.ghost + mine.tally.timeout > 0")
        assert shown.run("$('play').getAttribute('aria-pressed')") == "true"
        shown.run("$('play').click()")
        assert shown.run("mine.board.svg.classList.contains('running')") is False
    shown.prefer()


# ---- what it must be


@pytest.mark.parametrize("path", [None, DOCS])
def test_nothing_is_asked_of_a_network(shown, page, path):
    shown.open(path or page)
    shown.wait("sums")
    assert {url.split(":")[0] for url in shown.requests} <= {"file", "blob", "about"}
    assert sum(url.startswith("file:") for url in shown.requests) >= 1
    assert shown.run("fetch('data:,x').then(() => 'went', () => 'refused')") == "refused"
    assert any("Content Security Policy" in error for error in shown.errors)
    shown.errors.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 800, 1400])
def test_nothing_is_wider_than_the_screen(shown, page, width, scheme):
    shown.resize(width, 900)
    shown.prefer(color_scheme=scheme)
    for path in (page, DOCS):
        shown.open(path)
        shown.run("document.querySelector('#compare input:last-of-type').click()")
        assert shown.run("document.documentElement.scrollWidth - innerWidth") <= 0
    for n in range(len(OTHERS)):
        shown.open(page, f"#r={len(KINDS) + n}")
        assert shown.run("document.documentElement.scrollWidth - innerWidth") <= 0
    shown.resize(1400, 1000)
    shown.prefer()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("run", [0, *(len(KINDS) + n for n in range(len(OTHERS)))])
def test_everyone_can_use_it(shown, page, scheme, run):
    pytest.importorskip("axe_core_python", reason="axe-core is not installed")
    shown.prefer(color_scheme=scheme)
    for width in (390, 1400):
        shown.resize(width, 900)
        shown.open(page, f"#r={run}")
        shown.wait("current().views || current().film || sums")
        shown.run((files("axe_core_python") / "axe.min.js").read_text())
        found = shown.run(
            "axe.run().then(({ violations }) => violations.map(({ id, impact, nodes }) =>"
            " [id, impact, nodes.map(({ html, failureSummary }) => html + failureSummary)]))"
        )
        assert [one for one in found if one[1] in ("serious", "critical")] == []
    shown.resize(1400, 1000)
    shown.prefer()


def test_a_drag_is_answered_within_a_frame(shown):
    """On the page of docs/, whose networks have the default size; layout included."""
    shown.open(DOCS)
    shown.wait("sums")
    times = shown.run(
        "(() => { const times = []; let to = 0;"
        " for (let i = 0; i < 45; i++) {"
        "  const taken = [state.agent, state.diamond, state.ghost];"
        "  do to = (to + 7) % world.cells; while (taken.includes(to));"
        "  const piece = ['diamond', 'ghost', 'agent'][i % 3], begun = performance.now();"
        "  move(piece, to); document.body.getBoundingClientRect(); mine.board.svg.getBBox();"
        "  times.push(performance.now() - begun); }"
        " return times; })()"
    )
    assert statistics.median(times) <= 16


def test_a_name_that_is_a_script_does_nothing(shown, runs, tmp_path):
    hostile = tmp_path / HIT / "$(touch x)"
    hostile.parent.mkdir(parents=True)
    hostile.symlink_to(runs[0])
    out = tmp_path / "page.html"
    main(["play", str(hostile), "--out", str(out)])
    shown.open(out, "#" + HIT)
    shown.wait("sums")
    assert shown.run("typeof window.hit") == "undefined"
    assert shown.run("[...document.images].map(({ id }) => id)") == ["film"]
    assert f" evaluate '{hostile}' --steer" in shown.run("$('command').textContent")
