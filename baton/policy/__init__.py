"""Decisions about where work goes. Facts in, a choice out: no sockets, no clocks, no engine.

The coordinator runs these objects live; simulations run the very same ones.

    ledger         what each worker still has to do, as columns
    base           candidates, the Policy interface, and how a choice falls
    registry       every policy by name; each lives in its own file beside it
    room           decode placement: capacity first
    prefix_hash    a prompt as chained block hashes
    kv_index       who holds which prefix, fed by the engines' KV events
    kv_feed        those events in order: gaps, replays, restarts
    expectations   prefixes on their way: prompts just routed
    hotspot        the guard against one prefix drowning its holders
    router         all of the above as the two choices for one request
    explain        a choice as a record; the record decided again
"""
