"""Stage 3 (UpIT, router initialization): seed data to experts, and the router started from them."""
