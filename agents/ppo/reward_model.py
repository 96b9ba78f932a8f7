"""A reward model: it tells what an unlabeled ending was, and learns that from the labeled ones.

It sees the observation before an episode's last step and the action taken there, as the policy did,
but for the oversight flags where the environment says which entries they are: a labeled ending is
always flagged and an unlabeled one is not, so that a model which reads flags would be asked about
endings unlike all that it was taught.
"""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from oversight_rl.agents.memory import Memory
from oversight_rl.agents.ppo.observations import row_type, row_width

HIDDEN = 64
LESSON = 512
"""Remembered endings that each step learns from."""


class RewardModel(nn.Module):
    """Tells in which behavior an episode ended.

    Args:
        extractor: of features, its own.
        action_space: of the environment.
        behaviors: number of behaviors.
    """

    def __init__(
        self, extractor: BaseFeaturesExtractor, action_space: spaces.Space[Any], behaviors: int
    ) -> None:
        super().__init__()
        self.extractor, self.action_space = extractor, action_space
        inputs = extractor.features_dim + get_flattened_obs_dim(action_space)
        self.net = nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, behaviors))

    def forward(self, features: Tensor, actions: Tensor) -> Tensor:
        """Logits `[B, behaviors]` from features `[B, features_dim]` and actions `[B, ...]`."""
        choice = preprocess_obs(actions, self.action_space)
        assert isinstance(choice, Tensor)
        return self.net(torch.cat([features, choice.flatten(1)], dim=-1))  # type: ignore[no-any-return]


def reward_memory(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> Memory:
    """A memory of labeled endings: flattened observations, each followed by its action."""
    width = row_width(observation_space) + row_width(action_space)
    return Memory(1, width, LESSON, row_type(observation_space, action_space))
