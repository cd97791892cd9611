# shellcheck shell=bash
# What the scripts of this folder share.

# Kernels are built or fetched once, and outlive the tree.
cache=${WGCNI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/wgcni}/kernel

# key FILE... names a state of these files: what is made by other ones is made anew.
key() { cat "$@" | sha256sum | cut -c1-12; }

# lock holds the cache until the script ends, and removes what a killed one has left there.
lock() {
	mkdir -p "$cache"
	exec 9>"$cache/lock"
	flock -n 9 || { echo "waiting for another build of a kernel" >&2; flock 9; }
	rm -rf "$cache"/work.*
}

# command_file prints a script that runs a command as it would run here: in this
# folder, with that part of the environment that programs and tests look at.
command_file() {
	export -p | grep -E '^declare -x (PATH|HOME|TMPDIR|GO[A-Z]*|WGCNI_[A-Z_]*)=' | sed 's/^declare -x /export /'
	printf 'cd %q || exit 125\nexec' "$PWD"
	printf ' %q' "$@"
	echo
}

# guest_options sets limit (seconds), memory (MiB) and OPTIND by what a guest's script was called with.
# shellcheck disable=SC2034 # used by those
guest_options() {
	limit=300 memory=1024
	while getopts t:m: o; do
		case $o in
		t) limit=$OPTARG ;;
		m) memory=$OPTARG ;;
		*) exit 2 ;;
		esac
	done
}
