"""What the two worker roles share: one process around one engine, in a conversation with one
coordinator. Decisions (`legs`, `registration`) do no I/O; `runtime` carries them out; `process`
owns the event loop, the signals and the exit code.
"""
