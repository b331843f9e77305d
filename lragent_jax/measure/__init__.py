"""What the benchmarks share: how time is taken, and attention's arguments at the shapes of a workload."""
