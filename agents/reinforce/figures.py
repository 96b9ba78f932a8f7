"""Diagnostics of a window: how episodes ended, the gate, a reward model against the truth."""

import torch
from torch import Tensor

from oversight_rl.agents.methods import LABELED, TIMEOUT, UNLABELED
from oversight_rl.agents.reinforce.collect import Rollout
from oversight_rl.agents.reinforce.losses import Targets


@torch.no_grad()
def statistics(rollout: Rollout, targets: Targets) -> dict[str, Tensor]:
    """Diagnostics of a window per run: endings as seen, and the gate by outcome. `[R]` each."""
    done = rollout.seen.terminated | rollout.seen.truncated
    share = {
        "timeout": targets.outcome == TIMEOUT,
        "unlabeled": targets.outcome == UNLABELED,
        "labeled_diamond": targets.outcome == LABELED,
        "labeled_ghost": targets.outcome == LABELED + 1,
    }
    ended = done.sum((1, 2)).clamp(min=1)
    result = {f"endings/{k}": (mask & done).sum((1, 2)) / ended for k, mask in share.items()}
    if rollout.output.gate_logits.shape[-1] > 1:
        gate = rollout.output.rows(rollout.slot).gate[..., 0]
        for k, mask in share.items():  # nan where there is no such sample
            result[f"gate/{k}"] = (gate * mask).sum((1, 2)) / mask.sum((1, 2))
    if targets.chance is not None:
        result |= reward_model_figures(
            targets.chance.flatten(1),
            rollout.truth.ending.flatten(1),
            rollout.seen.terminated.flatten(1),
            targets.outcome.flatten(1),
        )
    return result


def reward_model_figures(
    chance: Tensor, ending: Tensor, ended: Tensor, outcome: Tensor
) -> dict[str, Tensor]:
    """A reward model against the truth, which the learner does not see. `[R]` each.

    From its chances of the first behavior, true behaviors, where an episode ended in one, and the
    outcomes as the learner saw them, `[R, B]` each.
    """
    wanted = (ending == 0).to(chance.dtype)
    figures = {}
    for kind, among in (
        ("unlabeled", ended & (outcome == UNLABELED)),
        ("labeled", ended & (outcome >= LABELED)),
    ):
        right = among & ((chance > 0.5) == (wanted > 0.5))
        figures[f"reward_model/accuracy_{kind}"] = right.sum(-1) / among.sum(-1)
        figures[f"reward_model/calibration_error_{kind}"] = calibration_error(chance, wanted, among)
    return figures


def calibration_error(chance: Tensor, happened: Tensor, among: Tensor, bins: int = 10) -> Tensor:
    """Expected calibration error: mean gap between foretold and actual rates over equal bins.

    Args:
        chance: `[R, B]` foretold probabilities.
        happened: `[R, B]`, 1 or 0.
        among: `[R, B]` bool, which count.
        bins: equal parts of [0, 1].

    Returns:
        `[R]`, nan where none count.
    """
    part = (chance * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(len(chance), bins, dtype=chance.dtype, device=chance.device)
    gap.scatter_add_(1, part, (chance - happened) * among)
    return gap.abs().sum(-1) / among.sum(-1)
