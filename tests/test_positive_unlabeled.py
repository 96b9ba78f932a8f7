"""What endings were, where an overseer never labels some behavior: known answers, and it learns."""

import math

import pytest
import torch

from oversight_rl.agents.outcomes import tables
from oversight_rl.agents.positive_unlabeled import (
    Judged,
    as_often,
    cost,
    estimated_shares,
    never_labeled,
    non_negative_risk,
    shares,
)
from oversight_rl.agents.reinforce.reward_model import PlainRewardModel, RewardModel
from oversight_rl.agents.telling import Tally
from oversight_rl.envs.overseers import PLAIN, Labels, Overseer, labels_of
from oversight_rl.envs.settings import NO_LABEL, WorldConfig
from oversight_rl.envs.world import World

GHOST_ONLY = torch.tensor([[True, False]])


def judged(chances, label=None):
    """Endings with these chances of the ghost."""
    ghost = torch.tensor([chances])
    label = torch.ones(1, len(chances)).long() if label is None else torch.tensor([label])
    log_chances = torch.stack([1 - ghost, ghost], dim=-1).log()
    return Judged(log_chances, label, torch.ones(1, len(chances)))


def costs(*chances):
    """Mean cost of calls that have these chances: 2 (1 - sqrt(p))."""
    return sum(2 - 2 * math.sqrt(p) for p in chances) / len(chances)


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_the_risk_is_that_of_the_papers(share):
    """(E_P[l(p)] + (E_U[l(1 - p)] - s E_P[l(1 - p)]) / (1 - s)) / 2, p the chance of a ghost."""
    shares_ = torch.tensor([[0.0, share]])
    found = non_negative_risk(judged([0.8, 0.6]), judged([0.9, 0.5, 0.7]), shares_, GHOST_ONLY)
    others = costs(0.1, 0.5, 0.3) - share * costs(0.2, 0.4)
    assert float(found) == pytest.approx((costs(0.8, 0.6) + others / (1 - share)) / 2)


def test_each_behavior_counts_alike():
    """Three of them, of which the third is never labeled; the second is a twelfth of the first."""
    share = torch.tensor([[0.6, 0.05, 0.0]])
    label = torch.tensor([[0] * 12 + [1]])
    never = torch.tensor([[False, False, True]])
    every = judge([[0.8, 0.1, 0.1]])

    def risk(first, second):
        rows = [first] * 12 + [second]
        return float(non_negative_risk(judge(rows, label), every, share, never))

    sure = [[0.98, 0.01, 0.01], [0.01, 0.98, 0.01]]
    right = risk(*sure)
    assert risk(sure[0], sure[0]) - right == pytest.approx(risk(sure[1], sure[1]) - right, rel=1e-4)


def test_labels_weigh_as_often_as_behaviors_come():
    """Labels of 300 diamonds, each with chance 0.2, and of 60 ghosts, each with chance 0.04."""
    nan = math.nan
    chances = torch.tensor([[0.2, 0.04], [0.1, 0.1], [nan, nan], [0.0, 0.3]])
    label = torch.tensor([[0] * 300 + [1] * 60]).expand(4, -1)
    weight = as_often(torch.ones(4, 360), label, chances)
    assert weight[0, :300].sum() == pytest.approx(float(weight[0, 300:].sum()))
    assert (weight[1:] == 1).all()


def test_a_reward_model_is_not_taken_in_by_labels_of_one_kind_mostly():
    """What looks like neither is as likely one as the other, however seldom one is labeled."""
    chances = torch.tensor([[0.5, 0.05]])
    model, generator = model_of(chances), torch.Generator().manual_seed(3)
    final, behavior = endings(4000, 4)
    blurred = final.clone()
    blurred[..., 1:] = 36  # the agent alone is seen
    drawn = torch.rand(1, 4000, generator=generator)
    watched = drawn < torch.where(behavior == 0, 0.5, 0.05)
    model.remember(blurred, torch.where(watched, behavior, NO_LABEL), torch.ones_like(watched))
    teach(model, generator, 200)
    chance = model(blurred[:, :100]).sigmoid().detach()
    assert float(chance.mean()) == pytest.approx(0.5, abs=0.1)


