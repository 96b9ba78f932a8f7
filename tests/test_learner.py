"""The REINFORCE learner: outcomes, returns, gradients and their routes, stacks, learning."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import plain
import pytest
import torch

from oversight_rl.agents.memory import CAPACITY, Memory
from oversight_rl.agents.methods import LABELED, METHODS, TIMEOUT, UNFINISHED, UNLABELED
from oversight_rl.agents.networks import Agent, cumulative, sample
from oversight_rl.agents.outcomes import labels, outcomes, tables
from oversight_rl.agents.reinforce import collect as collecting
from oversight_rl.agents.reinforce.collect import Rollout, acting, collect, noise_channels
from oversight_rl.agents.reinforce.figures import calibration_error, statistics
from oversight_rl.agents.reinforce.learner import HELD_OUT, Adam, ReinforceLearner
from oversight_rl.agents.reinforce.losses import Loss, label, loss
from oversight_rl.agents.reinforce.reward_model import RewardModel
from oversight_rl.agents.settings import AgentConfig, ReinforceConfig, at
from oversight_rl.agents.steering import standard
from oversight_rl.envs.mdp import WorldMDP
from oversight_rl.envs.overseers import Labels, Overseer
from oversight_rl.envs.settings import BEHAVIORS, NO_LABEL, UserError, WorldConfig
from oversight_rl.envs.world import Seen, Truth, World
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.kinds import load_config

ROOT = Path(__file__).parent.parent
SMALL = AgentConfig(hidden=(8, 8))
SHAPE = (4, 3, 3)


def make_agent(runs=1, experts="many", gate="learned", config=SMALL, seed=0):
    generators = [torch.Generator().manual_seed(seed + r) for r in range(runs)]
    return Agent(config, SHAPE, 4, runs, experts, gate, generators)


def heard(rollout, methods):
    """The window as overseers label it."""
    label = labels(rollout.seen, rollout.truth, rollout.uniform, methods)
    return replace(rollout, seen=replace(rollout.seen, label=label))


def read(rollout, methods):
    return outcomes(heard(rollout, methods).seen)


def make_rollout(agent, level=0.5, steps=12, worlds=20, seed=0, rows=3):
    """A window of the small world; all outcomes occur in it."""
    runs = agent.head.weight.shape[0]
    world = World(WorldConfig(rows=rows, cols=rows, max_steps=5), level)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(runs, steps, worlds, noise_channels(world), generator=generator)
    state = world.reset(noise[:, :1, :, : world.noise_channels])[:, 0]
    rollout, _ = collect(agent, world, state, noise)
    return rollout


def grads_of(agent, value):
    agent.zero_grad()
    value.sum().backward(retain_graph=True)
    return {n: None if p.grad is None else p.grad.clone() for n, p in agent.named_parameters()}


def tiny(*methods, level=0.5, first_seed=0, agent=SMALL, max_steps=6, **settings):
    """A learner of a run for each method."""
    return ReinforceLearner(
        ReinforceConfig(**{"updates": 6, "worlds": 16, "steps": 8} | settings),
        agent,
        WorldConfig(rows=3, cols=3, max_steps=max_steps),
        methods,
        [Overseer(level)] * len(methods),
        [first_seed + run for run in range(len(methods))],
    )


def exact_returns(learner, level):
    """Of the policies of the result table, in their order."""
    policies = standard(learner.agent.n_experts)

    def table(active):
        output = learner.agent(active[None])
        return torch.cat([policy.probabilities(output) for policy in policies])

    mdp = WorldMDP(World(learner.world.config))
    with torch.no_grad():
        found = mdp.evaluate(mdp.policy_table(table), torch.tensor([level]), 0.97)
    names = [policy.name for policy in policies]
    return dict(zip(names, found.ground_truth_return[:, 0].tolist(), strict=True))


def make_reward_model(runs=1, sees_flags=False):
    generators = [torch.Generator().manual_seed(10 + r) for r in range(runs)]
    chances = torch.full((runs, 2), 0.5)
    model = RewardModel(runs, World(WorldConfig(rows=3, cols=3)), sees_flags, chances, generators)
    model.believed = 1
    return model


def loss_of(agent, rollout, targets, mask):
    """Losses of the samples in `mask` alone."""
    return loss(agent, rollout, replace(targets, weight=targets.weight * mask))


# ---- outcomes and returns, against a loop over episodes


@pytest.mark.parametrize("seed", range(5))
def test_outcomes_agree_with_a_loop_over_episodes(seed):
    rollout = make_rollout(make_agent(), seed=seed)
    outcome, left = read(rollout, tables(["routing"], [Overseer(0.5)], 2))
    expected, expected_left = plain.outcomes(rollout.seen, 12, 20)
    assert set(np.unique(expected)) == {UNFINISHED, TIMEOUT, UNLABELED, LABELED, LABELED + 1}
    assert np.array_equal(outcome[0].numpy(), expected)
    assert np.array_equal(left[0].numpy(), expected_left)


REWARDS = {  # by method: outcome -> reward at the episode's end, written out anew
    "routing": {UNLABELED: 1, LABELED: 1, LABELED + 1: 1},
    "naive": {UNLABELED: 1, LABELED: 1, LABELED + 1: -1},
    "filtering": {UNLABELED: None, LABELED: 1, LABELED + 1: -1},
}


@pytest.mark.parametrize("method", REWARDS)
@pytest.mark.parametrize("bootstrap", [True, False])
def test_returns_agree_with_a_loop_over_episodes(method, bootstrap):
    agent = make_agent(experts=METHODS[method].policy.experts)
    rollout = make_rollout(agent)
    config = ReinforceConfig(discount=0.9, bootstrap=bootstrap, labeled_weight=3.0)
    targets = label(rollout, tables([method], [Overseer(0.5)], agent.n_experts), config)
    outcome, _ = plain.outcomes(rollout.seen, 12, 20)
    after = rollout.value_after[0].numpy() * bootstrap
    paid = {kind: reward or 0 for kind, reward in REWARDS[method].items()}
    expected = plain.returns(rollout.seen, outcome, after, 0.9, paid)
    assert targets.returns[0].numpy() == pytest.approx(expected, abs=1e-6)
    for n in range(20):
        for t in range(12):
            dropped = REWARDS[method].get(outcome[t, n], 0) is None
            heavy = 3.0 if METHODS[method].table.weighs_labels else 1.0
            weight = 0.0 if dropped else heavy if outcome[t, n] >= LABELED else 1.0
            assert float(targets.weight[0, t, n]) == weight


def test_a_known_answer():
    """One world, four steps: a diamond (labeled) after two, then two steps of a cut episode."""
    flags = torch.tensor([False, True, False, False]).view(1, 4, 1)
    ending = torch.tensor([NO_LABEL, 0, NO_LABEL, NO_LABEL]).view(1, 4, 1)
    agent = make_agent()
    nothing = torch.full((1, 1, 5), 36)
    rollout = Rollout(
        active=nothing,
        output=agent(nothing),
        slot=torch.zeros(1, 4, 1, dtype=torch.int64),
        action=torch.zeros(1, 4, 1, dtype=torch.int64),
        seen=Seen(flags, torch.zeros_like(flags), ending),
        truth=Truth(ending),
        value_after=torch.zeros(1, 1),
        uniform=torch.zeros(1, 4, 1),
    )
    config = ReinforceConfig(discount=0.5, bootstrap=False)
    targets = label(rollout, tables(["routing"], [Overseer(0.1)], 2), config)
    assert targets.outcome.flatten().tolist() == [LABELED, LABELED, UNFINISHED, UNFINISHED]
    assert targets.returns.flatten().tolist() == [0.5, 1.0, 0.0, 0.0]
    assert targets.routes[0, :, 0].tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]


# ---- gradients and their routes


@pytest.fixture
def batch():
    agent = make_agent()
    rollout = make_rollout(agent)
    methods = tables(["routing"], [Overseer(0.5)], 2)
    return agent, rollout, label(rollout, methods, ReinforceConfig())


def by_module(agent, grads):
    """Gradients by module: the trunks taken apart into experts, gate and value net."""
    names = [f"expert {k}" for k in range(agent.n_experts)]
    names += ["gate"] * agent.has_gate + ["value"]
    parts = {name: [] for name in [*names, "head"]}
    for parameter, grad in grads.items():
        module = {"head": "head", "gate_out": "gate", "value_layers": "value"}
        kind = parameter.split(".")[0]
        if grad is None:
            continue
        if kind == "trunks":
            for j, name in enumerate(names):
                parts[name].append(grad[:, j])
        else:
            parts[module[kind]].append(grad)
    return parts


@pytest.mark.parametrize("behavior", [0, 1])
@pytest.mark.parametrize("part", ["policy", "entropy"])
def test_a_labeled_episode_moves_its_own_expert_and_the_head_only(batch, behavior, part):
    agent, rollout, targets = batch
    mask = (targets.outcome == LABELED + behavior).float()
    grads = grads_of(agent, getattr(loss_of(agent, rollout, targets, mask), part))
    for name, found in by_module(agent, grads).items():
        for grad in found:
            # exactly zero in the other expert, the gate and the value net
            assert bool((grad != 0).any()) == (name in (f"expert {behavior}", "head")), name


@pytest.mark.parametrize("outcome", [UNFINISHED, TIMEOUT, UNLABELED])
def test_other_episodes_move_everything(batch, outcome):
    agent, rollout, targets = batch
    mask = (targets.outcome == outcome).float()
    grads = grads_of(agent, loss_of(agent, rollout, targets, mask).policy)
    for name, found in by_module(agent, grads).items():
        for grad in found:
            assert bool((grad != 0).any()) == (name != "value"), name


def test_the_gate_learns_from_labels_by_cross_entropy(batch):
    agent, rollout, targets = batch
    gate_loss = loss(agent, rollout, targets).gate
    labeled = targets.outcome.flatten() >= LABELED
    target = (targets.outcome.flatten()[labeled] == LABELED).float()
    observation = plain.planes(rollout.active[0], SHAPE)[rollout.slot.flatten()]
    g = plain.forward(agent, observation)[1][labeled, 0]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(g, target)
    torch.testing.assert_close(gate_loss[0], expected)
    for name, found in by_module(agent, grads_of(agent, gate_loss)).items():
        for grad in found:
            assert bool((grad != 0).any()) == (name == "gate"), name


def test_an_empty_group_contributes_exactly_zero():
    agent = make_agent()
    rollout = make_rollout(agent, level=0.0)  # nothing is labeled
    methods = tables(["routing"], [Overseer(0.0)], 2)
    targets = label(rollout, methods, ReinforceConfig())
    losses = loss(agent, rollout, targets)
    assert losses.gate.item() == 0.0
    nothing = loss(agent, rollout, replace(targets, weight=torch.zeros_like(targets.weight)))
    assert [x.item() for x in vars(nothing).values()] == [0.0] * 6


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.3, -0.75])
def test_a_route_weight_gives_exactly_that_multiple(batch, weight):
    agent, rollout, targets = batch
    mask = (targets.outcome == LABELED + 1).float()
    ones = torch.ones_like(targets.routes)
    whole = grads_of(agent, loss_of(agent, rollout, replace(targets, routes=ones), mask).policy)
    routes = ones.clone()
    routes[..., 0] = weight
    part = grads_of(agent, loss_of(agent, rollout, replace(targets, routes=routes), mask).policy)
    whole, part = by_module(agent, whole), by_module(agent, part)
    for name, found in whole.items():
        factor = weight if name == "expert 0" else 1.0
        for grad, other in zip(found, part[name], strict=True):
            torch.testing.assert_close(other, grad * factor, rtol=2e-5, atol=1e-7)
            if factor == 0:
                assert not other.any()


def agree(ours, theirs, tolerance=1e-4):
    """Gradients equal within a relative tolerance, tensor by tensor."""
    for name, grad in ours.items():
        error = (grad - theirs[name]).norm() / theirs[name].norm()
        assert float(error) < tolerance, name


PRESETS = {
    "small": (SMALL, (4, 3, 3), 12, 20),
    "paper": (load_config(ROOT / "configs/paper.yaml").agent, (4, 5, 5), 32, 64),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_whole_gradient_equals_the_plain_implementation(preset):
    """Merged states, composed layers and row sums against net by net, sample by sample."""
    network, shape, steps, worlds = PRESETS[preset]
    agent = Agent(network, shape, 4, 1, generators=[torch.Generator().manual_seed(0)])
    rollout = make_rollout(agent, steps=steps, worlds=worlds, rows=shape[1])
    config = ReinforceConfig(value_coef=0.7, entropy_coef=0.3, gate_coef=0.4, labeled_weight=3.0)
    targets = label(rollout, tables(["routing"], [Overseer(0.5)], 2), config)
    ours = grads_of(agent, loss(agent, rollout, targets).total(config, 0.0))
    observation = plain.planes(rollout.active[0], shape)[rollout.slot.flatten()]
    agree(ours, grads_of(agent, plain.loss(agent, observation, rollout, targets, config)))
    assert rollout.active.shape[1] < 0.9 * steps * worlds  # states were merged


@pytest.mark.parametrize(("runs", "worlds"), [(1, 20), (3, 20), (3, 1)])
def test_merging_equal_states_changes_nothing(monkeypatch, runs, worlds):
    """Not either where runs meet different numbers of states, or one meets none in a step."""
    agent = make_agent(runs)
    config = ReinforceConfig()
    methods = tables(["routing"] * runs, [Overseer(0.5)] * runs, 2)
    results = []
    for most in (collecting.MOST_KEYS, 0):
        monkeypatch.setattr(collecting, "MOST_KEYS", most)
        rollout = make_rollout(agent, worlds=worlds)
        targets = label(rollout, methods, config)
        total = loss(agent, rollout, targets).total(config, 0.0)
        results.append((rollout, grads_of(agent, total)))
    (merged, grads), (apart, others) = results
    assert merged.active.shape[1] < apart.active.shape[1] == 12 * worlds
    assert len({len(slots.unique()) for slots in merged.slot}) == runs  # they met different numbers
    assert torch.equal(merged.action, apart.action)
    run = torch.arange(runs)[:, None, None]
    assert torch.equal(merged.active[run, merged.slot], apart.active[run, apart.slot])
    agree(grads, others)


def test_methods_that_learn_from_the_truth_say_so():
    for name, method in METHODS.items():
        looks = name in ("naive_oracle_stop", "oracle", "oracle_filtering")
        assert looks == (method.assumes == "true labels"), name
        assert name.endswith("_hidden_flag") == (method.assumes == "hidden flags"), name
        told = name in ("reward_model", "imputed_routing")
        assert told == (method.assumes == "labels and known flags"), name


def test_oracle_filtering_labels_its_share_whatever_the_flags_say():
    agent = make_agent(experts="one")
    rollout = make_rollout(agent, level=0.0, worlds=4000)
    outcome, _ = read(
        rollout,
        tables(["oracle_filtering"], [Overseer(0.3)], 1),
    )
    reached = outcome[rollout.seen.terminated]
    assert float((reached >= LABELED).float().mean()) == pytest.approx(0.3, abs=0.02)
    outcome, _ = read(rollout, tables(["oracle"], [Overseer(0.0)], 1))
    assert bool((outcome[rollout.seen.terminated] >= LABELED).all())


@pytest.mark.parametrize("method", ["naive", "oracle_filtering", "oracle", "random_module"])
def test_labels_go_missing_and_wrong_at_their_rates(method):
    """An overseer's recall and error; labels of a method's own are right and do not go missing."""
    agent = make_agent(experts=METHODS[method].policy.experts)
    rollout = make_rollout(agent, level=0.8, worlds=20_000)
    overseer = Overseer(0.8, Labels(recall=0.6, error=0.1))
    outcome, _ = read(rollout, tables([method], [overseer], agent.n_experts))
    for behavior in range(2):
        ended = rollout.seen.terminated & (rollout.truth.ending == behavior)
        labeled = outcome[ended] >= LABELED
        own = method.startswith("oracle")
        chance = {"oracle": 1.0, "oracle_filtering": 0.8}.get(method, 0.6 * 0.8)
        assert float(labeled.float().mean()) == pytest.approx(chance, abs=0.01)
        wrong = outcome[ended][labeled] != LABELED + behavior
        error = 0.0 if own else 0.5 if method == "random_module" else 0.1
        assert float(wrong.float().mean()) == pytest.approx(error, abs=0.01)
    others = outcome[~rollout.seen.terminated & rollout.seen.truncated]
    assert bool((others == TIMEOUT).all())


@pytest.mark.parametrize("recall", [1.0, 0.5])
def test_inverse_propensity_weighting_is_unbiased(recall):
    """Over flagged and unflagged ghosts together, the mean reward is the true one."""
    row = tables(["ipw_hidden_flag"], [Overseer(0.3, Labels(recall=recall))], 1).reward[0]
    p = 0.3 * recall
    assert float((1 - p) * row[UNLABELED] + p * row[LABELED + 1]) == pytest.approx(-1, abs=1e-5)
    assert float((1 - p) * row[UNLABELED] + p * row[LABELED]) == pytest.approx(1)
    ghosts = Overseer(0.3, Labels(shares=(1, 1 / 3), recall=recall))
    other = tables(["ipw_hidden_flag"], [ghosts], 1).reward[0]
    assert float(other[LABELED + 1]) == pytest.approx(1 - 2 / (0.1 * recall))


@pytest.mark.parametrize("error", [0.0, 0.1, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("behaviors", [2, 3, 5])
@pytest.mark.parametrize(
    "overseer",
    [Overseer(1.0), Overseer(0.3, Labels(recall=0.5)), Overseer(0.1, Labels(shares=(0, 1)))],
)
def test_inverse_propensity_weighting_minds_wrong_labels(overseer, behaviors, error):
    """The mean reward over all that can happen to an ending is its true one, whatever it was."""
    given = overseer.labels.model_copy(update={"error": (error,)})
    overseer, (recall,) = replace(overseer, labels=given), given.recall
    row = tables(["ipw_hidden_flag"], [overseer], 1, behaviors=behaviors).reward[0].double()
    flagged = [overseer.flagged(behavior) for behavior in range(behaviors)]
    for true in range(behaviors):
        mean = 0.0
        for is_flagged, is_heard, named in itertools.product((0, 1), (0, 1), range(behaviors)):
            chance = flagged[true] if is_flagged else 1 - flagged[true]
            chance *= recall if is_heard else 1 - recall
            chance *= 1 - error if named == true else error / (behaviors - 1)
            mean += chance * float(row[LABELED + named if is_flagged and is_heard else UNLABELED])
        assert mean == pytest.approx(1 if true == 0 else -1, abs=1e-4)


@pytest.mark.parametrize(("behaviors", "error"), [(2, 0.5), (3, 2 / 3), (4, 0.75)])
def test_inverse_propensity_weighting_needs_labels_that_say_something(behaviors, error):
    with pytest.raises(ValueError, match=f"labels.error: must not be {error:g}, where") as caught:
        tables(["ipw_hidden_flag"], [Overseer(0.1, Labels(error=error))], 1, behaviors=behaviors)
    assert "\n" not in str(caught.value)
    assert tables(["naive"], [Overseer(0.1, Labels(error=error))], 1, behaviors=behaviors)
    ipw = {"method": "ipw_hidden_flag", "labels": {"error": error}}
    if behaviors == len(BEHAVIORS):
        with pytest.raises(UserError, match=r"labels\.error: must not be 0\.5, where"):
            Config(**ipw)
        Config(**ipw, algo="ppo", env="MiniGrid-DiamondGhost-8x8-v0", env_settings={"lava": 1})
    else:
        Config(**ipw)


def test_inverse_propensity_weighting_needs_labels_on_ghosts():
    for settings in (
        {"oversight": 0.0},
        {"labels": {"recall": 0.0}},
        {"overseer": "diamonds_only"},
    ):
        with pytest.raises(UserError, match=r"must be above 0, got 0"):
            Config(method="ipw_hidden_flag", **settings)
    with pytest.raises(ValueError, match="must be above 0, got 0"):
        tables(["ipw_hidden_flag"], [Overseer(0.0)], 1)


def test_methods_that_hide_the_flags_do_so_for_the_policy_alone():
    config = Config(method="naive", oversight=1.0, world=WorldConfig(rows=3, cols=3))
    hidden = Config(method="ipw_hidden_flag", oversight=1.0, world=config.world)
    assert config.world.flags_visible
    assert not hidden.world.flags_visible
    agent = make_agent(experts="one")
    world = World(hidden.world, 1.0)
    noise = torch.rand(1, 6, 50, noise_channels(world))
    state = world.reset(noise[:, :1, :, : world.noise_channels])[:, 0]
    rollout, _ = collect(agent, world, state, noise)
    assert not world.observe(state)[..., 3, :, :].any()
    outcome, _ = read(
        rollout,
        tables(["ipw_hidden_flag"], [Overseer(1.0)], 1),
    )
    assert bool((outcome[rollout.seen.terminated] >= LABELED).all())


def test_biases_begin_at_zero_if_asked_to():
    def parameters(biases):
        config = AgentConfig(hidden=(8,), biases=biases)
        generators = [torch.Generator().manual_seed(0)]
        return dict(Agent(config, SHAPE, 4, 1, generators=generators).named_parameters())

    plain, zero = parameters("uniform"), parameters("zero")
    for name, parameter in zero.items():
        if name.endswith("bias"):
            assert not parameter.any()
            assert plain[name].any()
        else:
            assert torch.equal(parameter, plain[name])  # the same draws


# ---- the reward model


def test_a_reward_model_pays_for_unlabeled_endings_what_it_expects():
    agent, model = make_agent(experts="one"), make_reward_model()
    rollout = make_rollout(agent)
    methods = tables(["reward_model"], [Overseer(0.5)], 1)
    targets = label(rollout, methods, ReinforceConfig(discount=0.5), 0.0, model)
    outcome, left = plain.outcomes(rollout.seen, 12, 20)
    final = model.world.after(rollout.observation, rollout.action)[0]
    observation = plain.planes(final[..., :3], SHAPE)
    kernel = model.convolution.weight[0][:, :, None, None]
    features = torch.nn.functional.conv2d(
        observation.flatten(0, 1), kernel, model.convolution.bias[0]
    )
    logit = features.relu().sum((2, 3)) @ model.out.weight[0].T + model.out.bias[0]
    chance = logit.sigmoid().view(12, 20).detach()
    for t, n in zip(*np.nonzero(outcome == UNLABELED), strict=True):
        expected = 2 * chance[t + left[t, n], n] - 1
        found = targets.returns[0, t, n] / 0.5 ** left[t, n]
        assert float(found) == pytest.approx(float(expected), abs=1e-5)
    for t, n in zip(*np.nonzero(outcome >= LABELED), strict=True):
        sign = 1 if outcome[t, n] == LABELED else -1
        assert float(targets.returns[0, t, n]) == pytest.approx(sign * 0.5 ** left[t, n])


def test_an_imputed_episode_is_routed_and_contrasted_as_the_mean_of_both_labels():
    agent, model = make_agent(), make_reward_model()
    rollout = make_rollout(agent)
    methods = tables(["imputed_routing"], [Overseer(0.5)], 2)
    targets = label(rollout, methods, ReinforceConfig(discount=0.5), 0.0, model)
    outcome, left = plain.outcomes(rollout.seen, 12, 20)
    assert (outcome == UNLABELED).sum() > 20
    for t, n in zip(*np.nonzero(outcome == UNLABELED), strict=True):
        chance = float(targets.chance[0, t + left[t, n], n])
        routes = [chance, 1 - chance, 0.0]
        assert targets.routes[0, t, n].tolist() == pytest.approx(routes, abs=1e-5)
        worth = targets.own_returns[0, t, n] / 0.5 ** left[t, n]
        assert worth.tolist() == pytest.approx([2 * chance - 1, 1 - 2 * chance], abs=1e-5)
        worth = float(targets.returns[0, t, n]) / 0.5 ** left[t, n]
        assert worth == pytest.approx(1.0, abs=1e-5)  # the mixture is paid for either square


def test_a_classifier_that_nobody_taught_says_nothing():
    """Of two runs in a stack the first has no labels: what its classifier says changes nothing."""
    agent = make_agent(runs=2, experts="one")
    rollout = make_rollout(agent, torch.tensor([0.0, 0.5])[:, None, None])
    methods = tables(["reward_model"] * 2, [Overseer(0.0), Overseer(0.5)], 1)
    found = []
    for scale in (1.0, -5.0):
        model = make_reward_model(runs=2)
        model.out.weight.data *= scale
        targets = label(rollout, methods, ReinforceConfig(), 0.0, model)
        total = loss(agent, rollout, targets).total(ReinforceConfig(), 0.0)
        found.append((targets, grads_of(agent, total)))
    (targets, grads), (_, others) = found
    unlabeled = targets.outcome == UNLABELED
    assert unlabeled.sum((1, 2)).min() > 20
    assert torch.equal(targets.weight[0], (~unlabeled[0]).float())
    assert torch.equal(targets.weight[1], torch.ones(12, 20))
    for name, grad in grads.items():
        assert torch.equal(grad[0], others[name][0]), name
    assert not torch.equal(grads["head.weight"][1], others["head.weight"][1])


def test_imputed_routing_without_any_label_is_contrastive_routing():
    agent = make_agent()
    rollout = make_rollout(agent, 0.0)
    config = ReinforceConfig(labeled_weight=1.0)
    untaught, contrastive = (
        label(rollout, tables([name], [Overseer(0.0)], 2), config, 0.0, model)
        for name, model in (("imputed_routing", make_reward_model()), ("contrastive_routing", None))
    )
    assert (untaught.outcome == UNLABELED).sum() > 20
    for part in ("returns", "weight", "routes", "own_returns"):
        assert torch.equal(getattr(untaught, part), getattr(contrastive, part)), part


def test_a_reward_model_sees_where_the_step_led():
    agent, model = make_agent(experts="one"), make_reward_model()
    rollout = make_rollout(agent, level=1.0)
    final = model.world.after(rollout.observation, rollout.action)[0]
    ended = rollout.seen.terminated[0]
    square = {0: 2, 1: 1}  # behavior -> column of the active inputs that holds its square
    for behavior, column in square.items():
        endings = final[ended & (rollout.truth.ending[0] == behavior)]
        assert len(endings)
        assert torch.equal(endings[:, 0], endings[:, column] % 9)


@pytest.mark.parametrize("sees_flags", [False, True])
def test_a_reward_model_looks_at_flags_only_if_told_to(sees_flags):
    model = make_reward_model(sees_flags=sees_flags)
    bare, flagged = torch.tensor([[[0, 9, 20, 36, 36], [0, 9, 20, 29, 27]]]).split(1, dim=1)
    assert torch.equal(model(bare), model(flagged)) != sees_flags


def test_runs_remember_the_newest_labeled_samples_only():
    memory = Memory(runs=2, width=3, draws=8)
    assert not memory.draw(torch.rand(2, 8))[2].any()  # nothing to learn from yet
    steps = CAPACITY + 5
    active = torch.arange(steps)[None, :, None].expand(2, -1, 3)
    labeled = torch.stack([torch.ones(steps), torch.arange(steps) % 2 == 1]).bool()
    memory.add(active, active[..., 0] % 2, labeled)
    assert memory.count.tolist() == [steps, steps // 2]
    assert sorted(memory.observation[0, :CAPACITY, 0].tolist()) == list(range(5, steps))
    assert memory.observation[1, : steps // 2, 0].tolist() == list(range(1, steps, 2))
    assert memory.label[1, : steps // 2].tolist() == [1] * (steps // 2)
    more = torch.tensor([[[7, 7, 7]], [[8, 8, 8]]])
    memory.add(more, torch.zeros(2, 1).long(), torch.tensor([[True], [False]]))
    assert memory.count.tolist() == [steps + 1, steps // 2]
    assert memory.observation[0, steps % CAPACITY].tolist() == [7, 7, 7]
    assert not (memory.observation[1, :CAPACITY] == 8).all(-1).any()


def test_remembered_samples_are_drawn_evenly():
    memory = Memory(runs=1, width=1, draws=1000)
    memory.add(torch.arange(4)[None, :, None], torch.arange(4)[None] % 2, torch.ones(1, 4) > 0)
    active, named, weight = memory.draw(torch.linspace(0, 1 - 2**-24, 2000)[None, ::2])
    assert active[0, :, 0].bincount().tolist() == [250] * 4
    assert torch.equal(named[0], active[0, :, 0] % 2)
    assert bool((weight == 1).all())
    assert memory.draw(torch.rand(1, 5000))[0].shape == (1, 1000, 1)


def test_the_loss_of_a_reward_model_is_cross_entropy_on_what_it_remembers():
    model = make_reward_model()
    assert model.loss(torch.rand(1, 8)).tolist() == [0.0]
    final = torch.tensor([[[0, 9, 20], [1, 10, 19], [2, 9, 20]]])
    model.memory.add(final, torch.tensor([[1, 0, 0]]), torch.ones(1, 3, dtype=torch.bool))
    found = model.loss(torch.tensor([[0.0, 0.34, 0.99, 0.5]]))
    target = torch.tensor([0.0, 1.0, 1.0, 1.0])
    logit = model(final)[0, [0, 1, 2, 1]]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logit, target)
    torch.testing.assert_close(found[0], expected)


def test_the_gate_learns_from_what_is_remembered(batch):
    """Labeled samples of earlier windows count as this window's do; nothing else does."""
    agent, rollout, _ = batch
    memory, methods = Memory(1, 5, 10**6), tables(["routing"], [Overseer(0.5)], 2)
    earlier = make_rollout(agent, seed=5)
    for window in (earlier, rollout):
        targets = label(window, methods, ReinforceConfig(), memory=memory)
    total = 0
    for window in (earlier, rollout):
        outcome = torch.as_tensor(plain.outcomes(window.seen, 12, 20)[0])
        total += int((outcome >= LABELED).sum())
    assert memory.count.item() == total
    found = loss(agent, rollout, targets, memory=memory).gate
    active, named, _ = memory.draw(rollout.uniform.flatten(1))
    gate = plain.forward(agent, plain.planes(active[0], SHAPE))[1][:, 0]
    is_diamond = (named[0] == 0).float()
    assert 0 < is_diamond.mean() < 1
    expected = torch.nn.functional.binary_cross_entropy_with_logits(gate, is_diamond)
    torch.testing.assert_close(found[0], expected)
    for name, grads in by_module(agent, grads_of(agent, found)).items():
        for grad in grads:
            assert bool((grad != 0).any()) == (name == "gate"), name


