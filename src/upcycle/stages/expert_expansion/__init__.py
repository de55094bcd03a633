"""Stage 2 (UpIT, expert expansion): from n checkpoints to m experts, as a plan."""