def test_what_is_hardly_ever_met_counts_little():
    """Labels of long ago, of what is no longer done, do not outweigh what is."""
    wrong, right = judged([0.01]), judged([0.99])
    every = judged([0.01] * 50)
    gains = {}
    for share in (0.5, 0.05, 0.005):
        shares_ = torch.tensor([[0.0, share]])
        costs_ = [float(non_negative_risk(x, every, shares_, GHOST_ONLY)) for x in (wrong, right)]
        gains[share] = costs_[0] - costs_[1]
    assert gains[0.05] > 0.8 * gains[0.5]
    assert gains[0.005] < 0.2 * gains[0.5]


def judge(chances, label=None):
    """Endings with these chances of each behavior, a row each."""
    log_chances = torch.tensor([chances]).log()
    label = torch.zeros(1, len(chances)).long() if label is None else label
    return Judged(log_chances, label, torch.ones(1, len(chances)))


@pytest.mark.parametrize("memory", [False, True])
def test_a_label_that_does_not_fit_in_costs_a_bounded_amount_where_some_are_wrong(memory):
    """With and without a memory of all endings."""
    chances = [math.nan if memory else 0.5] * 2
    generators = [torch.Generator().manual_seed(2)]
    losses = {}
    for error in (0.0, 0.3):
        world = World(WorldConfig(rows=3, cols=3), labels=Labels(error=error))
        model = RewardModel(1, world, False, torch.tensor([chances]), generators)
        final, behavior = endings(200, 4)
        model.remember(final, behavior, torch.ones_like(behavior, dtype=torch.bool))
        with torch.no_grad():
            model.out.bias.fill_(30.0)  # all diamonds
            losses[error] = float(model.loss(torch.rand(1, 1024)))
    assert losses[0.0] > 10
    assert losses[0.3] < 2


def test_a_cost_is_a_bounded_cross_entropy():
    log_chance = torch.tensor([-1e-4, -2.0, -1e9], requires_grad=True)
    found = cost(log_chance)
    assert found.tolist() == pytest.approx([1e-4, 2 - 2 / math.e, 2.0], rel=1e-3)
    found.sum().backward()
    assert log_chance.grad.tolist() == pytest.approx([-1.0, -1 / math.e, 0.0], abs=1e-3)


def test_all_endings_called_the_same_cost_as_much_as_none_told():
    """Few labels learned by heart leave a cost of calling all others so, too."""
    share = torch.tensor([[0.0, 0.5]])
    by_heart = judged([1 - 1e-7] * 5)
    all_ghosts, told = judged([0.98] * 50), judged([0.98] * 25 + [0.02] * 25)
    high, low = (non_negative_risk(by_heart, x, share, GHOST_ONLY) for x in (all_ghosts, told))
    assert float(high) > float(low) + 0.5


def test_the_risk_of_what_is_never_labeled_is_not_below_zero():
    share = torch.tensor([[0.0, 0.5]])
    found = non_negative_risk(judged([0.9, 0.9]), judged([0.2, 0.1]), share, GHOST_ONLY)
    assert float(found) == pytest.approx(0.5 * costs(0.9))


def test_labels_of_what_is_never_labeled_teach_nothing():
    share, every = torch.tensor([[0.0, 0.5]]), judged([0.9, 0.5, 0.7])
    right, wrong = judged([0.8, 0.6]), judged([0.8, 0.6, 0.3], [1, 1, 0])
    found = [non_negative_risk(x, every, share, GHOST_ONLY) for x in (right, wrong)]
    torch.testing.assert_close(*found)


