"""Diagnostics of a rollout: how its episodes ended, the gate, the reward model."""

from __future__ import annotations

import math
from typing import cast

import torch

from oversight_rl.agents.methods import LABELED, TIMEOUT, UNLABELED
from oversight_rl.agents.ppo.algorithm import RoutedPPO
from oversight_rl.agents.ppo.buffer import RoutedRolloutBuffer
from oversight_rl.agents.ppo.observations import each
from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.reinforce.figures import reward_model_figures
from oversight_rl.envs.settings import NO_LABEL


def statistics(model: RoutedPPO) -> dict[str, float]:
    """How episodes of a whole rollout ended, as the learner saw them, and the gate by outcome.

    Args:
        model: that is about to learn from the rollout.
    """
    buffer, policy = cast(RoutedRolloutBuffer, model.rollout_buffer), cast(MoEPolicy, model.policy)
    kinds = {"timeout": TIMEOUT, "unlabeled": UNLABELED}
    kinds |= {f"labeled_{name}": LABELED + i for i, name in enumerate(buffer.behaviors)}
    x = model.experience
    outcome = x.window.of_rollout(x.outcome)
    endings = outcome[buffer.done]
    count = max(1, len(endings))
    shares = {f"endings/{k}": float((endings == v).sum()) / count for k, v in kinds.items()}
    if x.chances is not None:
        wanted, truth = x.window.of_rollout(x.chances[..., 0]), buffer.truth
        parts = (wanted, truth, truth != NO_LABEL, outcome)
        figures = reward_model_figures(*(torch.as_tensor(part).flatten()[None] for part in parts))
        shares |= {name: float(figure) for name, figure in figures.items()}
    if not policy.has_gate:
        return shares
    outcome = outcome.flatten()
    with torch.no_grad():
        rows = each(
            lambda x: torch.as_tensor(x).flatten(0, 1).to(model.device), buffer.observations
        )
        gate = policy.gate_log_probabilities(rows)[0, :, 0].exp().cpu().numpy()
    means = {
        f"gate/{k}": float(gate[outcome == v].mean()) if (outcome == v).any() else math.nan
        for k, v in kinds.items()
    }
    return shares | means
