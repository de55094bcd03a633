"""Stage 4 (UpIT, model upcycling): the MoE assembled, trained, exported."""
