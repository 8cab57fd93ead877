"""An engine without a model: `baton/simulation` in real time, hand-offs by the machines of the real one."""
