"""Many runs: comparisons, sweeps, benchmarks, and their statistics."""
