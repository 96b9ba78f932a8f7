"""Exact evaluation against sampled episodes, on every row of a run's table.

`python benchmarks/exactness.py RUN_DIR [--episodes 200000]` prints, for the trained agent and for
the same networks untrained, how many standard errors each exact figure is from its estimate.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import tyro

from oversight_rl.agents.networks import new_agent
from oversight_rl.agents.steering import standard
from oversight_rl.evaluation import Subject
from oversight_rl.experiments.oversight.evaluation import Evaluator
from oversight_rl.runs.folder import RunFolder


def main(run_dir: Annotated[Path, tyro.conf.Positional], episodes: int = 200_000) -> None:
    """Compare exact and sampled figures.

    Args:
        run_dir: A run folder.
        episodes: Episodes per row.
    """
    saved = RunFolder.open(run_dir).load()
    untrained = new_agent(
        saved.config.agent,
        saved.config.world.shape,
        saved.config.method,
        1,
        [torch.Generator().manual_seed(0)],
    )
    config, discount = saved.config, saved.config.training.discount
    exact = Evaluator(config.world, discount)
    sampled = Evaluator(config.world, discount, episodes=episodes)
    sampled.mdp = None
    worst = 0.0
    for name, agent in (("trained", saved.agent), ("untrained", untrained)):
        policies = standard(agent.n_experts)
        policies += [policy.with_options(greedy=True) for policy in policies]
        subject = [Subject(config.method, config.seeds[0], config.oversight)]
        arguments = (agent, subject, policies, [[config.oversight]])
        for row, other in zip(*(e.evaluate(*arguments)[0] for e in (exact, sampled)), strict=True):
            errors = [abs(row.ground_truth_return - other.ground_truth_return) / other.return_se]
            for field in ("p_diamond", "p_ghost", "p_timeout"):
                p = getattr(row, field)
                scale = math.sqrt(max(p * (1 - p), 1e-12) / episodes)
                errors.append(abs(p - getattr(other, field)) / max(scale, 1 / episodes))
            worst = max(worst, *errors)
            print(
                f"{name} {row.policy}{' greedy' if row.greedy else ''}: "
                f"return {row.ground_truth_return:.4f} vs {other.ground_truth_return:.4f}, "
                f"window {row.window_return:.4f} vs {other.window_return:.4f}, "
                f"standard errors off: {max(errors):.1f}",
                flush=True,
            )
    print(f"worst: {worst:.1f} standard errors")


if __name__ == "__main__":
    tyro.cli(main)
