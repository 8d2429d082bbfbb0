"""xLLMs-100 in plain PyTorch: LLaMA and BLOOM taught to follow instructions in 100 languages."""

__version__ = "0.1.0"
