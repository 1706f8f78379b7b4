#!/usr/bin/env bash
# Creates the virtual environment from the lock file. An error names each missing tool and the package to install.
set -euo pipefail
venv=$1
fail() { echo "error: $1" >&2; exit 1; }

for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
done
[ -n "${python:-}" ] || fail "Python 3.11 or newer is required, but python3 is $(python3 --version 2>&1 || true); install python3 (Debian 12 and newer have it: apt install python3 python3-venv)"
"$python" -c 'import ensurepip' 2>/dev/null || fail "Python's venv module is missing; install it: apt install python3-venv"
command -v git >/dev/null || fail "git was not found; install it: apt install git"

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r infra/uv.txt
export VIRTUAL_ENV=$venv
echo "installing the locked packages into $venv (about 8 GB)"
"$venv/bin/uv" pip sync --quiet --require-hashes requirements.lock infra/uv.txt
"$venv/bin/uv" pip install --quiet --no-deps --no-build-isolation --editable .
# DVC's default is /var/tmp/dvc, where other users can place pickles that DVC loads. This setting is for `dvc` on the
# command line; the flows set DVC_SITE_CACHE_DIR.
if [ -d .dvc ]; then
    "$venv/bin/dvc" config --local core.site_cache_dir "$("$venv/bin/python" -c 'import os, flows; print(os.environ["DVC_SITE_CACHE_DIR"])')"
fi
