"""What a run's base was when its MoE was assembled: its folder may be gone, or named from another place, later."""

from upcycle.records.record import Record

Licence = dict[str, str | list[str]]
"""Fields of a model card to what they say, a text or several."""


class Origin(Record):
    """Where the base came from, and what it may be used for."""

    on_hub: bool
    """Whether the recipe names it as the hub does."""
    licence: Licence
    """What its own model card says; empty: nothing."""
