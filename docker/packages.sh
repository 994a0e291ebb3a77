#!/bin/sh
# Makes /opt/venv of one lock: what the lock names and nothing else, byte-compiled, with its SBOM.
set -eu
lock=$1
python3 -m venv --without-pip /opt/venv
# --no-deps: the lock is complete, and leaves out on purpose what this target never loads.
/opt/tools/bin/python -m pip --python /opt/venv/bin/python install \
  --no-cache-dir --no-compile --no-deps --require-hashes --requirement "$lock"
packages=$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo /opt/lightship > "$packages/lightship.pth"
# Checked against no time stamp: what copies an image's files may change those.
# (Some packages carry templates and tests that are no valid Python: told, and no reason to stop.)
/opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash "$packages" \
  || echo "not all files are Python; see above"
/opt/tools/bin/cyclonedx-py environment --output-reproducible --output-format JSON \
  --output-file /opt/venv/sbom.cdx.json /opt/venv/bin/python
python3 /build/sbom.py /opt/venv/sbom.cdx.json
