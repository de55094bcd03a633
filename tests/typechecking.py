"""The check that conftest puts on every function of the package."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int will do for a float, as everywhere in Python."""
