#!/usr/bin/env bash
# The quarter of an hour that a borrowed GPU gives, used whole: bash bench/gpu.sh OUTPUT (see bench/gpu.py).
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 -m bench.gpu "${1:-runs/gpu}"
