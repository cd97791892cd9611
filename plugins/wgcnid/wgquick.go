package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// wgQuick is a file for wg-quick(8). It holds secrets: nothing but text prints it.
type wgQuick struct {
	name       string // of the machine
	addresses  []netip.Prefix
	privateKey string // "": the machine has it, in keyFile if that is known
	keyFile    string
	listenPort string // "": any
	mtu        int    // bytes
	keepalive  bool
	reach      []netip.Prefix // what is sent to the entry in use
	partly     bool           // reach is what the mesh's machines have now
	entries    []wgEntry      // the preferred one first
	hooks      bool           // watch the entry in use, and go on to the next
}

type wgEntry struct {
	name         string
	publicKey    wgtypes.Key
	presharedKey wgtypes.Key // zero: none
	endpoint     string      // "": it calls
	tunnel       []netip.Prefix
}

// usable are those of the prefixes that are of a family which the machine has.
func (w wgQuick) usable(prefixes []netip.Prefix) (out []netip.Prefix) {
	for _, p := range prefixes {
		if slices.ContainsFunc(w.addresses, func(a netip.Prefix) bool { return a.Addr().Is4() == p.Addr().Is4() }) {
			out = append(out, p)
		}
	}
	return out
}

// persistentKeepalive keeps the mapping of a NAT alive, in seconds.
const persistentKeepalive = "25"

// text is the file; without comments it is as short as it can be.
func (w wgQuick) text(comments bool) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	note := func(text string) {
		if comments {
			line("# %s", text)
		}
	}
	note("wgcni peer " + w.name)
	line("[Interface]")
	switch {
	case w.privateKey != "":
		line("PrivateKey = %s", w.privateKey)
	case w.keyFile != "":
		line("PostUp = wg set %%i private-key %s", w.keyFile)
	default:
		note("Put the private key here: the one of the machine's old file. Until then wg-quick")
		note("refuses this file. Nobody has kept it, where it was made by wgcnid.")
		line("PrivateKey = THE-PRIVATE-KEY-OF-%s", w.name)
	}
	line("Address = %s", strings.Join(texts(w.addresses), ", "))
	if w.listenPort != "" {
		line("ListenPort = %s", w.listenPort)
	}
	line("MTU = %d", w.mtu)
	if w.hooks {
		note("Watches the entry node in use, and goes on to the next when that is gone for about 6 s.")
		line("PostUp = %s", w.watch())
		line("PreDown = rm -f %s", w.token())
	}
	for i, e := range w.entries {
		line("")
		note(e.name)
		line("[Peer]")
		line("PublicKey = %s", e.publicKey)
		if e.presharedKey != (wgtypes.Key{}) {
			line("PresharedKey = %s", e.presharedKey)
		}
		if e.endpoint != "" {
			line("Endpoint = %s", e.endpoint)
		}
		allowed := e.tunnel
		if i == 0 {
			if w.partly {
				note("What it may talk to now: print this file again when the mesh has grown.")
			}
			allowed = without(w.reach, e.tunnel, w.hooks)
		}
		switch {
		case i == 0 && w.keepalive:
			line("PersistentKeepalive = %s", persistentKeepalive)
		case i > 0: // else wireguard-go takes the one above for this one too, and calls
			line("PersistentKeepalive = off")
		}
		line("AllowedIPs = %s", strings.Join(texts(allowed), ", "))
	}
	return b.String()
}

// without puts the entry's own addresses first where they are to stay by themselves
// when the rest moves.
func without(reach, tunnel []netip.Prefix, stay bool) []netip.Prefix {
	if !stay {
		return reach
	}
	out := append([]netip.Prefix(nil), tunnel...)
	seen := map[netip.Prefix]bool{}
	for _, p := range tunnel {
		seen[p] = true
	}
	for _, p := range reach {
		if !seen[p] {
			out = append(out, p)
		}
	}
	return out
}

// token is the file whose content is the process that may watch: with it gone, or
// another's, the watcher ends. A process number to kill may be another's by then.
func (wgQuick) token() string { return "/var/run/wgcni-%i" }

// watch is the hook that watches, in one line. bash(1) evaluates it, as wg-quick
// does for all hooks, with -e.
//
//   - It has no '#', which begins a comment, and no '&', which wg-quick's save would
//     replace ("patsub_replacement" in bash 5.2): so there is coproc, and no "2>&1".
//   - Each entry is three words: key, address to watch, its own addresses. The first
//     three are those of the entry in use.
//   - A ping is answered if the entry is there, and carries this machine.
//   - Both the entry that is left and the next are made anew. Handshakes that are
//     still being tried with the one would, once it is back, tell it that this machine
//     has come back too; and a session with the other would spare it the handshake by
//     which it hears of this machine.
//   - An entry that is not in use has no keepalive: it is called by those who go there.
func (w wgQuick) watch() string {
	var entries []string
	for _, e := range w.entries {
		entries = append(entries, e.publicKey.String(), e.tunnel[0].Addr().String(), comma(e.tunnel))
	}
	keepalive := "off"
	if w.keepalive {
		keepalive = persistentKeepalive
	}
	own := map[netip.Prefix]bool{}
	for _, e := range w.entries {
		for _, p := range e.tunnel {
			own[p] = true
		}
	}
	var rest []netip.Prefix
	for _, p := range w.reach {
		if !own[p] {
			rest = append(rest, p)
		}
	}
	all := "$3"
	if len(rest) > 0 {
		all += "," + comma(rest)
	}
	return strings.NewReplacer("ENTRIES", strings.Join(entries, " "), "ALL", all, "KEEPALIVE", keepalive, "TOKEN", w.token()).Replace(
		`coproc { set +e; echo $BASHPID > TOKEN; seen=$SECONDS; set -- ENTRIES; ` +
			`while sleep 1; [ "$(cat TOKEN)" = $BASHPID ]; do ` +
			`if ping -c 1 -W 1 -I %i $2; then seen=$SECONDS; ` +
			`elif [ $((SECONDS - seen)) -ge 5 ]; then ` +
			`gone=$1 ping=$2 own=$3; shift 3; set -- "$@" $gone $ping $own; seen=$SECONDS; ` +
			`wg show %i dump | while read -r key psk endpoint more; do ` +
			`case $key in $1) ips=ALL alive=KEEPALIVE;; $gone) ips=$own alive=off;; *) continue;; esac; ` +
			`from=/dev/stdin; if [ "$psk" = "(none)" ]; then from=/dev/null; fi; wg set %i peer $key remove; ` +
			`echo $psk | wg set %i peer $key preshared-key $from endpoint $endpoint persistent-keepalive $alive allowed-ips $ips; done; ` +
			`fi; done; } > /dev/null 2> /dev/null < /dev/null`)
}

func comma(prefixes []netip.Prefix) string { return strings.Join(texts(prefixes), ",") }
