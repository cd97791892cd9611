package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

// A fault is something that may happen to a node.
type fault struct {
	name string
	// begin does it, and returns what gives back that which is an outage: nil for
	// damage that the product has to mend by itself. An error says that it did not
	// happen, since what it is about was not there at that moment.
	begin begin
	// alone: it is a story of several steps, among which nothing else may happen.
	alone bool
	// on: which registries it is about; both if it is empty.
	on string
}

type begin func(context.Context, *bed, *member, *rand.Rand) (end func(context.Context) error, err error)

// The kinds of registries.
const (
	onFile = "file"
	onEtcd = "etcd"
)

// faults are all that may happen. Their order is part of what a seed means.
func faults() []fault {
	return slices.Concat(processFaults(), wireguardFaults(), kernelFaults(), filterFaults(), fileFaults(), podFaults(), nodeFaults())
}

// bed is a mesh to which faults happen, and what there should be of it.
type bed struct {
	*cluster.Cluster
	t       *testing.T
	options cluster.NetworkOptions
	etcd    *cluster.Etcd // nil: the registry is the shared file
	members []*member
	oldFile []byte // the registry's file as it was in the beginning
	named   int    // pods so far
}

// member is a node and what should be on it.
type member struct {
	*cluster.Node
	helper *cluster.Process
	pods   []*cluster.Pod
	filter string // our table as nft shows it, in the beginning and ever after
	sealed bool
}

// script is a fault that is a shell script, and nothing is given back.
func script(text string) begin {
	return func(ctx context.Context, _ *bed, m *member, r *rand.Rand) (func(context.Context) error, error) {
		return nil, m.sh(ctx, r, text)
	}
}

// scripts is a fault that is a shell script, and another gives back what it took away.
func scripts(text, back string) begin {
	return func(ctx context.Context, _ *bed, m *member, r *rand.Rand) (func(context.Context) error, error) {
		seed := r.Uint64() // the same number for both
		err := m.sh(ctx, rand.New(rand.NewPCG(seed, 0)), text)
		return func(ctx context.Context) error { return m.sh(ctx, rand.New(rand.NewPCG(seed, 0)), back) }, err
	}
}

// sh runs a script in which $N is a small random number. What it prints is not
// kept: it may have to do with keys.
func (m *member) sh(ctx context.Context, r *rand.Rand, text string) error {
	head := fmt.Sprintf("set -e; N=%d; L=%s; U=%s; T=%d\n", 1+r.IntN(200), cluster.Interface, cluster.Uplink, table)
	out, err := m.Run(ctx, "sh", "-c", head+text)
	if err != nil {
		return errors.New(strings.TrimSpace(out))
	}
	return nil
}

// startHelper starts the helper if it does not run, and waits until it does.
func (m *member) startHelper(ctx context.Context) error {
	select {
	case <-m.helper.Done():
	default:
		return nil
	}
	var err error
	if m.helper, err = m.StartHelper(); err != nil {
		return err
	}
	return m.helper.WaitFor(ctx, "msg=starting")
}

// errStuck says that the product did not do what it was asked to.
var errStuck = errors.New("stuck")

// signal sends the helper a signal; one that ends it is waited for. A helper that
// does not end prints where it is.
func (m *member) signal(ctx context.Context, sig unix.Signal) error {
	if err := m.helper.Signal(ctx, sig); err != nil || sig == unix.SIGSTOP {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, cluster.Patience(endPatience))
	defer cancel()
	select {
	case <-m.helper.Done():
		return nil
	case <-ctx.Done():
	}
	if err := m.helper.Signal(context.WithoutCancel(ctx), unix.SIGQUIT); err == nil {
		<-m.helper.Done()
	}
	return fmt.Errorf("%w: the helper did not end within %v of %v:\n%s", errStuck, cluster.Patience(endPatience), sig, m.helper.Log)
}

// stopped is a fault that ends the helper; init starts it again.
func stopped(sig unix.Signal) begin {
	return func(ctx context.Context, _ *bed, m *member, _ *rand.Rand) (func(context.Context) error, error) {
		return m.startHelper, m.signal(ctx, sig)
	}
}

