"""Names of tensors that are asked for by name."""

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BACKBONE_EMBEDDINGS = "backbone.embeddings.weight"
"""Of Nemotron-H."""
EMBEDDING_NAMES = EMBEDDINGS, BACKBONE_EMBEDDINGS
