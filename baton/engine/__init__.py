"""Engines behind one interface. Only the `vllm_` modules import vllm; the simulated engine stands
beside theirs with equal rights."""
