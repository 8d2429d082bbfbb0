"""The embedded default: data for all three scripts, made on the spot from Unicode CLDR.

`cldr` makes the instructions in 99 languages, `feedback` the pairs, `benchmarks` stand-ins for the five benchmarks.
"""
