"""Dense architectures and the MoE architecture that each becomes: families, where tensors lie, proof of exactness."""