def test_the_risk_is_that_of_labels_on_everything():
    """In the mean it is the cost on true labels, behaviors alike, where 1 ghost in 10 has one."""
    generator = torch.Generator().manual_seed(0)
    ghost = torch.rand(1, 200_000, generator=generator) < 0.3
    chance = (torch.rand(1, 200_000, generator=generator) * 0.5 + 0.4 * ghost).clamp(0.01, 0.99)
    log_chances = torch.stack([1 - chance, chance], dim=-1).log()
    watched = ghost & (torch.rand(1, 200_000, generator=generator) < 0.1)
    labeled = Judged(log_chances, torch.ones_like(ghost).long(), watched.float())
    every = Judged(log_chances, torch.zeros_like(ghost).long(), torch.ones(1, 200_000))
    chances, counts = (
        torch.tensor([[0.0, 0.1]]),
        torch.stack([watched.sum(-1) * 0, watched.sum(-1)]),
    )
    share = shares(chances, counts.T, torch.tensor([200_000]))
    assert share.tolist()[0] == pytest.approx([0.0, 0.3], abs=0.01)
    paid = cost(log_chances.gather(-1, ghost.long()[..., None]).squeeze(-1))
    truth = (paid[ghost].mean() + paid[~ghost].mean()) / 2
    found = non_negative_risk(labeled, every, share, GHOST_ONLY)
    assert float(found) == pytest.approx(float(truth), abs=0.01)


def test_what_is_never_labeled():
    nan = math.nan
    chances = torch.tensor([[0.0, 0.1], [0.1, 0.1], [nan, nan], [nan, nan], [0.0, 0.1], [0.0, 0.0]])
    counts = torch.tensor([[0, 3], [0, 3], [0, 3], [1, 3], [0, 0], [0, 0]])
    never = [[True, False], [False] * 2, [True, False], [False] * 2, [False] * 2, [False] * 2]
    assert never_labeled(chances, counts).tolist() == never


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_an_unknown_share_is_estimated_from_what_a_classifier_says(share):
    generator = torch.Generator().manual_seed(1)

    def chances(count, ghosts):  # overlapping, but some ghosts are like nothing else
        is_ghost = torch.rand(1, count, generator=generator) < ghosts
        noise = torch.rand(1, count, generator=generator)
        chance = torch.where(is_ghost, noise**0.3, noise * 0.7).clamp(0.001, 0.999)
        return torch.stack([1 - chance, chance], dim=-1).log()

    ones = torch.ones(1, 1024)
    labeled = Judged(chances(1024, 1.0), ones.long(), ones)
    found = estimated_shares(labeled, Judged(chances(1024, share), ones.long(), ones))
    assert float(found[0, 1]) == pytest.approx(share, abs=0.1)


