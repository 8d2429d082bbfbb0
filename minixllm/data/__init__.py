"""From files of records to the batches of a training step.

Read in the order a record goes: `records` (what a file holds), `prompts` (what the model is shown), `datasets` (token
ids and labels), `token_cache` (kept on disk), `stream` (packed into the batches of a step).
"""
