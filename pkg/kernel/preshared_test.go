package kernel_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netns"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/kernel/userspace"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// psk makes preshared keys. 0 is none.
func psk(n int) (k wgtypes.Key) {
	if n != 0 {
		k[0], k[31] = byte(n), 77
	}
	return k
}

func fingerprint(n int) mesh.Fingerprint { return mesh.FingerprintOf(psk(n)) }

// presharedKeys is kernel.Config's PresharedKey for all tests that have them.
func presharedKeys(_ wgtypes.Key, f mesh.Fingerprint) (wgtypes.Key, error) {
	for n := 1; n < 10; n++ {
		if fingerprint(n) == f {
			return psk(n), nil
		}
	}
	return wgtypes.Key{}, fmt.Errorf("no test has %s", f)
}

// sharing returns the node with a preshared key.
func sharing(key int, n mesh.Node) mesh.Node {
	n.PresharedKey = fingerprint(key)
	return n
}

// An end is one of two nodes that are next to each other.
type end struct {
	logs  string // folder of the tunnel process's
	ns    netns.NsHandle
	k     *kernel.Kernel
	facts mesh.Facts // without nodes
	other *end
	conn  *net.UDPConn // on the tunnel address
}

// twoEnds makes two nodes, each in a namespace, each with its own preshared key
// for the other. The second one's namespace and interface have other names.
func twoEnds(t *testing.T, nearKey, farKey int) (near, far *end) {
	t.Helper()
	sh(t, `mkdir -p /run/netns; ip netns add far
ip link add up0 type veth peer name up1 netns far
ip addr add 192.0.2.1/24 dev up0; ip link set up0 up
ip -n far addr add 192.0.2.2/24 dev up1; ip -n far link set up1 up; ip -n far link set lo up`)
	t.Cleanup(func() { sh(t, "ip link del up0; ip netns del far") })
	here, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	there, err := netns.GetFromName("far")
	if err != nil {
		t.Fatal(err)
	}
	near, far = newEnd(t, here, 1, "wgcni0"), newEnd(t, there, 2, "wgcni1")
	near.other, far.other = far, near
	near.share(t, nearKey)
	far.share(t, farKey)
	near.listen(t)
	far.listen(t)
	go far.echo()
	return near, far
}

