#!/bin/sh
# Installs those Debian packages whose commands are missing. Nothing else is changed.
# `deps.sh test` is about what the tests need beside the demo, `deps.sh kernel` about
# the guests of scripts/kernel alone, `deps.sh bench` about the proxies that `wgcnid
# endpoint` is measured beside.
set -eu
missing=
need() { # COMMAND PACKAGE
	PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
case ${1:-} in
kernel)
	need make make
	need bc bc
	need bison bison
	need flex flex
	need perl perl
	need xz xz-utils
	need cpio cpio
	need setpriv util-linux
	need qemu-system-x86_64 qemu-system-x86
	grep -q '^VERSION_ID="12"' /etc/os-release || # whose qemu has it
		PATH=$PATH:/usr/libexec need virtiofsd virtiofsd
	;;
test)
	need gcc gcc # the race detector
	[ -e /usr/include/stdlib.h ] || missing="$missing libc6-dev"
	need containerd containerd
	need runc runc
	need chromium chromium
	need promtool prometheus
	;;
bench)
	need haproxy haproxy
	need nginx nginx-light
	[ -e /usr/lib/nginx/modules/ngx_stream_module.so ] || missing="$missing libnginx-mod-stream"
	;;
*)
	need ip iproute2
	need nsenter util-linux
	need nft nftables
	need iptables iptables
	need wg wireguard-tools
	need wg-quick wireguard-tools
	need ping iputils-ping
	need iperf3 iperf3
	;;
esac
[ -n "$missing" ] || exit 0
command -v apt-get >/dev/null 2>&1 || { echo "deps: install these with your package manager:$missing" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "deps: run as root, or install:$missing" >&2; exit 1; }
echo "installing$missing"
# What comes with a service shall not start it: see invoke-rc.d(8).
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
	trap 'rm -f $policy' EXIT
	printf '#!/bin/sh\nexit 101\n' >$policy
	chmod 755 $policy
fi
apt-get update -q >/dev/null
# shellcheck disable=SC2086 # a list of words
DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $missing >/dev/null
