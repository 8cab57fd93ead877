"""The worker that computes prompts: KV and a first token out, KV held until it is fetched."""
