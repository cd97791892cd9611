#!/bin/sh
# Runs golangci-lint VERSION, which is built once into the user's cache.
set -eu
version=$1; shift
dir=${XDG_CACHE_HOME:-$HOME/.cache}/wgcni/golangci-lint-$version
[ -x "$dir/golangci-lint" ] || GOBIN=$dir go install "github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$version"
exec "$dir/golangci-lint" "$@"
