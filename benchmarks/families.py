"""The tables of docs/families.md, from the tables in the code: `make families`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; its names are those of `upcycle families --json`.
"""

import re
from pathlib import Path

from upcycle.architectures.listing import tables
from upcycle.disk import write_text

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str) -> str:
    """The page with every table made anew."""
    made = tables()
    return BLOCK.sub(lambda block: f"{block[1]}{made[block[2]].markdown()}{block[3]}", text)


if __name__ == "__main__":
    write_text(PAGE, page(PAGE.read_text(encoding="utf-8")))
