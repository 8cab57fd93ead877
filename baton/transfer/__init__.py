"""Moves KV between engines. `nixl_*` modules are the only ones that import nixl and vLLM's
connector classes, and are loaded by vLLM inside its engine processes; `lease` is pure."""
