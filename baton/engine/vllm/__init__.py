"""vLLM as one of our engines: how it is set up, started, driven and scheduled. Nothing else imports vllm but
our connectors (`baton/transfer/nixl_*`)."""
