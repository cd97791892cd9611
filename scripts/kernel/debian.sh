#!/bin/bash
# debian.sh -- prints a folder with the kernel that Debian ships for virtual
# machines (vmlinuz, its modules, an initrd to start qemu-init), which is
# fetched if the cache has none. Nothing is installed.
set -euo pipefail
here=$(realpath "$(dirname "$0")")
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$here/lib.sh"
out=$cache/debian-$(key "$here/qemu-init" "$here/debian.sh")
if [ ! -d "$out" ]; then
	lock
fi
if [ -d "$out" ]; then # perhaps since we hold the lock
	echo "$out"
	exit
fi
work=$(mktemp -d "$cache/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
mkdir "$work/debs" "$work/tree"
cd "$work/debs"
echo "loading Debian's kernel" >&2
apt-get update -q >/dev/null
# Debian 12 has Linux 6.12 beside its own 6.1; what comes later has nothing older.
for name in linux-image-6.12-cloud-amd64 linux-image-cloud-amd64; do
	package=$(apt-cache depends "$name" 2>/dev/null | awk '/Depends:/ {print $2; exit}')
	[ -z "$package" ] || break
done
[ -n "$package" ] || { echo "debian.sh: no cloud kernel among the machine's packages" >&2; exit 1; }
apt-get download -q "$package" busybox-static kmod >/dev/null 2>"$work/apt.log" || { cat "$work/apt.log" >&2; exit 1; }
cd "$work/tree"
for deb in "$work"/debs/*.deb; do
	dpkg -x "$deb" .
done
[ -d lib/modules ] || { mkdir -p lib && mv usr/lib/modules lib/; } # merged-/usr packages
release=${package#linux-image-}
ln -s "boot/vmlinuz-$release" vmlinuz
mkdir -p bin
kmod=$(find . -type f -path '*bin/kmod' | head -1)
ln -sf "../$kmod" bin/modprobe
ln -sf "../$kmod" bin/depmod
bin/depmod -b . "$release" # as the package's postinst would

# The initrd has what is needed to reach the host's files; all else is loaded on demand.
initrd=$work/initrd
mkdir -p "$initrd"/{bin,modules,proc,sys,dev,run,tmp,host,guest,sbin}
cp "$(find . -type f -path '*bin/busybox' | head -1)" "$initrd/bin/busybox"
ln -s busybox "$initrd/bin/sh"
for module in virtio_pci virtio_console virtio_rng virtiofs overlay; do
	bin/modprobe -d . -S "$release" -D -n "$module" 2>/dev/null || true # built in
done | awk '$1 == "insmod" && !seen[$2]++ {print $2}' | while read -r file; do
	name=$(basename "${file%.xz}")
	case $file in
	*.xz) xz -dc "$file" >"$initrd/modules/$name" ;;
	*) cp "$file" "$initrd/modules/$name" ;;
	esac
	echo "$name" >>"$initrd/modules/order"
done
touch "$initrd/modules/order"
install -m 755 "$here/qemu-init" "$initrd/init"
(cd "$initrd" && find . -print0 | cpio --null -o -H newc --quiet -R 0:0 | gzip -1) >initrd.gz
mv "$work/tree" "$out" # as a whole or not at all
echo "$out"
