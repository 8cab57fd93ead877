"""Compiled with numba: the inner loops of the simulator. Plain arrays in, plain arrays out.

Everything here is also written a second time, slowly and token by token, in tests/placement: the two
must agree to 1e-9. Compiled code is cached beside the sources, so only the first run pays for it.
"""
