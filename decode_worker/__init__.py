"""The worker that fetches a prompt's KV and generates the rest of the tokens."""
