#!/bin/sh
# Installs those Debian packages whose commands are missing. Nothing else is changed.
set -eu
missing=
need() { # COMMAND PACKAGE
	PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need ip iproute2
need nsenter util-linux
need nft nftables
need iptables iptables
need wg wireguard-tools
need iperf3 iperf3
need gcc gcc # the race detector
[ -e /usr/include/stdlib.h ] || missing="$missing libc6-dev"
[ -n "$missing" ] || exit 0
command -v apt-get >/dev/null 2>&1 || { echo "deps: install these with your package manager:$missing" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "deps: run as root, or install:$missing" >&2; exit 1; }
echo "installing$missing"
apt-get update -q >/dev/null
# shellcheck disable=SC2086 # a list of words
DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $missing >/dev/null
