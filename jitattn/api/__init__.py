"""Public functions: attention, KV cache, merge, rotary embedding, warmup, explain."""
