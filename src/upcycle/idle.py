"""Settings that another one leaves without effect: a recipe that has them would not do what it says."""

from collections.abc import Callable, Iterator
from typing import Any

Rule = tuple[str, Callable[[Any], bool], str]
"""Settings, the recipes in which they do nothing, and why."""

RULES: tuple[Rule, ...] = (
    (
        "expand.keep_base expand.num_checkpoints expand.select",
        lambda recipe: recipe.expand.copies_of != "none",
        "with expand.copies_of all experts are copies of one FFN",
    ),
    (
        "assemble.channels route.slice_noise posttrain.balance_over",
        lambda recipe: recipe.assemble.granularity == 1,
        "experts are not cut into slices (assemble.granularity is 1)",
    ),
    (
        "prepare.checkpoints",
        lambda recipe: not recipe.prepares,
        "nothing is taken from them with expand.copies_of=base and assemble.shared=base",
    ),
    ("posttrain.experts_rate", lambda recipe: recipe.posttrain.freeze == "experts", "posttrain.freeze is experts"),
    ("posttrain.shared_rate", lambda recipe: recipe.posttrain.freeze == "shared", "posttrain.freeze is shared"),
)


def without_effect(recipe: Any) -> Iterator[str]:
    """What is wrong with each setting that is not at its default and does nothing."""
    for names, idles, why in RULES:
        if not idles(recipe):
            continue
        for name in names.split():
            section, field = name.split(".")
            settings = getattr(recipe, section)
            value, default = getattr(settings, field), type(settings).model_fields[field].default
            if value != default:
                yield f"{name} is {value}, which has no effect: {why}; leave it out, or set it to {default}"