def test_the_gate_is_replayed_in_training_unless_told_otherwise():
    learner = tiny("routing")
    learner.update()
    assert int(learner.gate_memory.count) == int((learner.latest[1].outcome >= LABELED).sum()) > 0
    assert tiny("routing", gate_replay=0).gate_memory is None
    assert tiny("naive").gate_memory is None


# ---- contrastive routing


def test_contrast_teaches_experts_and_the_head_only():
    agent = make_agent()
    rollout = make_rollout(agent)
    methods = tables(["contrastive_routing"], [Overseer(0.5)], 2)
    targets = label(rollout, methods, ReinforceConfig())
    contrast = loss(agent, rollout, targets).contrast
    for name, grads in by_module(agent, grads_of(agent, contrast)).items():
        for grad in grads:
            assert bool((grad != 0).any()) == (name in ("expert 0", "expert 1", "head")), name


def test_contrast_is_off_policy_reinforce_of_labeled_episodes():
    agent = make_agent()
    rollout = make_rollout(agent)
    config = ReinforceConfig(discount=0.9, labeled_weight=3.0)
    targets = label(rollout, tables(["contrastive_routing"], [Overseer(0.5)], 2), config)
    found = loss(agent, rollout, targets).contrast
    outcome, left = plain.outcomes(rollout.seen, 12, 20)
    observation = plain.planes(rollout.observation[0].flatten(0, 1), SHAPE)
    (diamond, ghost), gate, _ = plain.forward(agent, observation)
    g = torch.sigmoid(gate)

    def log_policy(hidden):
        return (hidden @ agent.head.weight[0].T + agent.head.bias[0]).log_softmax(-1)

    experts = log_policy(diamond), log_policy(ghost)
    mixture = log_policy(g * diamond + (1 - g) * ghost)
    total, weights = 0.0, 0.0
    for i, action in enumerate(rollout.action[0].flatten().tolist()):
        kind = outcome.flatten()[i]
        weights += 3.0 if kind >= LABELED else 1.0
        if kind >= LABELED:
            for behavior, own in enumerate(experts):
                sign = 1 if kind == LABELED + behavior else -1
                ratio = min(1.0, float((own[i, action] - mixture[i, action]).detach().exp()))
                total = total + 3.0 * ratio * sign * 0.9 ** left.flatten()[i] * own[i, action]
    torch.testing.assert_close(found[0], -total / weights)
    plain_routing = label(rollout, tables(["routing"], [Overseer(0.5)], 2), config)
    assert loss(agent, rollout, plain_routing).contrast.item() == 0.0


