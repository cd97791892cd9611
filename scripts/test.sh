#!/bin/sh
# Runs all tests and says how many passed; a test that skipped itself is a failure here.
set -eu
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
go test -race -json -timeout 25m "$@" ./... >"$log" || status=$?
go run ./scripts/testsummary <"$log" || status=1
exit $status
