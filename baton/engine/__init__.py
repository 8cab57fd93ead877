"""Engines behind one interface. `vllm_engine` is the only module that imports vllm; the simulated
engine stands beside it with equal rights."""