# ---- experts that act by themselves


def test_worlds_are_shared_out():
    def sizes(*arguments):
        return [len(range(256)[part]) for part in acting(*arguments)]

    assert sizes(256, 2, 0.9) == [26, 115, 115]
    assert sizes(256, 3, 0.5) == [128, 42, 43, 43]
    assert sizes(256, 2, 0.0) == [256, 0, 0]


def practiced(**settings):
    """A learner of imputed routing after an update, and the next window."""
    learner = tiny("imputed_routing", solo_share=0.75, worlds=16, **settings)
    learner.reward_model.believed = 1
    learner.update()
    rollout, _ = collect(
        learner.agent, learner.world, learner.worlds, learner._draw(8), learner.acts
    )
    model = learner.reward_model
    return learner, rollout, label(rollout, learner.methods, learner.settings, 0.0, model)


def test_each_expert_acts_in_its_worlds():
    learner, rollout, _ = practiced(learning_rate=0.0)
    assert [(part.start, part.stop) for part in rollout.acts] == [(0, 4), (4, 10), (10, 16)]
    agent = learner.agent
    with torch.no_grad():  # the diamond's expert goes up always, the ghost's down, the mixture left
        for k, action in ((0, 0), (1, 2)):
            agent.trunks[-1].bias[0, k, k] += 1e4
            agent.head.weight[0, action, k] = 1e4
        agent.gate_out.bias.zero_()
        agent.gate_out.weight.zero_()
        agent.head.bias[0, 3] = 0.9e8
    learner.update()
    action = learner.latest[0].action[0]
    assert (action[:, 4:10] == 0).all()
    assert (action[:, 10:] == 2).all()
    assert (action[:, :4] == 3).all()


