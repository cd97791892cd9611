#!/bin/sh
# Runs all tests and says how many passed; a test that skipped itself is a failure here.
set -eu
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
# The longest package first, so that the others run beside it.
go test -race -json -timeout 25m "$@" ./test/e2e ./... >"$log" || status=$?
# A module of its own. It has nothing that runs beside something else, and with the
# race detector it takes minutes to build.
(cd test/kubernetes && go test -json -timeout 25m "$@" ./...) >>"$log" || status=$?
go run ./scripts/testsummary <"$log" || status=1
exit $status
