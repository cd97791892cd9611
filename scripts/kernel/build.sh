#!/bin/bash
# build.sh VERSION -- prints the path of a user-mode Linux of that version, with
# WireGuard and what else `config` names. It is built from Debian's source
# package if the cache has none: 5 to 10 minutes, 150 MB to load, 3 GB on disk.
set -euo pipefail
here=$(realpath "$(dirname "$0")")
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$here/lib.sh"
version=${1:?usage: build.sh VERSION}
case $version in
6.12) suite= ;; # of the machine's own sources
7.2) suite=trixie-backports ;;
*) echo "build.sh: there is no source package known for Linux $version" >&2; exit 2 ;;
esac
out=$cache/linux-$version-$(key "$here/config" "$here/build.sh")
if [ ! -x "$out" ]; then
	lock
fi
if [ -x "$out" ]; then # perhaps since we hold the lock
	echo "$out"
	exit
fi
work=$(mktemp -d "$cache/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
cd "$work"

apt=(apt-get -q -o APT::Sandbox::User=root) # _apt may not enter the cache
if [ -n "$suite" ]; then
	# Lists of its own, so that the machine's stay as they are. The mirror is the machine's.
	mkdir -p lists/partial
	# shellcheck disable=SC2016 # apt's own variable
	mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | sort -u | head -1)
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >sources.list
	apt+=(-o "Dir::State::Lists=$work/lists" -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/nonexistent
		-o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
fi
echo "loading the source of Linux $version" >&2
"${apt[@]}" update >/dev/null
"${apt[@]}" download "linux-source-$version" >/dev/null 2>apt.log || { cat apt.log >&2; exit 1; }
dpkg -x linux-source-*.deb deb
tar -xf "deb/usr/src/linux-source-$version.tar.xz"
rm -rf deb ./*.deb
src=$work/linux-source-$version

cp "$here/config" all.config
if [ "$version" = 6.12 ]; then
	# Before 6.13 the state of the floating point unit has 2696 bytes. A processor with AMX needs
	# 11008, and PTRACE_SETREGSET answers EFAULT; the host cuts what is larger than its own.
	sed -i 's/DEFINE_LONGS(HOST_FP_SIZE, 2696);/DEFINE_LONGS(HOST_FP_SIZE, 12288);/' "$src/arch/x86/um/user-offsets.c"
	grep -q 'HOST_FP_SIZE, 12288' "$src/arch/x86/um/user-offsets.c"
	# A fork that is killed halfway leaves a mark (dup_mmap) behind the areas that it has copied: exit_mmap
	# heeds it, and user-mode Linux's own flush_tlb_mm takes it for an area.
	sed -i -e '1i #include <linux/xarray.h>' -e '/^void flush_tlb_mm/,/^}/ s/for_each_vma(vmi, vma)/& if (xa_is_zero(vma)) break; else/' "$src/arch/um/kernel/tlb.c"
	grep -q 'xa_is_zero' "$src/arch/um/kernel/tlb.c"
else
	sed -i '/^# CONFIG_SMP is not set/d' all.config
	printf 'CONFIG_SMP=y\nCONFIG_NR_CPUS=8\n' >>all.config
fi
KCONFIG_ALLCONFIG=$work/all.config make -s -C "$src" ARCH=um O="$work/build" allnoconfig >&2
grep -o '^CONFIG_[A-Z0-9_a-z]*=y' all.config | while read -r option; do
	grep -qx "$option" build/.config || { echo "build.sh: Linux $version does not take $option: it lacks what that depends on" >&2; exit 1; }
done
echo "building Linux $version" >&2
make -s -C "$src" ARCH=um O="$work/build" -j"$(nproc)" linux >build.log 2>&1 || { tail -30 build.log >&2; exit 1; }
strip -o linux build/linux
mv linux "$out" # as a whole or not at all
echo "$out"
