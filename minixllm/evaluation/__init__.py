"""The paper's five benchmarks: from published files to its tables.

Read in the order an answer goes: `benchmarks` (files to items), `templates` (the instruction), `predict` (asking the
model), `answers` (what a free answer says), `scorers`, `significance`, `report`.
"""
