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

from oversight_rl.agents.networks import Agent, initialize
from oversight_rl.agents.steering import standard
from oversight_rl.experiments.oversight.policies import read
from oversight_rl.runs.rows import Facts


def main(run_dir: Annotated[Path, tyro.conf.Positional], episodes: int = 200_000) -> None:
    """Compare exact and sampled figures.

    Args:
        run_dir: A run folder of REINFORCE, or of PPO where it is evaluated exactly.
        episodes: Episodes per row.
    """
    (saved,) = read(run_dir)
    config, untrained = saved.config, saved.kind.blank(saved.config)
    if isinstance(untrained, Agent):
        initialize(untrained, [torch.Generator().manual_seed(0)])
    judges = saved.judge, saved.playing(episodes)
    worst = 0.0
    worst = 0.0
    for name, agent in (("trained", saved.agent), ("untrained", untrained)):
        policies = standard(*saved.kind.names(agent))
        policies += [policy.with_options(greedy=True) for policy in policies]
        facts = [Facts(config.method, config.seeds[0], config.oversight)]
        arguments = (agent, facts, policies, [[config.oversight]])
        for row, other in zip(*(judge.tables(*arguments)[0] for judge in judges), strict=True):
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
                f"length {found['episode_length']:.3f} vs {estimate['episode_length']:.3f}, "
                f"standard errors off: {max(errors):.1f}",
                flush=True,
            )
    print(f"worst: {worst:.1f} standard errors")


if __name__ == "__main__":
    tyro.cli(main)
