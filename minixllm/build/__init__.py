"""Building the data sets: instructions in 100 languages, cross-lingual feedback in 30, and the demo set."""
