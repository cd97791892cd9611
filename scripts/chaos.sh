#!/bin/sh
# Runs the campaigns: chaos.sh LENGTH JOBS [TEST...], as many at once as JOBS. Then it
# prints what they have found and writes it into README.
set -eu
length=$1 jobs=$2
shift 2
[ $# -gt 0 ] || set -- TestLeak TestLoss TestConverge
root=$PWD
logs=$root/.bin/chaos
mkdir -p "$logs"
# Without the race detector, which is slow: so more goes wrong in the same time.
go test -c -o "$logs/chaos.test" ./test/chaos
export WGCNI_CHAOS="$length" WGCNI_CHAOS_RESULTS="$logs" logs
rm -f "$logs"/*.json
status=0
# The path of the tests' files is relative to their package.
# shellcheck disable=SC2016 # for the inner shell
(cd test/chaos && printf '%s\n' "$@" | xargs -P "$jobs" -I{} sh -c '
	echo "{}: begins; its log is $logs/{}.log"
	{ "$logs/chaos.test" -test.v -test.count=1 -test.timeout=12h -test.run "^{}\$" 2>&1; echo "exit status $?"; } |
		tee "$logs/{}.log" | sed -un "s/^.*\(WGCNI_SEED=.*\)/{}: \1/p; s/^--- /{}: /p"
	# A test that is not there does not fail.
	grep -q "^--- PASS: {} " "$logs/{}.log" && grep -q "^exit status 0$" "$logs/{}.log" || { cat "$logs/{}.log"; exit 1; }
') || status=1
go run ./scripts/chaos "$logs" || status=1
exit $status
