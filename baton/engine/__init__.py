"""Engines behind one interface. `vllm/` alone imports vllm; the simulated engine stands beside
it with equal rights."""