@pytest.mark.parametrize("expert", [0, 1])
@pytest.mark.parametrize("part", ["policy", "entropy"])
def test_what_an_expert_does_alone_teaches_itself_and_the_head_only(expert, part):
    learner, rollout, targets = practiced()
    mask = torch.zeros(16)
    mask[rollout.acts[1 + expert]] = 1.0
    targets = replace(targets, weight=targets.weight * mask)
    assert targets.weight.any()
    found = loss(learner.agent, rollout, targets, own_values=learner.own_values)
    found = grads_of(learner.agent, getattr(found, part))
    for name, grads in by_module(learner.agent, found).items():
        for grad in grads:
            assert bool((grad != 0).any()) == (name in (f"expert {expert}", "head")), name


def test_an_expert_alone_is_paid_for_its_own_behavior():
    learner, rollout, targets = practiced(bootstrap=False, discount=0.5)
    outcome, left = plain.outcomes(rollout.seen, 8, 16)
    for expert in (0, 1):
        worlds = range(16)[rollout.acts[1 + expert]]
        for t, n in itertools.product(range(8), worlds):
            kind, found = outcome[t, n], float(targets.returns[0, t, n]) / 0.5 ** left[t, n]
            chance = float(targets.chances[0, t, n, expert])
            worth = {TIMEOUT: 0, UNFINISHED: 0, UNLABELED: 2 * chance - 1}.get(kind)
            worth = worth if worth is not None else 1 if kind == LABELED + expert else -1
            assert found == pytest.approx(worth, abs=1e-5)
            assert float(targets.weight[0, t, n]) == 1.0
    assert int(learner.reward_model.memory.count) > 0


