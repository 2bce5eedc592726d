"""What users call: attention, with a kv cache, merge, rotary embedding, warmup, explain."""
