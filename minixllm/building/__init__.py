"""The paper's two data sets, built with translators and chat models (`python -m minixllm.building`).

Read `instructions` and `feedback` (the two builds), then `services` (who is asked), over `endpoint` (HTTP) and
`replies` (what their answers are worth), `runner` (asking many, remembering all) and `filters` (what is left out, and
why). `estimate` is the dry run, `reports` the tables of report.md.
"""