func processFaults() []fault {
	return []fault{
		{name: "helper SIGKILL", begin: stopped(unix.SIGKILL)},
		{name: "helper SIGTERM", begin: stopped(unix.SIGTERM)},
		{name: "helper SIGSTOP", begin: frozen},
		{name: "tunnel lost", begin: func(ctx context.Context, _ *bed, m *member, _ *rand.Rand) (func(context.Context) error, error) {
			_, err := m.LoseTunnel(ctx)
			return nil, err
		}},
		{name: "netlink overrun", begin: overrun},
	}
}

// frozen stops the helper from running; what is told it meanwhile has to wait.
func frozen(ctx context.Context, _ *bed, m *member, _ *rand.Rand) (func(context.Context) error, error) {
	h := m.helper
	err := m.signal(ctx, unix.SIGSTOP)
	return func(ctx context.Context) error {
		if err := h.Signal(ctx, unix.SIGCONT); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
		return nil
	}, err
}

// overrun changes more routes of others than a socket's buffer holds messages
// (ENOBUFS), and in their midst takes away ours.
func overrun(ctx context.Context, b *bed, m *member, r *rand.Rand) (func(context.Context) error, error) {
	thaw, err := frozen(ctx, b, m, r)
	if err != nil {
		return thaw, err
	}
	var add, remove strings.Builder
	for i := range 3000 {
		fmt.Fprintf(&add, "route add 198.18.%d.%d/32 dev lo table 4000\n", i/250, i%250)
		fmt.Fprintf(&remove, "route del 198.18.%d.%d/32 dev lo table 4000\n", i/250, i%250)
	}
	_, err = m.Batch(ctx, add.String()+fmt.Sprintf("route flush table %d proto 119\n", table)+remove.String(), "ip", "-force", "-batch", "-")
	return thaw, err
}

func wireguardFaults() []fault {
	// The first of its peers in a random order.
	peer := `P=$(wg show $L peers | awk -v n=$N '{a[NR]=$1} END {print a[n%NR+1]}'); test -n "$P"; `
	return []fault{
		{name: "wg: peer removed", begin: script(peer + `wg set $L peer "$P" remove`)},
		{name: "wg: peer added", begin: script(`wg set $L peer "$(wg genkey | wg pubkey)" allowed-ips 10.244.77.0/24`)},
		{name: "wg: allowed IPs moved", begin: script(peer + `A=$(wg show $L allowed-ips | awk -v p="$P" '$1 != p {print $2; exit}'); test -n "$A"; wg set $L peer "$P" allowed-ips "$A"`)},
		{name: "wg: allowed IPs emptied", begin: script(peer + `wg set $L peer "$P" allowed-ips ""`)},
		{name: "wg: preshared key changed", begin: script(peer + `wg genpsk | wg set $L peer "$P" preshared-key /dev/stdin`)},
		{name: "wg: endpoint changed", begin: script(peer + `wg set $L peer "$P" endpoint 192.0.2.250:9`)},
		{name: "wg: keepalive changed", begin: script(peer + `wg set $L peer "$P" persistent-keepalive $N`)},
		{name: "wg: private key changed", begin: script(`wg genkey | wg set $L private-key /dev/stdin`)},
		{name: "wg: listen port changed", begin: script(`wg set $L listen-port $((40000+N))`)},
		{name: "wg: mark changed", begin: script(`wg set $L fwmark 0x10`)},
	}
}