def test_one_training_serves_both_behaviors():
    learner = tiny("imputed_routing", level=0.5, max_steps=16, agent=AgentConfig(hidden=(32, 32)),
                   updates=120, worlds=128, learning_rate=5e-3)  # fmt: skip
    for _ in range(120):
        learner.update()
    returns = exact_returns(learner, 0.5)
    assert returns["diamond"] > 0.75
    assert returns["ghost"] < -0.75


# ---- which agent is deployed


def test_held_out_episodes_are_scored_by_their_labels():
    """All labeled: the mean is the exact return; none labeled: nobody knows."""
    learner = tiny("naive_early_stop", level=1.0)
    for _ in range(3):
        learner.update()
    found = float(learner.held_out_returns()[0])
    exact = exact_returns(learner, 1.0)["single"]
    assert found == pytest.approx(exact, abs=4 / HELD_OUT**0.5)
    assert found == float(learner.held_out_returns()[0])
    learner.update()
    assert found != float(learner.held_out_returns()[0])
    assert np.isnan(float(tiny("naive_early_stop", level=0.0).held_out_returns()[0]))


def test_looking_at_held_out_episodes_changes_nothing_in_training():
    naive, watched = tiny("naive"), tiny("naive_early_stop")
    for _ in range(4):
        watched.select([])
        naive.update()
        watched.update()
    for name, parameter in naive.parameters.items():
        assert torch.equal(parameter, watched.parameters[name])


