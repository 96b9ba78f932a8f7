"""Steered policies against the mixture written out on hidden activations."""

import copy
import math

import numpy as np
import plain
import pytest
import torch

from oversight_rl.agents.networks import Agent, new_agent
from oversight_rl.agents.settings import AgentConfig
from oversight_rl.agents.steering import (
    MIXTURE,
    SteeredPolicy,
    Steering,
    ablate,
    blend,
    expert_names,
    keep,
    parse,
    standard,
)
from oversight_rl.envs.settings import UserError, WorldConfig
from oversight_rl.envs.world import World
from oversight_rl.experiments.oversight import policies
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.experiments.oversight.evaluation import steered_return


@pytest.fixture
def agent():
    config = AgentConfig(experts=3, hidden=(8, 8), gate_conv=True)
    return Agent(config, (4, 5, 5), 4, 1, generators=[torch.Generator().manual_seed(0)])


@pytest.fixture
def observation():
    world = World(WorldConfig(), 0.5)
    noise = torch.rand(7, world.noise_channels, generator=torch.Generator().manual_seed(1))
    return world.observe(world.reset(noise))


def by_hand(agent, observation, weights=None):
    """Policy logits, with the head applied to a mixture of activations."""
    experts, gate, _ = plain.forward(agent, observation)
    if weights is None:
        weights = torch.cat([gate, torch.zeros(len(gate), 1)], 1).softmax(-1)
    mixed = sum(weights[:, k : k + 1] * h for k, h in enumerate(experts))
    return mixed @ agent.head.weight[0].T + agent.head.bias[0]


def constant(*weights):
    return torch.tensor(weights).expand(7, 3)


def test_the_mixture(agent, observation):
    chances = SteeredPolicy(agent)(observation)
    torch.testing.assert_close(chances, by_hand(agent, observation).softmax(-1))


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("diamond", (1.0, 0.0, 0.0)),
        ("ghost", (0.0, 1.0, 0.0)),
        ("expert_2", (0.0, 0.0, 1.0)),
        ("diamond=0.7,ghost=0.3", (0.7, 0.3, 0.0)),
        ("diamond=1.5,expert_2=-0.5", (1.5, 0.0, -0.5)),
    ],
)
def test_constant_weights(agent, observation, text, weights):
    policy = SteeredPolicy(agent).steer(text)
    expected = by_hand(agent, observation, constant(*weights)).softmax(-1)
    torch.testing.assert_close(policy(observation), expected)


def test_an_ablated_expert_gives_zero(agent, observation):
    expected = SteeredPolicy(agent, ablate("ghost", 3))(observation)
    for layer in agent.trunks:
        layer.weight.data[:, 1] = 0
        layer.bias.data[:, 1] = 0
    torch.testing.assert_close(SteeredPolicy(agent)(observation), expected)


def test_temperature_and_greed(agent, observation):
    logits = by_hand(agent, observation, constant(1.0, 0.0, 0.0))
    warm = SteeredPolicy(agent, keep("diamond", 3).with_options(temperature=2.0))
    torch.testing.assert_close(warm(observation), (logits / 2).softmax(-1))
    greedy = SteeredPolicy(agent, keep("diamond", 3).with_options(greedy=True))
    assert torch.equal(greedy(observation).argmax(-1), logits.argmax(-1))
    assert torch.equal(greedy(observation).max(-1).values, torch.ones(7))
    assert torch.equal(greedy.act(observation), logits.argmax(-1))


def test_steering_changes_while_running(agent, observation):
    warm = SteeredPolicy(agent, MIXTURE.with_options(temperature=2.0)).steer("ghost")
    assert warm.steering.temperature == 2.0
    policy = SteeredPolicy(agent, MIXTURE.with_options(greedy=True))
    before = policy(observation)
    policy.steer("ghost")
    expected = by_hand(agent, observation, constant(0.0, 1.0, 0.0))
    assert torch.equal(policy(observation).argmax(-1), expected.argmax(-1))
    assert policy.steering.greedy  # only the experts changed
    assert torch.equal(policy.steer("mixture")(observation), before)


def test_raw_observations_of_any_batch_shape(agent, observation):
    policy = SteeredPolicy(agent)
    one = policy(observation[0].numpy())
    assert one.shape == (4,)
    assert policy(np.stack([observation.numpy()] * 2)).shape == (2, 7, 4)
    torch.testing.assert_close(one, policy(observation)[0])
    assert policy.act(observation[0].numpy()).shape == ()


