"""OversightLabels on environments that are not ours, and the example of docs/environments.md."""

import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from oversight_rl.envs.labels import OversightLabels

PAGE = Path(__file__).parent.parent / "docs" / "environments.md"


def slow_or_fast(env, observation, reward, terminated, truncated, info):
    """How CartPole fell: to the right is wanted, to the left is not; upright is neither."""
    if not terminated:
        return None
    return "wanted" if observation[2] > 0 else "unwanted"


def cart(probability=0.5, **more):
    return OversightLabels(gym.make("CartPole-v1", max_episode_steps=30), slow_or_fast,
                           probability, **more)  # fmt: skip


def episodes(env, count, seed=0):
    """(observations, info at the end, terminated) of episodes under random actions."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        first, _ = env.reset(seed=seed if i == 0 else None)
        seen = [first]
        while True:
            observation, _, terminated, truncated, info = env.step(int(rng.integers(2)))
            seen.append(observation)
            if terminated or truncated:
                yield seen, info, terminated
                break
            assert "behavior" not in info
            assert "label" not in info


def test_labels_name_the_behavior_and_come_as_often_as_said():
    found = list(episodes(cart(0.3), 600))
    for seen, info, terminated in found:
        expected = slow_or_fast(None, seen[-1], 0, terminated, False, {})
        assert info["behavior"] == expected
        assert info.get("label", expected) == expected
    for behavior in ("wanted", "unwanted"):
        labeled = ["label" in info for _, info, _ in found if info["behavior"] == behavior]
        assert len(labeled) > 150
        assert abs(np.mean(labeled) - 0.3) < 4 * (0.21 / len(labeled)) ** 0.5
    assert any(info["behavior"] is None for _, info, _ in found)


def test_flags_are_seen_and_tell_which_labels_come():
    for seen, info, _ in episodes(cart(0.5, flags_visible=True), 60):
        flags = seen[0][-2:]
        assert all(np.array_equal(observation[-2:], flags) for observation in seen)
        if info["behavior"]:
            watched = flags[("wanted", "unwanted").index(info["behavior"])]
            assert ("label" in info) == bool(watched)
    check_env(cart(flags_visible=True), skip_render_check=True)
    env = cart(flags_visible=True)
    assert env.observation_space.contains(env.reset(seed=0)[0])


def test_a_seed_repeats_which_episodes_are_watched():
    def labels(seed):
        return ["label" in info for _, info, _ in episodes(cart(), 40, seed)]

    assert labels(3) == labels(3) != labels(4)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"oversight_probability": 1.5}, "must lie in"),
        ({"behaviors": ("wanted",)}, "two or more"),
        ({"behaviors": ("a", "a")}, "distinct"),
    ],
)
def test_bad_arguments_are_refused(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        OversightLabels(gym.make("CartPole-v1"), slow_or_fast, **arguments)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="FlattenObservation"):
        OversightLabels(gym.make("FrozenLake-v1"), slow_or_fast, flags_visible=True)
    env = OversightLabels(gym.make("CartPole-v1"), lambda *_: "unheard of")
    with pytest.raises(ValueError, match="'unheard of'"):
        list(episodes(env, 1))


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(# example\.py.*?)```", PAGE.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    small = re.sub(r"total = [\d_]+", "total = 2_000", example)
    assert small != example
    scope = {"__name__": "__main__"}
    exec(compile(small, "example.py", "exec"), scope)
    assert scope["share_wanted"] == pytest.approx(scope["share_wanted"])  # a number, not nan
    assert 0 <= scope["share_wanted"] <= 1
