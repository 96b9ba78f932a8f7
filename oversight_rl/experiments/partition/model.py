"""A split autoencoder: the rules that route images to parts of its code, and what it learns by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from oversight_rl.agents.routing.primitive import route
from oversight_rl.experiments.partition.config import PartitionSettings


@dataclass(frozen=True)
class Method:
    """What one can train with."""

    summary: str
    routed: Callable[[int], bool] = lambda group: False
    """Whether images labeled with a group update the group's own part alone."""
    own_decoders: bool = False
    """Whether each part has a decoder, which labeled images of its group alone learn from."""
    assumes: str = "labels"

    def routes(self, groups: int) -> Tensor:
        """Weights of the gradient for each part, by group; the last row is for no label. [G + 1, G]

        Source: arXiv 2410.04332, section 4.1.
        """
        rows = [
            torch.eye(groups)[g] if self.routed(g) else torch.ones(groups) for g in range(groups)
        ]
        return torch.stack([*rows, torch.ones(groups)])


METHODS = {
    "routed": Method(
        "gradient routing: a labeled image's error updates its group's part only",
        lambda group: True,
    ),
    "one_group_routed": Method(
        "only images of the first group are routed; others update every part",
        lambda group: group == 0,
    ),
    "separate_decoders": Method(
        "no routing: each part has a decoder of its own, for images of its group", own_decoders=True
    ),
    "not_routed": Method("one autoencoder, penalties and all, no routing"),
}


class SplitAutoencoder(nn.Module):
    """An autoencoder whose code has a part for each of G groups.

    Args:
        settings: of the networks and the loss.
        pixels: of an image.
        groups: G.
        method: what it is trained with.
    """

    def __init__(
        self, settings: PartitionSettings, pixels: int, groups: int, method: Method
    ) -> None:
        super().__init__()
        self.settings, self.groups, self.own_decoders = settings, groups, method.own_decoders
        width = groups * settings.code
        sizes = [pixels, *settings.hidden, width]
        self.encoder = _mlp(sizes)
        count = groups if method.own_decoders else 1
        self.decoders = nn.ModuleList(_mlp(sizes[::-1]) for _ in range(count))
        self.register_buffer("routes", method.routes(groups), persistent=False)
        other = ~torch.eye(groups, dtype=torch.bool)
        between = other.repeat_interleave(settings.code, 0).repeat_interleave(settings.code, 1)
        self.register_buffer("between", between, persistent=False)

    routes: Tensor  # [G + 1, G]
    between: Tensor  # [width, width], whether units are of different parts

    def encode(self, images: Tensor) -> Tensor:
        """The code of images, by part. `[B, pixels]` -> `[B, G, units]`"""
        return self.encoder(images).unflatten(1, (self.groups, -1))  # type: ignore[no-any-return]

    def errors(self, code: Tensor, images: Tensor, group: Tensor) -> Tensor:
        """Mean absolute error of each restored image, `[B]`; its group is G where unknown.

        With decoders of their own, it is that of the image's group's; for no group, the mean.
        """
        restored = self.restore(code)  # [decoders, B, pixels]
        errors = (restored - images).abs().mean(-1).T  # [B, decoders]
        if not self.own_decoders:
            return errors[:, 0]
        shares = torch.eye(self.groups + 1, self.groups).to(code)
        shares[-1] = 1 / self.groups
        return (errors * shares[group]).sum(1)

    def restore(self, code: Tensor) -> Tensor:
        """What each decoder makes of codes `[B, G, units]`: `[decoders, B, pixels]`."""
        if not self.own_decoders:
            return self.decoders[0](code.flatten(1))[None]  # type: ignore[no-any-return]
        own = torch.eye(self.groups).to(code)[:, None, :, None]  # other parts are zero
        parts = [decoder((code * own[g]).flatten(1)) for g, decoder in enumerate(self.decoders)]
        return torch.stack(parts)

    def losses(self, images: Tensor, group: Tensor) -> dict[str, Tensor]:
        """Means over a batch: the error, routed; the code's size; correlation between parts."""
        code = self.encode(images)
        errors = self.errors(route(code, self.routes[group]), images, group)
        return {
            "error": errors.mean(),
            "size": code.abs().sum((1, 2)).mean(),
            "correlation": correlation(code.flatten(1))[self.between].abs().mean(),
        }

    def backward(self, batch: tuple[Tensor, Tensor], progress: float) -> dict[str, Tensor]:
        """Leave the gradient of a batch of images and their groups; returns its losses."""
        settings, losses = self.settings, self.losses(*batch)
        ramp = min(1.0, progress / settings.sparsity_ramp) if settings.sparsity_ramp else 1.0
        total = losses["error"] + ramp * settings.sparsity * losses["size"]
        (total + settings.correlation * losses["correlation"]).backward()
        return losses


def correlation(x: Tensor) -> Tensor:
    """Correlations of columns over rows; of one that does not vary, 0. `[B, n]` -> `[n, n]`"""
    x = x - x.mean(0)
    x = x / (x.square().sum(0) + 1e-8).sqrt()
    return x.T @ x


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of sizes, with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
