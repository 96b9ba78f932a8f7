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
from oversight_rl.experiments.oversight.grid import GridJudge
from oversight_rl.experiments.oversight.policies import read
from oversight_rl.runs.rows import Facts


def main(run_dir: Annotated[Path, tyro.conf.Positional], episodes: int = 200_000) -> None:
    """Compare exact and sampled figures.

    Args:
        run_dir: A run folder of REINFORCE.
        episodes: Episodes per row.
    """
    (saved,) = read(run_dir)
    untrained = new_agent(
        saved.config.agent,
        saved.config.world.shape,
        saved.config.method,
        1,
        [torch.Generator().manual_seed(0)],
    )
    config = saved.config
    exact, sampled = GridJudge(config), GridJudge(config)
    sampled.evaluator.mdp, sampled.evaluator.episodes = None, episodes
    worst = 0.0
    for name, agent in (("trained", saved.agent), ("untrained", untrained)):
        policies = standard(agent.n_experts)
        policies += [policy.with_options(greedy=True) for policy in policies]
        facts = [Facts(config.method, config.seeds[0], config.oversight)]
        arguments = (agent, facts, policies, [[config.oversight]])
        for row, other in zip(*(j.tables(*arguments)[0] for j in (exact, sampled)), strict=True):
            found, estimate = row.figures, other.figures
            off = abs(found["ground_truth_return"] - estimate["ground_truth_return"])
            errors = [off / estimate["return_se"]]
            for figure in ("p_diamond", "p_ghost", "p_timeout"):
                p = found[figure]
                scale = math.sqrt(max(p * (1 - p), 1e-12) / episodes)
                errors.append(abs(p - estimate[figure]) / max(scale, 1 / episodes))
            worst = max(worst, *errors)
            print(
                f"{name} {row.policy}{' greedy' if row.greedy else ''}: "
                f"return {found['ground_truth_return']:.4f} vs "
                f"{estimate['ground_truth_return']:.4f}, "
                f"window {found['window_return']:.4f} vs {estimate['window_return']:.4f}, "
                f"standard errors off: {max(errors):.1f}",
                flush=True,
            )
    print(f"worst: {worst:.1f} standard errors")


if __name__ == "__main__":
    tyro.cli(main)
