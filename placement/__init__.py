"""The offline planner: which parallelism and how many workers for each phase. No GPU, no engine."""