def test_the_best_agent_is_deployed():
    learner = tiny("naive_oracle_stop", "naive_oracle_stop")
    kept = {}
    for update, scores in enumerate([[0.1, 0.5], [0.3, 0.4], [float("nan"), 0.6], [0.2, 0.55]]):
        learner.select(scores)
        kept[update] = learner.agent.head.weight.detach().clone()
        learner.update()
    assert learner.selected.update.tolist() == [1, 2]
    unknown = tiny("naive_early_stop", level=0.0)
    for _ in range(2):  # nothing is ever labeled: the newest is deployed
        unknown.update()
        unknown.select([])
    assert torch.equal(unknown.deployed.head.weight, unknown.agent.head.weight)
    for run, update in enumerate([1, 2]):
        assert torch.equal(learner.deployed.head.weight[run], kept[update][run])
    last = tiny("naive")
    assert last.deployed is last.agent


KEPT, DROPPED = 1.0, 0.0
ROUTED, OPEN = [[1, 0, 0], [0, 1, 0]], [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("name", "rewards", "unlabeled", "routes", "deployed"),
    [
        ("routing", [1, 1, 1], KEPT, ROUTED, "diamond"),
        ("no_routing", [1, 1, 1], KEPT, OPEN, "diamond"),
        ("no_gate", [1, 1, 1], KEPT, ROUTED, "diamond"),
        ("random_module", [1, 1, 1], KEPT, ROUTED, "diamond"),
        ("contrastive_routing", [1, 1, 1], KEPT, ROUTED, "diamond"),
        ("naive", [1, 1, -1], KEPT, OPEN, "single"),
        ("naive_early_stop", [1, 1, -1], KEPT, OPEN, "single"),
        ("ipw_hidden_flag", [1, 1, -19], KEPT, OPEN, "single"),
        ("filtering", [0, 1, -1], DROPPED, OPEN, "single"),
        ("oracle", [0, 1, -1], KEPT, OPEN, "single"),
        ("oracle_filtering", [0, 1, -1], DROPPED, OPEN, "single"),
    ],
)
def test_methods_are_as_published(name, rewards, unlabeled, routes, deployed):
    row = tables([name], [Overseer(0.1)], 2)
    assert row.reward[0].tolist() == [0, 0, *rewards]
    assert row.sample_weight[0].tolist() == [1, 1, unlabeled, 1, 1]
    assert row.routes[0].tolist() == [[1, 1, 1]] * 3 + routes
    assert METHODS[name].policy.experts == ("one" if deployed == "single" else "many")