func newEnd(t *testing.T, ns netns.NsHandle, n int, name string) *end {
	t.Helper()
	private, next := newKey(), newKey()
	e := &end{ns: ns, logs: t.TempDir()}
	e.facts = mesh.Facts{Settings: settings(), Self: node(n, fmt.Sprintf("10.244.%d.0/24", n))}
	e.facts.Interface, e.facts.Self.PublicKey, e.facts.Self.Spare.PublicKey = name, private.PublicKey(), next.PublicKey()
	var err error
	e.in(t, func() {
		e.k, err = kernel.Open(kernel.Config{
			Interface:    name,
			PrivateKey:   privateKeys(private, next),
			PresharedKey: presharedKeys,
			StartTunnel: func(name string, mtu int) error {
				return userspace.Start(name, mtu, e.logs+"/tunnel-"+name+".log")
			},
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		e.in(t, func() { apply(t, e.k, mesh.State{}) })
		e.k.Close()
		if err := ns.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// in runs f in the end's namespace.
func (e *end) in(t *testing.T, f func()) {
	t.Helper()
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := netns.Set(home); err != nil {
			panic(err) // no test after this one would be where it thinks
		}
		home.Close()
		runtime.UnlockOSThread()
	}()
	if err := netns.Set(e.ns); err != nil {
		t.Fatal(err)
	}
	f()
}

// apply makes the end hold the plan with those nodes.
func (e *end) apply(t *testing.T, nodes ...mesh.Node) []mesh.Op {
	t.Helper()
	f := e.facts
	f.Nodes = nodes
	var ops []mesh.Op
	e.in(t, func() { ops = apply(t, e.k, mesh.NewPlan(f).State) })
	return ops
}

// share gives the end a preshared key for the other.
func (e *end) share(t *testing.T, key int) []mesh.Op {
	t.Helper()
	return e.apply(t, sharing(key, e.other.facts.Self))
}

// renew removes the other end and adds it again: the next packet needs a handshake.
func (e *end) renew(t *testing.T, key int) {
	t.Helper()
	e.apply(t)
	e.share(t, key)
}

// peer is the other end as the kernel has it.
func (e *end) peer(t *testing.T) (p mesh.Peer) {
	t.Helper()
	e.in(t, func() {
		s, err := e.k.Observe()
		if err != nil || len(s.Peers) != 1 {
			t.Fatalf("peers %v, error %v; want one", s.Peers, err)
		}
		p = s.Peers[0]
	})
	return p
}

const echoPort = 7

func (e *end) address() *net.UDPAddr {
	return net.UDPAddrFromAddrPort(netip.AddrPortFrom(e.facts.Self.TunnelAddresses()[0], echoPort))
}

func (e *end) listen(t *testing.T) {
	t.Helper()
	e.in(t, func() {
		var err error
		if e.conn, err = net.ListenUDP("udp4", e.address()); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { e.conn.Close() })
}

// echo answers until the socket is closed.
func (e *end) echo() {
	b := make([]byte, 64)
	for {
		n, from, err := e.conn.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		_, _ = e.conn.WriteToUDPAddrPort(b[:n], from) // one that is lost the other side misses
	}
}

// pingTimeout has room for three handshakes that fail: WireGuard tries again after 5 s.
const pingTimeout = 20 * time.Second

// ping sends one packet, once, and waits for its echo.
func (e *end) ping(n uint64) error {
	if err := e.conn.SetDeadline(time.Now().Add(pingTimeout)); err != nil {
		return err
	}
	sent := binary.BigEndian.AppendUint64(nil, n)
	if _, err := e.conn.WriteToUDP(sent, e.other.address()); err != nil {
		return err
	}
	b := make([]byte, 64)
	switch got, err := e.conn.Read(b); {
	case err != nil:
		return fmt.Errorf("packet %d is lost: %w", n, err)
	case string(b[:got]) != string(sent):
		return fmt.Errorf("packet %d came back as %x", n, b[:got])
	}
	return nil
}

// until waits for a condition.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for give := time.Now().Add(time.Minute); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(give) {
			t.Fatalf("waited a minute: %s", what)
		}
	}
}

// exchange pings steadily; each ping waits for the one before, and none is sent
// twice. It ends with the first that is lost, or when its stop is called.
type exchange struct {
	pings   atomic.Uint64
	stopped atomic.Bool
	done    chan error
}

func (e *end) exchange() *exchange {
	x := &exchange{done: make(chan error, 1)}
	go func() {
		for !x.stopped.Load() {
			if err := e.ping(x.pings.Load()); err != nil {
				x.done <- err
				return
			}
			x.pings.Add(1)
		}
		x.done <- nil
	}()
	return x
}

// some waits until 20 more pings have come back.
func (x *exchange) some(t *testing.T) {
	t.Helper()
	for enough := x.pings.Load() + 20; x.pings.Load() < enough; time.Sleep(time.Millisecond) {
		select {
		case err := <-x.done:
			t.Fatal(err)
		default:
		}
	}
}

func (x *exchange) stop(t *testing.T) {
	t.Helper()
	x.stopped.Store(true)
	if err := <-x.done; err != nil {
		t.Fatal(err)
	}
}

// A preshared key is part of handshakes alone: two ends that change it, one after
// the other, lose no packet, and nothing but the key is different then. Their
// next handshake uses it.
func TestPresharedKeyChangesUnderTraffic(t *testing.T) {
	near, far := twoEnds(t, 0, 0)
	if err := near.ping(0); err != nil {
		t.Fatal(err)
	}
	for _, key := range []int{1, 2, 0, 3} {
		x := near.exchange()
		x.some(t)
		for _, e := range []*end{near, far} {
			before := e.peer(t)
			ops := e.share(t, key)
			if len(ops) != 1 {
				t.Errorf("key %d takes more than one op:\n%s", key, mesh.Text(ops))
			}
			x.some(t)
			after := e.peer(t)
			before.PresharedKey = fingerprint(key)
			if diff := cmp.Diff(before, after, cmpopts.EquateComparable(netip.AddrPort{}, netip.Prefix{}),
				cmpopts.IgnoreFields(mesh.Peer{}, "ReceiveBytes", "TransmitBytes")); diff != "" {
				t.Errorf("key %d changed more than itself (-want +got):\n%s", key, diff)
			}
		}
		x.stop(t)
		near.renew(t, key)
		if p := near.peer(t); !p.LastHandshake.IsZero() {
			t.Fatalf("key %d: the session is still there: %+v", key, p)
		}
		if err := near.ping(1); err != nil {
			t.Fatalf("key %d, a new handshake: %v", key, err)
		}
		if p := near.peer(t); p.LastHandshake.IsZero() {
			t.Errorf("key %d: a packet came back without a handshake", key)
		}
	}
}

// responseLen is the size of the second message of a handshake, in bytes
// (WireGuard paper, section 5.4.3).
const responseLen = 92

// Who has the right private key, but not the preshared key, is not talked to.
func TestPresharedKeysMustMatch(t *testing.T) {
	near, far := twoEnds(t, 1, 2)
	if _, err := near.conn.WriteToUDP([]byte("hello"), far.address()); err != nil {
		t.Fatal(err)
	}
	// The key comes in with the answer, which near refuses without a word. When it
	// has tried again, it has.
	until(t, "far has answered twice", func() bool { return far.peer(t).TransmitBytes >= 2*responseLen })
	for name, e := range map[string]*end{"near": near, "far": far} {
		if p := e.peer(t); !p.LastHandshake.IsZero() {
			t.Errorf("%s shook hands: %+v", name, p)
		}
	}
	far.share(t, 1)
	near.renew(t, 1)
	if err := near.ping(1); err != nil {
		t.Errorf("with one key: %v", err)
	}
}

// Without its preshared key a peer is not made, and one that is there stays as it
// is; the other peers of the same message do not have to wait.
func TestPresharedKeyNotAtHand(t *testing.T) {
	lost := errors.New("the secret is lost")
	for _, tt := range []struct {
		name   string
		lookUp func(wgtypes.Key, mesh.Fingerprint) (wgtypes.Key, error)
		want   string
	}{
		{"nobody to ask", nil, "no preshared key at hand"},
		{"error", func(wgtypes.Key, mesh.Fingerprint) (wgtypes.Key, error) { return psk(9), lost }, "no preshared key at hand: the secret is lost"},
		{"none", func(wgtypes.Key, mesh.Fingerprint) (wgtypes.Key, error) { return wgtypes.Key{}, nil }, "has changed since the plan was made"},
		{"another", func(wgtypes.Key, mesh.Fingerprint) (wgtypes.Key, error) { return psk(9), nil }, "has changed since the plan was made"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := open(t)
			first := plan(mesh.Facts{Nodes: []mesh.Node{sharing(1, node(1, "10.244.1.0/24"))}})
			apply(t, k, first)
			want := plan(mesh.Facts{Nodes: []mesh.Node{
				sharing(2, node(1, "10.244.1.0/24", "10.244.11.0/24")), sharing(3, node(2, "10.244.2.0/24")), node(3, "10.244.3.0/24"),
			}})
			k.PresharedKey = tt.lookUp
			err := k.Apply(mesh.Diff(first, want, mesh.Context{}))
			if err == nil || !strings.HasSuffix(err.Error(), tt.want) && !strings.Contains(err.Error(), tt.want+";") ||
				!strings.Contains(err.Error(), peerKey(1).String()+" (node-1)") || !strings.Contains(err.Error(), "and 1 peers more") {
				t.Errorf("error %v, want %q of node-1 and one more", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), psk(9).String()) {
				t.Errorf("the error tells the key: %v", err)
			}
			s, err := k.Observe()
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, p := range s.Peers {
				got = append(got, fmt.Sprintf("%d %s %s", p.PublicKey[0], p.PresharedKey, p.AllowedIPs))
			}
			wantPeers := []string{fmt.Sprintf("1 %s [10.244.1.0/24]", fingerprint(1)), fmt.Sprintf("3 %s [10.244.3.0/24]", fingerprint(0))}
			if diff := cmp.Diff(wantPeers, got); diff != "" {
				t.Errorf("peers (-want +got):\n%s", diff)
			}
			apply(t, k, plan(mesh.Facts{Nodes: []mesh.Node{node(1, "10.244.1.0/24")}})) // to take one away needs none
			k.PresharedKey = presharedKeys
			apply(t, k, want)
			if got := sh(t, "wg show wgcni0 preshared-keys"); !strings.Contains(got, peerKey(1).String()+"\t"+psk(2).String()) ||
				!strings.Contains(got, peerKey(3).String()+"\t(none)") {
				t.Errorf("wg shows:\n%s", got)
			}
		})
	}
}
