"""Baton beside its peers, measured in one run on one machine: `scripts/bench.sh door | e2e`.

Not part of the product and not installed with it; it may import the product, never the reverse.
See README.md for the method, what each side does that the other does not, and the limits.
"""
