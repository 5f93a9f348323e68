#!/usr/bin/env bash
# Healthy: Ebbtide runs, and a run below $EBBTIDE_RUNS that has written since this container started has done so in the last
# $EBBTIDE_STALE_MIN minutes. Loading and compiling, before the first line, are not held against it.
set -euo pipefail
[[ $(tr '\0' ' ' <"/proc/${1:-1}/cmdline") == *ebbtide* ]]
mapfile -t journals < <(find "${EBBTIDE_RUNS:-/runs}" -maxdepth 3 -name '*.jsonl' -newer "${TMPDIR:-/tmp}/ebbtide-started")
((${#journals[@]} == 0)) && exit 0
[[ -n $(find "${journals[@]}" -mmin "-${EBBTIDE_STALE_MIN:-60}" -print -quit) ]]
