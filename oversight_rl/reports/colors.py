"""How methods and endings look, in all figures and pages.

Families of methods are told apart by hue, members by dash and marker. The hues
are told apart by people with deuteranopia, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from zlib import crc32

INK = "#010203"  # stands for the color of the page's text in figures
ROUTING, ABLATION, NAIVE, FILTERING = "#1450f0", "#518fff", "#964b0f", "#b01aa3"
REWARD_MODEL, WEIGHTING, ORACLE, OTHER = "#00aa66", "#b38a00", "#566565", "#cc70ae"
FAMILIES = (ROUTING, ABLATION, NAIVE, FILTERING, REWARD_MODEL, WEIGHTING, ORACLE, OTHER)
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
WANTED, TIMEOUT = ("#0f766e", "#5eb8ad"), "#d5dae1"  # shades of endings: flagged, and not
UNWANTED = (("#6d28d9", "#a78bda"), ("#b45309", "#e3b071"), ("#be185d", "#e58ab5"))
UNLABELED = "#8e99a8"  # of lines beside those of endings
DIVERGING = "PuOr"  # colormap of chances: its ends differ for everyone


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    color: str
    dash: str = DASHES[0]
    marker: str = MARKERS[0]

    def variant(self, number: int) -> Style:
        """The same method under other settings."""
        return replace(self, dash=DASHES[(DASHES.index(self.dash) + number) % len(DASHES)])


def _family(color: str, *names: str) -> dict[str, Style]:
    """Members of a family, at most four."""
    looks = zip(names, DASHES, MARKERS, strict=False)
    return {name: Style(color, dash, marker) for name, dash, marker in looks}


STYLES = {
    **_family(
        ROUTING, "routing", "contrastive_routing", "imputed_routing", "imputed_routing_plain"
    ),
    **_family(ABLATION, "no_routing", "no_gate", "random_module"),
    **_family(NAIVE, "naive", "naive_early_stop", "naive_oracle_stop"),
    **_family(FILTERING, "filtering", "filtering_hidden_flag", "oracle_filtering"),
    **_family(REWARD_MODEL, "reward_model", "reward_model_plain"),
    **_family(WEIGHTING, "ipw_hidden_flag"),
    **_family(ORACLE, "oracle"),
    "routing_mixed": Style(ROUTING, ":", "D"),
    "adapter_routing": Style(ROUTING, "-.", "v"),
    "published_routing": Style(ROUTING, "--", "P"),
    "random_ablation": Style(ABLATION, "-", "D"),
    "base": Style(NAIVE, "-", "D"),
    "filter": Style(FILTERING, "-", "D"),
    "strict_filter": Style(FILTERING, "--", "v"),
    "gradient_difference": Style(WEIGHTING, "-", "D"),
    "rmu": Style(WEIGHTING, "--", "v"),
    "perfect_filter": Style(ORACLE, "-", "D"),
}


def style_of(method: str) -> Style:
    """How a method is drawn: as the table says, or else as its name alone decides."""
    if method in STYLES:
        return STYLES[method]
    number = crc32(method.encode())
    dash, marker = number % len(DASHES), number // len(DASHES) % len(MARKERS)
    return Style(OTHER, DASHES[dash], MARKERS[marker])
