#!/bin/bash
# uml.sh [-t SECONDS] [-m MiB] KERNEL COMMAND [ARGS...] -- runs a command as root
# under a user-mode Linux kernel, an ordinary process: in the same folder and
# with the same files, but what it writes is written to the guest's memory. Its
# output comes on stdout, its exit status is ours (124: timed out, 125: no guest).
# UML_MODE is added to the kernel's command line.
set -uo pipefail
here=$(realpath "$(dirname "$0")")
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$here/lib.sh"
guest_options "$@"
shift $((OPTIND - 1))
[ $# -ge 2 ] || { echo "usage: uml.sh [-t SECONDS] [-m MiB] KERNEL COMMAND [ARGS...]" >&2; exit 2; }
kernel=$(realpath "$1")
shift
work=$(mktemp -d /tmp/wgcni-uml.XXXXXX)
guest=
trap 'rm -rf "$work"' EXIT
trap 'kill "$guest" 2>/dev/null; wait "$guest"; exit 130' INT TERM
command_file "$@" >"$work/command"
# The guest's memory is a file in TMPDIR. Its tty1 is our stdout, which is
# descriptor 3 there, and its console, with the kernel's log, goes to a file.
# Without rcu_expedited it takes 20 s to delete an interface with 1,000 peers.
# shellcheck disable=SC2086 # UML_MODE is a list of words
TMPDIR=/dev/shm setpriv --pdeathsig TERM timeout -k 5 "$limit" "$kernel" uml_dir="$work/" mem="${memory}M" ${UML_MODE:-} \
	root=/dev/root rootfstype=hostfs rootflags=/ ro init="$here/uml-init" wgcni_run="$work" \
	con=null con0=null,fd:1 con1=null,fd:3 quiet panic=-1 rcupdate.rcu_expedited=1 \
	3>&1 </dev/null >"$work/console" 2>&1 &
guest=$!
wait "$guest"
status=$?
if [ "$status" = 124 ] || [ "$status" = 137 ]; then
	echo "uml.sh: timed out after $limit s" >&2
	exit 124
fi
if [ ! -s "$work/status" ]; then
	echo "uml.sh: the guest ended without an exit status ($status); its last words:" >&2
	tail -30 "$work/console" >&2
	exit 125
fi
exit "$(cat "$work/status")"
