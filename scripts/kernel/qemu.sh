#!/bin/bash
# qemu.sh [-t SECONDS] [-m MiB] DIR COMMAND [ARGS...] -- as uml.sh, with the
# kernel that debian.sh has put into DIR, under qemu's software emulation.
set -uo pipefail
here=$(realpath "$(dirname "$0")")
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$here/lib.sh"
guest_options "$@"
shift $((OPTIND - 1))
[ $# -ge 2 ] || { echo "usage: qemu.sh [-t SECONDS] [-m MiB] DIR COMMAND [ARGS...]" >&2; exit 2; }
dir=$(realpath "$1")
shift
work=$(mktemp -d /tmp/wgcni-qemu.XXXXXX)
guest='' files=''
trap 'kill $guest $files 2>/dev/null; wait $guest $files 2>/dev/null; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
# A second archive behind the first says what to run.
mkdir "$work/run"
command_file "$@" >"$work/run/command"
printf 'KERNEL=%q\n' "$dir" >"$work/run/environment"
(cat "$dir/initrd.gz" && cd "$work/run" && printf 'command\nenvironment\n' | cpio -o -H newc --quiet -R 0:0 | gzip -1) >"$work/initrd"

for virtiofsd in /usr/lib/qemu/virtiofsd /usr/libexec/virtiofsd; do
	[ ! -x "$virtiofsd" ] || break
done
setpriv --pdeathsig TERM "$virtiofsd" --socket-path="$work/files" -o source=/ -o cache=always -o sandbox=chroot >"$work/virtiofsd.log" 2>&1 &
files=$!
for _ in $(seq 200); do
	[ ! -S "$work/files" ] || break
	sleep 0.05
done
# A stdin that never ends: at its end qemu would unplug the port, and the guest's writes block.
mkfifo "$work/stdin"
exec 8<>"$work/stdin"
# qemu64: the emulation of a CPU with all that qemu knows is 3 to 5 times slower.
setpriv --pdeathsig TERM timeout -k 5 "$limit" qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot \
	-machine q35,memory-backend=memory -accel tcg,thread=multi -cpu qemu64 -smp 2 -m "$memory" \
	-object "memory-backend-memfd,id=memory,size=${memory}M,share=on" \
	-serial "file:$work/console" -device virtio-serial-pci \
	-chardev stdio,id=out,signal=off -device virtserialport,chardev=out,name=out -device virtio-rng-pci \
	-chardev "socket,id=files,path=$work/files" -device vhost-user-fs-pci,chardev=files,tag=host \
	-kernel "$dir/vmlinuz" -initrd "$work/initrd" \
	-append "console=ttyS0 panic=-1 quiet mitigations=off nokaslr rcupdate.rcu_expedited=1" <&8 2>"$work/qemu.log" &
guest=$!
wait $guest
status=$?
guest=
if [ "$status" = 124 ] || [ "$status" = 137 ]; then
	echo "qemu.sh: timed out after $limit s" >&2
	exit 124
fi
end=$(tr -d '\r' <"$work/console" | sed -n 's/^exit status \([0-9]*\)$/\1/p' | tail -1)
if [ -z "$end" ]; then
	echo "qemu.sh: the guest ended without an exit status ($status); its last words:" >&2
	cat "$work/qemu.log" "$work/virtiofsd.log" >&2
	tail -30 "$work/console" >&2
	exit 125
fi
exit "$end"
