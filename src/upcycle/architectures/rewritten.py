"""The table of families whose weights are rewritten: the MoE architecture computes the same from other values.

`tests/architectures/test_families.py` compares the logits of every row.
"""

from upcycle.architectures.family import NO_BIAS, Family, plain_rope
from upcycle.architectures.layouts import FUSED, head_dim
from upcycle.architectures.moves import Rewrite, changed
from upcycle.architectures.rows import GLM_MOE, MIXTRAL, SPLIT_FFN, glm_moe, mixtral
from upcycle.types import Config


def _halves(config: Config) -> Rewrite:
    """Rows of a head that rotate in pairs 0-1, 2-3, ... in the order in which the first half rotates with the second."""
    dim = head_dim(config)
    rotated = int(dim * config["rope_parameters"].get("partial_rotary_factor", 1.0))
    order = [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, dim)]
    return Rewrite(lambda rows: rows.unflatten(0, (-1, dim))[:, order].flatten(0, 1), dim, permutes=True)


HALVES = tuple(changed(f"{part}_proj.{kind}", _halves) for part in "qk" for kind in ("weight", "bias"))
REORDERED = "the rows of queries and keys are reordered, for rotary positions by halves"

REWRITTEN = (
    Family("glm", GLM_MOE, glm_moe, layout=FUSED, moves=(*HALVES, SPLIT_FFN), note=REORDERED),
    Family("helium", MIXTRAL, mixtral, (*NO_BIAS, plain_rope), moves=HALVES, note=REORDERED),
)
"""Dense families and the MoE architecture that each becomes, as exact as `rows.ROWS`."""
