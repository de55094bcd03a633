"""What base and data of a run were when its MoE was assembled: later they may be gone, or named from another place."""

from upcycle.records.record import Record

Licence = dict[str, str | list[str]]
"""Fields of a model card to what they say, a text or several."""


class Origin(Record):
    """Where the base came from, and what it may be used for."""

    on_hub: bool
    """Whether the recipe names it as the hub does."""
    licence: Licence
    """What its own model card says; empty: nothing."""
    data: list[str]
    """What the training data are called: files and folders without where they lie."""
