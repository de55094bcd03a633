"""What a finished model is, and what it does with a text, as reports show it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Description:
    """Of a MoE's folder."""

    what: str
    """`A mixtral mixture of 8 experts, top-2`"""
    plain: bool
    """Whether transformers loads it; otherwise it needs its base and upcycle."""
    folds: bool = False
    """Whether `upcycle export --fold` makes a plain MoE of it."""
    warnings: tuple[str, ...] = ()
    """Of programs that compute something else with it."""


@dataclass(frozen=True)
class RoutedText:
    """A sample text with the routing of every layer."""

    domain: str
    tokens: list[str]
    experts: list[list[int]]
    """Per layer each token's first choice."""
