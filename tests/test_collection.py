"""What is collected does not depend on when, where or in what order Python's sets come: workers of one run compare it."""

import os
import subprocess
import sys

from conftest import ROOT

LATER = """
import sys, time, pytest
clock, later = time.time, float(sys.argv[1])
time.time = lambda: clock() + later
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "--strict-config", "tests"]))
"""


def test_the_same_tests_under_another_hash_seed_and_clock():
    collections = [
        subprocess.Popen([sys.executable, "-c", LATER, later], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                         env={**os.environ, "PYTHONHASHSEED": seed})
        for seed, later in (("1", "0"), ("2", "86400.5"))]
    (first, _), (second, _) = (collection.communicate(timeout=600) for collection in collections)
    names = [[line for line in text.splitlines() if "::" in line] for text in (first, second)]
    assert len(names[0]) > 1000 and names[0] == names[1], sorted(set(names[0]) ^ set(names[1]))