func kernelFaults() []fault {
	return []fault{
		{name: "interface deleted", begin: script(`ip link delete $L`)},
		{name: "interface down", begin: script(`ip link set $L down`)},
		{name: "interface MTU changed", begin: script(`ip link set $L mtu $((1280+N/2))`)},
		{name: "interface addresses flushed", begin: script(`ip address flush dev $L`)},
		{name: "interface address added", begin: script(`ip address replace 10.244.250.$N/32 dev $L`)},
		{name: "interface without IPv6", begin: script(`echo 1 >/proc/sys/net/ipv6/conf/$L/disable_ipv6`)},
		{name: "routes deleted", begin: script(`ip route flush table $T; ip -6 route flush table $T`)},
		{name: "route deleted", begin: script(`R=$(ip route show table $T | awk -v n=$N '/dev/ {a[++c]=$1} END {print a[n%c+1]}'); ip route delete $R table $T`)},
		{name: "local route deleted", begin: script(`R=$(ip route show table $T | awk '/^throw/ {print $2; exit}'); ip route delete throw $R table $T`)},
		{name: "route replaced", begin: script(`R=$(ip route show table $T | awk '/dev/ {print $1; exit}'); ip route replace $R dev lo table $T`)},
		{name: "IPv6 route replaced", begin: script(`R=$(ip -6 route show table $T | awk '/dev '$L'/ {print $1; exit}'); ip -6 route replace unreachable $R table $T metric 1024`)},
		{name: "route of our protocol added", begin: script(`ip route replace 10.245.$N.0/24 dev lo table $T proto 119`)},
		{name: "route of our protocol in another table", begin: script(`ip -6 route replace fd00:245:$N::/64 dev lo table 4001 proto 119`)},
		// What others have put there stays, until they take it away.
		{name: "route of others added", begin: scripts(`ip route replace 10.246.$N.0/24 dev lo table $T proto static`, `ip route delete 10.246.$N.0/24 dev lo table $T proto static`)},
		{name: "rules deleted", begin: script(`ip rule delete pref 110; ip -6 rule delete pref 110`)},
		{name: "rule of our protocol added", begin: script(`ip rule add pref $((200+N)) lookup $T protocol 119`)},
		{name: "rp_filter strict", begin: scripts(`echo 1 >/proc/sys/net/ipv4/conf/all/rp_filter`, `echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter`)},
		{name: "forwarding off", begin: scripts(`echo 0 >/proc/sys/net/ipv4/ip_forward`, `echo 1 >/proc/sys/net/ipv4/ip_forward`)},
	}
}

func filterFaults() []fault {
	return []fault{
		{name: "nft: table deleted", begin: script(`nft delete table inet wgcni`)},
		{name: "nft: all deleted", begin: script(`nft flush ruleset`)},
		{name: "nft: set emptied", begin: script(`for S in cluster guarded withheld local; do test $((N%4)) = 0 && break; N=$((N+1)); done; nft flush set inet wgcni ${S}4`)},
		{name: "nft: element added", begin: script(`nft add element inet wgcni local4 "{ 10.244.250.0/24 }"`)},
		{name: "nft: pod added", begin: script(`nft add element inet wgcni pods6 "{ fd00:244:250::$N }"`)},
		{name: "nft: rule inserted", begin: script(`nft insert rule inet wgcni forward accept`)},
		{name: "nft: chain emptied", begin: script(`nft flush chain inet wgcni plain-out`)},
		{name: "nft: chain added", begin: script(`nft add chain inet wgcni foreign$N`)},
		{name: "nft: rule deleted", begin: script(`H=$(nft -a list chain inet wgcni forward | sed -n 's/.*jump plain-out.*# handle //p' | head -1); nft delete rule inet wgcni forward handle $H`)},
	}
}

