"""The architectures in plain PyTorch, each whole in one file, and what they are made of.

Read `llama` or `bloom` from its last class upwards, with `attention` (documents laid end to end, and who sees whom).
Then `token_logps` (the head, without holding all logits) and `lora`. For speed in generation: `kv_cache`, `fused_cpu`.
"""
