#!/bin/sh
# Runs all tests and says how many passed; a test that skipped itself is a failure here.
set -eu
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# tests NAME ARGUMENTS...: go test, one package after another; false if a test fails.
tests() {
	name=$1
	shift
	go test -race -json -p 1 -timeout 25m "$@" >"$logs/$name"
}

# Two lanes of about the same length, one for each core of the smallest machine. What
# is run with clusters makes its own namespaces, and has nothing of the other's.
large=./test/operate
small=$(go list ./... | grep -v -e '/test/e2e$' -e '/test/operate$')
{
	status=0
	tests e2e-1 -run '^Test[A-DF-M]' "$@" ./test/e2e || status=1
	tests large "$@" $large || status=1
	exit $status
} &
lane=$!
status=0
tests e2e-2 -run '^Test[^A-DF-M]' "$@" ./test/e2e || status=1
# shellcheck disable=SC2086 # a list
tests small "$@" $small || status=1
# A module of its own. It has nothing that runs beside something else, and with the
# race detector it takes minutes to build.
(cd test/kubernetes && go test -json -timeout 25m "$@" ./... >"$logs/kubernetes") || status=1
wait $lane || status=1
cat "$logs"/* | go run ./scripts/testsummary || status=1
exit $status