def test_what_an_oracle_labels_does_not_hang_on_the_actions():
    agent, world = make_agent(), World(WorldConfig(rows=3, cols=3), 0.5)
    noise = torch.rand(1, 6, 50, noise_channels(world))
    state = world.reset(noise[:, :1, :, : world.noise_channels])[:, 0]
    other = noise.clone()
    other[..., -1] = torch.rand(1, 6, 50)
    (a, _), (b, _) = (collect(agent, world, state, n) for n in (noise, other))
    assert torch.equal(a.action, b.action)
    assert torch.equal(a.uniform, noise[..., -1])
    assert torch.equal(b.uniform, other[..., -1])


def test_statistics_of_a_window(batch):
    agent, rollout, targets = batch
    found = statistics(rollout, targets)
    observation = plain.planes(rollout.active[0], SHAPE)[rollout.slot.flatten()]
    gate = torch.sigmoid(plain.forward(agent, observation)[1][:, 0]).view(12, 20)
    outcome = targets.outcome[0]
    done = (rollout.seen.terminated | rollout.seen.truncated)[0]
    kinds = {"timeout": 1, "unlabeled": 2, "labeled_diamond": 3, "labeled_ghost": 4}
    for name, kind in kinds.items():
        share = (outcome[done] == kind).float().mean()
        assert float(found[f"endings/{name}"]) == pytest.approx(float(share), abs=1e-6)
        mean = gate[outcome == kind].mean()
        assert float(found[f"gate/{name}"]) == pytest.approx(float(mean), abs=1e-5)


