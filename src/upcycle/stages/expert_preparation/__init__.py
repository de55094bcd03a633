"""Stage 1 (UpIT, expert preparation): checkpoints of one instruction-tuning run."""
