"""The paper's two data sets, built with translators and chat models (`python -m minixllm.building`).

Read `instructions` and `feedback` (the two builds), then `services` (who is asked), `runner` (asking many, remembering
all) and `filters` (what is left out, and why).
"""
