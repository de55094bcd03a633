"""Routers of a MoE as modules: found, replaced, recorded; the load of experts; the loss of an answer."""
