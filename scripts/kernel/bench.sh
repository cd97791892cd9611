#!/bin/bash
# bench.sh [FLAGS] -- measures throughput with the kernel's WireGuard: plain, by
# wgcni, and set up by hand, in one guest of user-mode Linux 7.2 and then of 6.12.
# The kernel's ciphers run there without assembly: only ratios mean anything.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d "${TMPDIR:-/tmp}/wgcni-kernel.XXXXXX")
trap 'rm -rf "$work"' EXIT
CGO_ENABLED=0 go build -o "$work/bench" ./test/bench
export WGCNI_SLOW=4
for version in 7.2 6.12; do
	kernel=$(scripts/kernel/build.sh $version)
	mode=
	[ $version = 6.12 ] || mode='seccomp=on ncpus=2' # 6.12 has one CPU
	# The guest's output is a terminal, on which bench would redraw its progress.
	# shellcheck disable=SC2016 # expanded in the guest
	UML_MODE=$mode scripts/kernel/uml.sh -t 1200 -m 2048 "$kernel" bash -c '"$@" 2> >(cat)' bash "$work/bench" --sections throughput "$@"
done
