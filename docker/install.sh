#!/usr/bin/env bash
# Installs a lock into /opt/ebbtide: each package by its hash, nothing that the lock does not have, not even for a build.
# With no lock given, Ebbtide itself from this folder.
set -euo pipefail
home=${EBBTIDE_HOME:-/opt/ebbtide}
pip=(python -m pip --python "$home/bin/python" install --quiet --no-deps --no-build-isolation)

if (($# == 0)); then
  "${pip[@]}" .
  exit
fi
# what the others are built with comes first
first=$(mktemp)
sed -n '/^setuptools==/,/[^\\]$/p' "$1" >"$first"
"${pip[@]}" --require-hashes --requirement "$first"
"${pip[@]}" --require-hashes --requirement "$1"
