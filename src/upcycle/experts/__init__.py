"""What an expert can be: whole FFNs, LoRA adapters, bottlenecks. `kinds.KINDS` has a row for each.

Nothing outside of this room, but the settings' own validation, asks which kind a run has.
"""
