#!/bin/sh
# Make the virtual environment $1 with sparsify and all its extras in it. Run by make; safe to run again.
set -eu
venv=$1
here=$(dirname "$0")/..

python=
for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        python=$name
        break
    fi
done
[ -n "$python" ] || { echo "error: Python 3.11 or newer is needed" >&2; exit 1; }

# A CUDA machine keeps the torch it has, if sparsify supports it; else it gets one of the supported range. Without
# CUDA the version is pinned to one that has a CPU build: an unpinned torch would bring gigabytes of CUDA.
supported='import sys, torch; sys.exit(not (torch.cuda.is_available() and (2, 11) <= tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15)))'
options= torch= extras=models,cli,onnx,dev
if ! ls /dev/nvidia[0-9]* >/dev/null 2>&1; then
    torch='torch==2.13.0' extras=$extras,interpreter
elif "$python" -c "$supported" 2>/dev/null; then
    options=--system-site-packages
else
    torch='torch>=2.11,<2.15'
fi

echo "setting up $venv ($("$python" --version)); minutes the first time" >&2
[ -x "$venv/bin/python" ] || "$python" -m venv $options "$venv" || {
    echo "error: '$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 1
}
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check --no-input "$@"; }
[ -z "$torch" ] || pip install "$torch"
pip install --editable "$here[$extras]"
"$venv/bin/python" -c 'import torch; print("ready: torch", torch.__version__)' >&2