def test_calibration_error_of_known_forecasts():
    chance = torch.tensor([[0.05, 0.05, 0.95, 0.95, 0.55], [0.5, 0.5, 0.5, 0.5, 0.5]])
    happened = torch.tensor([[0, 0, 1, 0, 1], [1, 0, 1, 0, 1]]).float()
    among = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]).bool()
    found = calibration_error(chance, happened, among)
    assert found.tolist() == pytest.approx([(2 * 0.05 + 2 * 0.45) / 4, 0.0])
    assert calibration_error(chance, happened, ~(among | ~among)).isnan().all()


def test_a_reward_model_is_checked_against_the_truth_on_unlabeled_endings():
    agent, model = make_agent(experts="one"), make_reward_model()
    rollout = make_rollout(agent)
    methods = tables(["reward_model"], [Overseer(0.5)], 1)
    targets = label(rollout, methods, ReinforceConfig(), reward_model=model)
    found = statistics(rollout, targets)
    for kind, among in (("unlabeled", [UNLABELED]), ("labeled", [LABELED, LABELED + 1])):
        among = rollout.seen.terminated & torch.isin(targets.outcome, torch.tensor(among))
        right = (targets.chance > 0.5) == (rollout.truth.ending == 0)
        share = right[among].float().mean()
        assert float(found[f"reward_model/accuracy_{kind}"]) == pytest.approx(float(share))
        assert 0 <= float(found[f"reward_model/calibration_error_{kind}"]) <= 1


def test_every_coefficient_is_annealed():
    one = torch.ones(1)
    losses = Loss(one, one * 10, one * 100, one * 1000, one * 1e4, one * 1e5)
    schedules = {"value_coef": (0.1, 0.3), "entropy_coef": (0.2, 0.4), "gate_coef": (0.5, 0.7)}
    config = ReinforceConfig(contrast_coef=(0.6, 0.8), **schedules)
    for progress, (value, entropy, gate, contrast) in {
        0: (0.1, 0.2, 0.5, 0.6),
        1: (0.3, 0.4, 0.7, 0.8),
    }.items():
        expected = 1 + 10 * value - 100 * entropy + 1000 * gate + 1e4 * contrast + 1e5
        assert float(losses.total(config, progress)) == pytest.approx(expected)


def test_the_readme_lists_every_method_and_what_it_assumes():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    for name, method in METHODS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert row.split(" | ")[2] == method.assumes.replace("true labels", "truth")


def test_all_methods_differ():
    rows = {}
    for name, method in METHODS.items():
        t = tables([name], [Overseer(0.1)], 2)
        numbers = [tuple(x.flatten().tolist()) for x in (t.reward, t.sample_weight, t.routes)]
        key = (method.shape, method.table.labels, method.table.weighs_labels, *numbers)
        assert key not in rows, f"{name} is {rows.get(key)} under another name"
        rows[key] = name


def test_the_gate_of_no_gate_is_fixed():
    agent = make_agent(gate="fixed")
    rollout = make_rollout(agent)
    assert torch.equal(rollout.output.gate, torch.full_like(rollout.output.gate, 0.5))
    assert not [n for n, _ in agent.named_parameters() if n.startswith("gate")]


# ---- sampling, schedules


def test_actions_are_drawn_from_the_policy():
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    n = 100_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    edges = cumulative(logits.softmax(-1))
    counts = sample(edges.expand(n, 3), uniform).bincount(minlength=4)
    expected = logits.softmax(0) * n
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # 99.9 %, 3 d.o.f.
    certain = cumulative(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    extremes = torch.tensor([0.0, 0.5, 1 - 2.0**-24])
    assert sample(certain.expand(3, 3), extremes).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("schedule", "values"), [((0.1,), [0.1, 0.1, 0.1]), ((0.1, 0.3), [0.1, 0.2, 0.3])]
)
def test_schedules(schedule, values):
    assert [at(schedule, x) for x in (0, 0.5, 1)] == pytest.approx(values)


def test_annealing_reaches_the_optimizer(monkeypatch):
    learner = tiny("routing", updates=3, learning_rate=(0.1, 0.3))
    rates, step = [], learner.optimizer.step
    monkeypatch.setattr(learner.optimizer, "step", lambda rate: (rates.append(rate), step(rate)))
    for _ in range(3):
        learner.update()
    assert rates == pytest.approx([0.1, 0.2, 0.3])


def test_adam_is_torchs_to_the_bit():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizer, other = Adam(ours), torch.optim.Adam(theirs, fused=True)
    for rate in (0.1, 0.01, 0.003):
        optimizer.zero_grad()
        other.zero_grad()
        other.param_groups[0]["lr"] = rate
        for a, b in list(zip(ours, theirs, strict=True))[: 3 if rate == 0.1 else 2]:
            a.grad = torch.randn(3, 4)  # one of them has a gradient at first only
            b.grad = a.grad.clone()
        optimizer.step(rate)
        other.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- stacks


def test_runs_with_different_networks_do_not_stack():
    def key(**settings):
        return Config(**settings).stack_key()

    assert key() == key(method="no_routing", oversight=0.9, seeds=(7,))
    assert key(method="naive") != key(method="ipw_hidden_flag")
    assert key() != key(agent={"hidden": (8,)})
    for other in ("naive", "no_gate", "contrastive_routing"):
        assert key() != key(method=other)
        with pytest.raises(ValueError, match="stack"):
            tiny("routing", other)


# ---- it learns


def train_small(method, updates):
    """Exact returns by policy after training in a 3x3 world at 90 % oversight."""
    learner = tiny(
        method,
        level=0.9,
        max_steps=16,
        agent=AgentConfig(hidden=(32, 32)),
        updates=updates,
        worlds=128,
        learning_rate=5e-3,
        labeled_weight=5.0,
    )
    for _ in range(updates):
        learner.update()
    return exact_returns(learner, 0.9)


def test_an_oracle_learns_a_small_world():
    assert train_small("oracle", 150)["single"] > 0.85


def test_a_reward_model_learns_a_small_world():
    assert train_small("reward_model", 150)["single"] > 0.85


def test_routing_separates_the_experts_and_random_labels_do_not():
    returns, control = train_small("routing", 150), train_small("random_module", 150)
    assert returns["diamond"] > 0.35
    assert returns["ghost"] < -0.35
    assert abs(control["diamond"]) < returns["diamond"] - 0.2
