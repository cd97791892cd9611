#!/bin/bash
# test.sh -- runs the end-to-end tests, and those of pkg/kernel, under kernels
# that have WireGuard: all of them under user-mode Linux 7.2 and 6.12, which
# remove allowed IPs in different ways, and the core of them under the kernel
# that Debian ships. All is built outside of the guests. With WGCNI_SHORT set,
# 6.12 has the core as well, and what moves single allowed IPs.
set -euo pipefail
cd "$(dirname "$0")/../.."
# Pods' traffic in both directions, what happens without a tunnel, the verbs.
core='TestAllPodsReachAllPods TestNoPlaintextWhileTunnelIsGone TestTunnelIsRestarted TestHelperRestartLosesNothing
TestPlaintextFromANodeThatHasNotJoined TestADD TestCHECK TestDELWithoutAnything TestNothingIsLeft'
moves='TestPodsOutsideThePrefixAreAnnounced TestPodMovesThereAndBack TestPodsSwap'
coreKernel='TestSingleAllowedIPsAreRemoved TestRemoveAllowedIP TestRandomWalkLeavesForeignObjectsAlone TestRepairs TestPresharedKeysMustMatch'
# Where the tunnel is the kernel's: what a container of a DaemonSet may do is enough,
# and what operators are told is so.
operate='TestDaemonSet TestAQuietNodeLogsNothing TestDoctorHealthy TestVerifyEncrypted TestVerifySeesPlaintext TestMetrics'
limit=1500 # seconds, for each guest

work=$(mktemp -d "${TMPDIR:-/tmp}/wgcni-kernel.XXXXXX")
finish() {
	for job in $(jobs -rp); do
		kill -- "-$job" 2>/dev/null || true
	done
	wait
	rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM
set -m # a job is a process group, which can be ended as a whole

echo "getting kernels"
uml72=$(scripts/kernel/build.sh 7.2)
uml612=$(scripts/kernel/build.sh 6.12)
debian=$(scripts/kernel/debian.sh)

echo "building tests"
CGO_ENABLED=0 go test -c -o "$work/e2e" ./test/e2e
CGO_ENABLED=0 go test -c -o "$work/operate" ./test/operate
CGO_ENABLED=0 go test -c -o "$work/kernel" ./pkg/kernel
go test -race -c -o "$work/kernel-race" ./pkg/kernel
go build -o "$work/testsummary" ./scripts/testsummary
test2json=$(go tool -n test2json)
module=$(go list -m)

# guest NAME COMMAND... runs a command under a kernel. One CPU each: two that
# spin for each other's locks are slow on a busy machine.
guest() {
	local name=$1
	shift
	case $name in
	linux-7.2) WGCNI_SLOW=4 UML_MODE=seccomp=on scripts/kernel/uml.sh -t $limit -m 3072 "$uml72" "$@" ;;
	linux-6.12) WGCNI_SLOW=4 scripts/kernel/uml.sh -t $limit -m 3072 "$uml612" "$@" ;;
	debian) WGCNI_SLOW=10 scripts/kernel/qemu.sh -t $limit -m 3072 "$debian" "$@" ;;
	esac
}

# attempt NAME PART FOLDER BINARY TESTS runs tests in a guest, and sets left to
# those that did not pass.
attempt() {
	local name=$1 part=$2 folder=$3 binary=$4 tests=$5 out=$work/$1/$2
	guest "$name" env --chdir="$PWD/$folder" "$work/$binary" -test.v=test2json -test.timeout "$((limit - 60))s" \
		-test.run "^(${tests// /|})\$" 2>"$out.errors" | tee "$out.log" |
		"$test2json" -t -p "$module/$folder" >"$out.json" || true
	left=$( (tr ' ' '\n' <<<"$tests" && sed -n 's/.*"Action":"pass".*"Test":"\([^"/]*\)".*/\1/p' "$out.json") | sort | uniq -u | xargs)
	[ ! -s "$out.errors" ] || { cat "$out.errors" && tail -20 "$out.log"; } >&2 # what the guest was at when it ended
}

# part NAME PART FOLDER BINARY [TESTS] runs a part of a package's tests, and once
# more what did not pass: an emulated computer stands still now and then, for
# longer than a test can wait, and what fails for another reason fails again.
part() {
	local name=$1 part=$2 folder=$3 binary=$4 tests=${5:-} out=$work/$1/$2 start=$SECONDS left
	[ -n "$tests" ] || tests=$(names "$("$work/$binary" -test.list '^Test')")
	attempt "$name" "$part" "$folder" "$binary" "$tests"
	if [ -n "$left" ]; then
		echo "$name: $part: once more after $((SECONDS - start)) s: $left"
		cat "$out.json" >>"$work/first-attempts"
		grep -E '"Test":' "$out.json" | grep -vE "\"Test\":\"(${left// /|})[\"/]" >"$out.passed" || true
		mv "$out.passed" "$out.json"
		attempt "$name" "$part-again" "$folder" "$binary" "$left"
	fi
	if [ -n "$left" ]; then
		echo "$name: $part FAILED after $((SECONDS - start)) s: $left"
		touch "$work/failed"
		return
	fi
	echo "$name: $part passed after $((SECONDS - start)) s"
}

# start runs a part beside others, one for each of the machine's CPUs.
start() {
	while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do
		wait -n || true
	done
	part "$@" &
}

names() { xargs <<<"$*"; } # on one line

echo "running tests"
for name in linux-7.2 linux-6.12 debian; do
	mkdir "$work/$name"
	guest "$name" uname -rv >"$work/$name/release"
done
all=$("$work/e2e" -test.list '^Test')
for test in $core $moves; do
	grep -qx "$test" <<<"$all" || { echo "test.sh: there is no $test any more" >&2; exit 1; }
done
start debian core test/e2e e2e "$(names "$core")"
parts=8
for ((i = 0; i < parts; i++)); do
	tests=$(awk -v i=$i -v n=$parts 'NR % n == i' <<<"$all")
	start linux-7.2 "e2e-$((i + 1))" test/e2e e2e "$(names "$tests")"
	[ -n "${WGCNI_SHORT:-}" ] || start linux-6.12 "e2e-$((i + 1))" test/e2e e2e "$(names "$tests")"
done
[ -z "${WGCNI_SHORT:-}" ] || start linux-6.12 core test/e2e e2e "$(names "$core $moves")"
start linux-7.2 operate test/operate operate "$(names "$operate")"
start debian kernel pkg/kernel kernel "$(names "$coreKernel")"
start linux-7.2 kernel pkg/kernel kernel-race
start linux-6.12 kernel pkg/kernel kernel # which has no room for the race detector's memory
while [ -n "$(jobs -rp)" ]; do
	wait -n || true
done

if [ -e "$work/first-attempts" ]; then
	printf '\nwhat failed at the first attempt:\n'
	"$work/testsummary" <"$work/first-attempts" || true
fi
for name in linux-7.2 linux-6.12 debian; do
	printf '\n%s: Linux %s\n' "$name" "$(cat "$work/$name/release")"
	cat "$work/$name"/*.json | "$work/testsummary" || touch "$work/failed"
done
# way NAME WAY sees that allowed IPs were removed in this way.
way() {
	grep -q "\"Action\":\"pass\".*\"Test\":\"TestSingleAllowedIPsAreRemoved/$2\"" "$work/$1"/kernel*.json && return
	echo "test.sh: no allowed IP was removed $2 under $1" >&2
	touch "$work/failed"
}
way linux-7.2 by_flag
way linux-6.12 by_decoy
way debian by_decoy
[ ! -e "$work/failed" ]
