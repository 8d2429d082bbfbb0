"""Training: one loop for both stages.

Read `losses` (SFT, DPO and its kin), then `loop` (one step, and all of them). `held_out` measures; `checkpoints` and
`run_directory` are what makes a run resumable; `meter` says beforehand what a run will need.
"""