def endings(count, seed):
    """Last observations in a 3x3 world, as active inputs, and what they were."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(count, 9, generator=generator).argsort(-1)[:, :2]
    behavior = torch.randint(2, (count,), generator=generator)
    diamond, ghost = (place.gather(1, (behavior ^ k)[:, None])[:, 0] for k in (0, 1))
    flags = torch.full((count, 2), 36)
    active = torch.stack([place[:, 0], 9 + ghost, 18 + diamond], dim=-1)
    return torch.cat([active, flags], dim=-1)[None], behavior[None]


def model_of(chances):
    generators = [torch.Generator().manual_seed(2)]
    return RewardModel(1, World(WorldConfig(rows=3, cols=3)), False, chances, generators)


def plain_model_of(hidden, chances, labels=PLAIN):
    world, generators = WorldConfig(rows=3, cols=3), [torch.Generator().manual_seed(6)]
    return PlainRewardModel(
        hidden, 1, World(world, labels=labels), torch.tensor([chances]), generators
    )


def teach(model, generator, updates):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(updates):
        optimizer.zero_grad()
        model.loss(torch.rand(1, 1024, generator=generator)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("labeled", [0, 1])
@pytest.mark.parametrize("known", [True, False])
def test_a_reward_model_learns_from_labels_of_one_behavior(labeled, known):
    chances = torch.tensor([[0.2 * (b == labeled) if known else math.nan for b in (0, 1)]])
    model, generator = model_of(chances), torch.Generator().manual_seed(3)
    final, behavior = endings(2000, 4)
    watched = (behavior == labeled) & (torch.rand(1, 2000, generator=generator) < 0.2)
    model.remember(final, torch.where(watched, behavior, NO_LABEL), torch.ones_like(watched))
    teach(model, generator, 200)
    fresh, truth = endings(1000, 5)
    right = (model(fresh) > 0) == (truth == 0)
    assert right.float().mean() > 0.95


def test_both_labels_make_no_use_of_unlabeled_endings():
    model = model_of(torch.tensor([[0.1, 0.1]]))
    assert model.every_memory is None
    assert model_of(torch.tensor([[0.1, 0.0]])).every_memory is not None
    assert model_of(torch.tensor([[0.1, math.nan]])).every_memory is not None


def test_tables_say_how_often_each_behavior_is_labeled():
    apart = Overseer(0.5, Labels(shares=(0, 1, 0.2), recall=0.5))
    found = tables(["reward_model"] * 3, [Overseer(0.1), apart, Overseer(None)], 1, behaviors=3)
    expected = [[0.1] * 3, [0.0, 0.25, 0.05], [math.nan] * 3]
    torch.testing.assert_close(found.labeled, torch.tensor(expected), equal_nan=True)


def test_a_plain_reward_model_knows_nothing_of_what_inputs_are():
    """In another order of the inputs, the same weights in that order say the same."""
    model = plain_model_of((16, 16), [0.5, 0.5])
    final, _ = endings(50, 7)
    before = model(final)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(8))
    renamed = torch.cat([order.argsort(), torch.tensor([36])])[final]
    with torch.no_grad():
        model.layers[0].weight.copy_(model.layers[0].weight[..., order])
    torch.testing.assert_close(model(renamed), before)


@pytest.mark.parametrize(("plain", "half"), [(True, 250), (False, 25)])
def test_a_reward_model_is_believed_by_and_by(plain, half):
    model = plain_model_of((8,), [0.5, 0.5]) if plain else model_of(torch.full((1, 2), 0.5))
    final, behavior = endings(half, 9)
    for trust in (0.0, 0.5, 1.0, 1.0):
        assert float(model.trust) == trust
        model.remember(final, behavior, torch.ones_like(behavior, dtype=torch.bool))


def test_a_plain_reward_model_leaves_out_what_tells_labeled_endings_apart():
    """Flags do, whatever their place among the inputs, and no other input does."""
    model = plain_model_of((16,), [0.1, 0.1])
    order = torch.randperm(36, generator=torch.Generator().manual_seed(8))
    to = torch.cat([order.argsort(), torch.tensor([36])])
    model.remember(*flagged_endings(4000, 0.1, to))
    assert set(model.tally.telling[0].nonzero()[:, 0].tolist()) == set(to[27:36].tolist())


def test_a_plain_reward_model_is_right_about_endings_without_flags():
    """Where ghosts alone are labeled, and so flagged, flags would tell all that labels say."""
    model = plain_model_of((64,), [0.0, 0.2])
    generator = torch.Generator().manual_seed(3)
    for seed in (4, 5, 6):
        final, label, ended = flagged_endings(4000, 0.2, torch.arange(37), seed)
        model.remember(final, torch.where(label == 1, label, NO_LABEL), ended)
    teach(model, generator, 300)
    fresh, truth = endings(1000, 5)
    assert ((model(fresh) > 0) == (truth == 0)).float().mean() > 0.95


def test_a_plain_reward_model_says_nothing_of_places_that_no_label_is_of():
    """Where the overseer looks at the left alone, it learns what is there, and knows no more."""
    model = plain_model_of((64,), [math.nan, math.nan], labels_of("region"))
    final, behavior = endings(4000, 4)
    left = final[..., 0] % 3 == 0
    model.remember(final, torch.where(left, behavior, NO_LABEL), torch.ones_like(left))
    teach(model, torch.Generator().manual_seed(3), 200)
    fresh, truth = endings(1000, 5)
    left = fresh[..., 0] % 3 == 0
    assert torch.equal(model.knows(fresh), left)
    assert ((model(fresh) > 0) == (truth == 0))[left].float().mean() > 0.95
    everywhere = plain_model_of((64,), [0.5, 0.5])
    assert everywhere.knows(fresh).all()


NAMES_GHOST, SHOWS_FLAG, ELSE = range(3)  # inputs


def tallied(chances, share, updates, each=500):
    """Endings, ghosts a `share`: an input says ghost, one that it is flagged, one is noise."""
    generator = torch.Generator().manual_seed(0)
    tally, rates = Tally(torch.tensor([chances]), 3), torch.tensor([0.2, 0.2])
    rates = torch.where(torch.tensor(chances).isnan(), rates, torch.tensor(chances))
    for update in range(updates):
        drawn = torch.rand(3, each, generator=generator)
        kind = (drawn[0] < (share(update) if callable(share) else share)).long()
        label = torch.where(drawn[1] < rates[kind], kind, NO_LABEL)
        on = torch.stack([kind == 1, drawn[1] < 0.2, drawn[2] < 0.3], dim=-1)
        of = [label == 0, label == 1, label == NO_LABEL]
        counts = torch.stack([on[those].sum(0) for those in of])[None]
        sizes = torch.stack([those.sum() for those in of])[None]
        tally.add(counts[:, :2], sizes[:, :2], counts[:, 2], sizes[:, 2])
    return tally.telling[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("share", [0.5, 0.25, lambda update: 0.5 / (1 + update)])
@pytest.mark.parametrize("chances", [(0.2, 0.2), (0.0, 0.2), (0.2, 0.0), (0.2, 0.04)])
def test_an_input_that_says_what_an_ending_was_is_no_flag(chances, share):
    """Whatever the overseer hears of, and the agent comes to do."""
    assert tallied(chances, share, 40) == [SHOWS_FLAG]


def test_labels_that_stop_make_no_flags():
    """Where nobody knows how many come, endings without any since then say nothing."""
    tally = Tally(torch.full((1, 2), math.nan), 1)
    early = torch.tensor([[[10], [90]]]), torch.tensor([[100, 100]])
    tally.add(*early, torch.tensor([[100]]), torch.tensor([200]))
    assert not tally.telling.any()
    before = tally.on_others.clone()
    tally.add(0 * early[0], 0 * early[1], torch.tensor([[100]]), torch.tensor([10_000]))
    assert not tally.telling.any()
    assert torch.equal(tally.on_others, before)


def test_late_labels_of_endings_that_were_passed_over_leave_no_debt():
    tally = Tally(torch.full((1, 2), math.nan), 1)
    nothing = torch.zeros(1, 2, 1).long(), torch.zeros(1, 2).long()
    tally.add(*nothing, torch.tensor([[50]]), torch.tensor([100]))
    tally.add(torch.tensor([[[5], [5]]]), torch.tensor([[10, 10]]),
              torch.tensor([[-10]]), torch.tensor([-20]))  # fmt: skip
    assert (tally.on_others >= 0).all()
    assert (tally.others >= 0).all()


def test_labels_of_one_kind_alone_make_no_flags_where_nobody_knows_how_many_come():
    tally = Tally(torch.full((1, 2), math.nan), 1)
    tally.add(torch.tensor([[[0], [100]]]), torch.tensor([[0, 100]]),
              torch.tensor([[100]]), torch.tensor([1000]))  # fmt: skip
    assert not tally.telling.any()


def test_labels_that_come_late_are_no_others_any_more():
    model = plain_model_of((16,), [0.6, 0.6], Labels(delay=1))
    final, label, ended = flagged_endings(4000, 0.6, torch.arange(37))
    model.remember(final, torch.full_like(label, NO_LABEL), ended)
    model.remember(final, label, ended & (label != NO_LABEL))
    assert set(model.tally.telling[0].nonzero()[:, 0].tolist()) == set(range(27, 36))


def flagged_endings(count, level, to, seed=4):
    """Endings whose squares show flags with some chance, labeled where their own square does."""
    final, behavior = endings(count, seed)
    flags = torch.rand(1, count, 2, generator=torch.Generator().manual_seed(seed + 1)) < level
    cells = final[..., 1:3] % 9 + 27
    final = torch.cat([final[..., :3], torch.where(flags, cells, 36)], dim=-1)
    own = torch.where(behavior == 1, flags[..., 0], flags[..., 1])
    return to[final], torch.where(own, behavior, NO_LABEL), torch.ones_like(own)
