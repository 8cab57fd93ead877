"""Streaming hand-off as decisions: hold, reserve, write, activate, release. No I/O.

`source` is the prefill worker's half, `destination` the decode worker's. Each takes facts and the time
and gives actions; the connector in `baton.transfer` carries them out on NIXL, tests carry them out on a
network that loses, repeats and reorders. `moves` has the legal moves of both, `credits` the line in
which hand-offs wait for blocks, `timing` how long
anybody waits for anything else. May import `baton.contract` only.
"""