func fileFaults() []fault {
	const run, state = "/run/wgcni/", "/var/lib/wgcni/"
	damage := func(path, how string) begin {
		return script("F=" + path + "; test -s $F; " + how)
	}
	const (
		remove   = `rm $F`
		garbage  = `head -c 20000 /dev/urandom >$F`
		truncate = `truncate -s $((N*100)) $F`
		zeros    = `S=$(stat -c %s $F); truncate -s 0 $F; truncate -s $S $F`
	)
	var out []fault
	for _, f := range []string{run + "attachments.db", state + "peers.db"} {
		name := filepath.Base(f)
		out = append(out,
			fault{name: name + " deleted", begin: damage(f, remove)},
			fault{name: name + " garbage", begin: damage(f, garbage)},
			fault{name: name + " truncated", begin: damage(f, truncate)},
			fault{name: name + " zeros", begin: damage(f, zeros)},
			fault{name: name + " locked", begin: held(func(*bed) string { return f + ".lock" })},
		)
	}
	return append(out,
		fault{name: "registry deleted", on: onFile, begin: registryFile(func(_ *bed, p string, _ *rand.Rand) error { return os.Remove(p) })},
		fault{name: "registry emptied", on: onFile, begin: registryFile(func(_ *bed, p string, _ *rand.Rand) error { return os.Truncate(p, 0) })},
		fault{name: "registry truncated", on: onFile, begin: registryFile(func(_ *bed, p string, r *rand.Rand) error { return os.Truncate(p, int64(1+r.IntN(1500))) })},
		fault{name: "registry garbage", on: onFile, begin: registryFile(func(_ *bed, p string, _ *rand.Rand) error {
			return os.WriteFile(p, []byte("\x00\xff{not JSON"), 0o644)
		})},
		fault{name: "registry of before", on: onFile, begin: registryFile(func(b *bed, p string, _ *rand.Rand) error { return os.WriteFile(p, b.oldFile, 0o644) })},
		fault{name: "registry without a mesh", on: onFile, begin: registryFile(func(_ *bed, p string, _ *rand.Rand) error {
			return os.WriteFile(p, []byte(`{"version":1,"nodes":{}}`), 0o644)
		})},
		fault{name: "registry locked", on: onFile, begin: held(func(b *bed) string { return b.RegistryFile() + ".lock" })},
		fault{name: "registry's lock deleted", on: onFile, begin: registryFile(func(_ *bed, p string, _ *rand.Rand) error { return os.Remove(p + ".lock") })},
		fault{name: "etcd killed", on: onEtcd, begin: func(_ context.Context, b *bed, _ *member, _ *rand.Rand) (func(context.Context) error, error) {
			return func(ctx context.Context) error { return b.etcd.Start(ctx) }, b.etcd.Kill()
		}},
		fault{name: "etcd wiped", on: onEtcd, alone: true, begin: func(_ context.Context, b *bed, _ *member, _ *rand.Rand) (func(context.Context) error, error) {
			return func(ctx context.Context) error { return b.etcd.Start(ctx) }, errors.Join(b.etcd.Kill(), b.etcd.Wipe())
		}},
		fault{name: "etcd: record deleted", on: onEtcd, alone: true, begin: func(ctx context.Context, b *bed, m *member, _ *rand.Rand) (func(context.Context) error, error) {
			_, err := b.etcd.Ctl(ctx, "del", etcdNodes+m.Name)
			return nil, err
		}},
		fault{name: "etcd: record garbage", on: onEtcd, alone: true, begin: func(ctx context.Context, b *bed, m *member, _ *rand.Rand) (func(context.Context) error, error) {
			_, err := b.etcd.Ctl(ctx, "put", etcdNodes+m.Name, "{")
			return nil, err
		}},
		fault{name: "key deleted", begin: keyLost},
		fault{name: "key replaced", alone: true, begin: keyReplaced},
		fault{name: "key garbage", begin: scripts(`cp -p `+state+`private.key `+state+`kept; echo garbage >`+state+`private.key`, `mv `+state+`kept `+state+`private.key`), alone: true},
	)
}

// registryFile is a fault of the shared file.
func registryFile(do func(*bed, string, *rand.Rand) error) begin {
	return func(_ context.Context, b *bed, _ *member, r *rand.Rand) (func(context.Context) error, error) {
		return nil, do(b, b.RegistryFile(), r)
	}
}

// held has another process hold a lock.
func held(path func(*bed) string) begin {
	return func(_ context.Context, b *bed, m *member, _ *rand.Rand) (func(context.Context) error, error) {
		p, err := m.Start("flock", path(b), "sleep", "60")
		if err != nil {
			return nil, err
		}
		return func(context.Context) error { return p.Kill() }, nil
	}
}

// keyLost deletes the key's file under a helper that runs; a backup has it.
func keyLost(_ context.Context, _ *bed, m *member, _ *rand.Rand) (func(context.Context) error, error) {
	const path = "/var/lib/wgcni/private.key"
	key, err := m.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return func(context.Context) error {
		if _, err := m.ReadFile(path); err == nil {
			return nil // a helper that was started meanwhile has made another
		}
		return m.WriteFile(path, key, 0o600)
	}, os.Remove(m.Path(path))
}

// keyReplaced deletes the key for good: the helper makes another when it starts,
// and the node is the same by its name.
func keyReplaced(ctx context.Context, _ *bed, m *member, r *rand.Rand) (func(context.Context) error, error) {
	if err := m.signal(ctx, unix.SIGTERM); err != nil {
		return m.startHelper, err
	}
	return m.startHelper, m.sh(ctx, r, `rm /var/lib/wgcni/private.key`)
}

// pause is a time that is short beside a second.
func pause(r *rand.Rand) time.Duration { return time.Duration(r.IntN(150)) * time.Millisecond }
