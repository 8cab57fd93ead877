"""Measuring an engine's step times: `baton profile`."""
