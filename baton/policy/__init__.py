"""Decisions about where work goes. Facts in, a choice out: no sockets, no clocks, no engine.

The coordinator runs these objects live; simulations run the very same ones.
"""
