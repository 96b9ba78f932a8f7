"""A small language model: a transformer that reads words and foretells the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal, with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, width]
        b, t, width = x.shape
        query, key, value = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(b, t, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and an MLP with one hidden layer, each on the normalized stream."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """Words in, a score for each word that could be next out."""

    def __init__(
        self, words: int, length: int, *, width: int, hidden: int, heads: int, layers: int
    ) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, hidden, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words)

    def embed(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, width]
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.word(ids) + self.place(places[None])  # type: ignore[no-any-return]

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, words]
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def story_losses(model: nn.Module, ids: Tensor, opening: int) -> Tensor:
    """Mean loss of each story's words after its opening, nats for each word.

    Args:
        model: scores of next words `[B, T, words]`.
        ids: words of stories `[B, T]`.
        opening: how many words are given.

    Returns:
        `[B]`.
    """
    scores = model(ids[:, :-1])[:, opening - 1 :]
    return F.cross_entropy(scores.transpose(1, 2), ids[:, opening:], reduction="none").mean(1)


@torch.no_grad()
def tell(model: nn.Module, opening: Tensor, length: int) -> Tensor:
    """Go on with stories, taking the likeliest word each time.

    Args:
        model: as for `story_losses`.
        opening: `[B, t]`.
        length: words of a story.

    Returns:
        `[B, length]`.
    """
    ids = opening
    while ids.shape[1] < length:
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids
