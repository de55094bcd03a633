"""Model folders: safetensors read and written as streams, configurations, tokenizers, hashes."""
