"""Files <-> weights, in Hugging Face's formats.

Read `hf_directory` (config.json and tensors to a model and back), then `safetensors_files` below it, and `adapters`
(PEFT's files).
"""