def test_actions_follow_the_probabilities(agent, observation):
    policy = SteeredPolicy(agent)
    many = observation[:1].expand(50_000, -1, -1, -1)
    actions = policy.act(many, torch.Generator().manual_seed(0))
    counts = actions.bincount(minlength=4)
    expected = policy(observation)[0] * 50_000
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # 99.9 %, 3 d.o.f.


def test_names():
    assert expert_names(1) == ("single",)
    assert expert_names(3) == ("diamond", "ghost", "expert_2")
    assert [p.name for p in standard(2)] == ["mixture", "diamond", "ghost"]
    assert [p.name for p in standard(1)] == ["single"]
    assert blend({"diamond": 0.5, "ghost": 0.5}, 2).name == "diamond=0.5,ghost=0.5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("diamnd", "did you mean 'diamond'"),
        ("mixtur", "did you mean 'mixture'"),
        ("without:gost", "did you mean 'ghost'"),
        ("diamond=x", "NAME=WEIGHT"),
        ("diamond=nan", r"must lie in \[-1000, 1000\], got nan"),
        ("diamond=1e38,ghost=-1e38", r"must lie in \[-1000, 1000\], got 1e\+38"),
    ],
)
def test_bad_texts_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse(text, 2)


def test_a_single_expert_has_no_mixture():
    assert parse("single", 1) == Steering("single", (1.0,))
    with pytest.raises(UserError, match="must be one of deployed, diamond, single"):
        parse("mixture", 1)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), 1e-320, 9e-4, 1001.0, 1e308])
def test_bad_temperatures_are_refused(temperature):
    with pytest.raises(UserError, match=r"must lie in \[0.001, 1000\], got"):
        MIXTURE.with_options(temperature=temperature)
    with pytest.raises(UserError, match=r"must lie in \[0.001, 1000\], got"):
        Steering("mixture", temperature=temperature)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("weights", [None, (1000.0, -1000.0)])
def test_whatever_steering_is_taken_leaves_probabilities(agent, observation, weights, greedy):
    for temperature in (1e-3, 1e3):
        steering = Steering("extreme", weights and (*weights, 0.0), (), temperature, greedy)
        chances = SteeredPolicy(agent, steering)(observation)
        torch.testing.assert_close(chances.sum(-1), torch.ones(len(chances)))


@pytest.mark.parametrize("greedy", [False, True])
def test_logits_that_are_no_numbers_give_no_probabilities(agent, observation, greedy):
    bad = copy.deepcopy(agent)
    bad.head.bias.data[0, 2] = torch.nan
    assert SteeredPolicy(bad, MIXTURE.with_options(greedy))(observation).isnan().all()


@pytest.mark.parametrize("text", ["mixture", "ghost", "diamond=0.7,ghost=0.3", "without:diamond"])
def test_an_exported_policy_reads_back_the_same(tmp_path, text, observation):
    config = Config(agent=AgentConfig(hidden=(8,)))
    agent = new_agent(
        config.agent, config.world.shape, config.method, 1, [torch.Generator().manual_seed(3)]
    )
    policy = SteeredPolicy(agent, parse(text, 2).with_options(temperature=0.5))
    source = policies.Saved(agent, config, 100, 1.5)
    policies.write_policy(tmp_path / "policy.safetensors", policy.steering, source)
    saved = policies.read_policy(tmp_path / "policy.safetensors")
    assert saved.steering == policy.steering
    assert saved.config == config
    assert (saved.env_steps, saved.wall_seconds) == (100, 1.5)
    again = SteeredPolicy(saved.agent, saved.steering)
    assert torch.equal(again(observation), policy(observation))


@pytest.mark.parametrize(
    ("steering", "expert"),
    [("diamond", 0), ("ghost", 1), ("mixture", None), ("diamond=0.5,ghost=0.5", None),
     ("without:ghost", None), ("diamond=2", None), ("ghost=1", 1)],
)  # fmt: skip
def test_who_acts_by_itself(steering, expert):
    assert parse(steering, 2).expert == expert
    assert parse("deployed", 1).expert == 0


def test_a_return_toward_what_is_steered_to():
    assert steered_return(parse("diamond", 2), (0.6, -0.6)) == 0.6
    assert steered_return(parse("ghost", 2), (0.6, -0.8)) == -0.8
    assert math.isnan(steered_return(parse("mixture", 2), (0.6, -0.6)))
    assert math.isnan(steered_return(parse("expert_2", 3), (0.6, -0.6)))
