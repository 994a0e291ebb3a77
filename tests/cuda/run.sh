#!/usr/bin/env bash
# The whole kit in LIMIT_S seconds (480): wheels, tests, then benchmarks with the time that is left.
# PARTS=NAME,NAME leaves the tests out and measures these parts alone. See README.md beside this.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} limit_s=${LIMIT_S:-480} site=$(mktemp -d)
export OUT=${OUT:-$PWD/build/cuda/out} PYTHONPATH=$PWD/src:$PWD:$site PYTHONUNBUFFERED=1
mkdir -p "$OUT"
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
	--target "$site" build/cuda/wheels/*.whl || exit
# Or the first command that is timed would compile W&B's modules.
"$python" -m compileall -q -j 0 "$site" &
code=0
if [ -z "${PARTS:-}" ]; then
	timeout --kill-after=5 $((limit_s * 2 / 5)) "$python" -m pytest -p no:cacheprovider --numprocesses="${WORKERS:-4}" \
		--timeout=120 --durations=10 tests/cuda 2>&1 | tee "$OUT/test-cuda.log" || code=1
fi
"$python" -m benchmarks.cuda --data build/cuda --budget-s $((limit_s - SECONDS)) ${PARTS:+--parts "$PARTS"} \
	2>"$OUT/bench-cuda.err" | tee "$OUT/bench-cuda.log" || code=1
tail -c 3000 "$OUT/bench-cuda.err"
exit $code
