package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/file"
	"github.com/wgcni/wgcni/test/cluster"
)

// A rogue is a node that exists in the registry alone. All of them have a few
// prefixes between them, which move.
type rogue struct {
	name     string
	key      wgtypes.Key
	number   int
	revision uint64
}

const roguePrefixes = 8

func roguePrefix(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(70 + i), 0}), 24)
}

// addRogues makes some up. The registry does not have them yet.
func (a *arena) addRogues(n int) {
	a.t.Helper()
	for i := range n {
		key, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			a.t.Fatal(err)
		}
		a.rogues = append(a.rogues, &rogue{name: fmt.Sprintf("rogue-%d", i), key: key.PublicKey(), number: i})
	}
}

// record is an honest one, of a node that has joined just now.
func (g *rogue) record(r *rand.Rand) registry.Record {
	record := registry.Record{
		Name: g.name, PublicKey: g.key, Since: time.Now(),
		Endpoints: []string{fmt.Sprintf("192.0.2.%d:51820", 200+g.number)},
	}
	for i := range roguePrefixes {
		if r.IntN(roguePrefixes/2) == 0 {
			record.Prefixes = append(record.Prefixes, mesh.Claim{Prefix: roguePrefix(i), Since: time.Now()})
		}
	}
	return record
}

// publish puts a rogue's record into the registry, as it is: no code of ours looks
// at it first, but that the file must have one writer at a time.
func (a *arena) publish(ctx context.Context, g *rogue, record registry.Record, sealed bool) error {
	g.revision = registry.NextRevision(g.revision, time.Now())
	record.Revision = g.revision
	if sealed && len(a.trust.Secrets) > 0 {
		var err error
		if record, err = a.trust.Seal(record); err != nil {
			return err
		}
	}
	data, err := json.Marshal(record)
	if err != nil {
		return err
	}
	if a.etcd != nil {
		_, err = a.etcd.Ctl(ctx, "put", "--", "/wgcni/nodes/"+record.Name, string(data))
		return err
	}
	return file.New(a.RegistryFile()).Update(ctx, record.Name, func([]byte) ([]byte, error) { return data, nil })
}

// joins has a rogue join, or change its prefixes.
func (a *arena) joins(ctx context.Context, r *rand.Rand) (string, error) {
	g := a.rogues[r.IntN(len(a.rogues))]
	record := g.record(r)
	err := a.publish(ctx, g, record, true)
	rest(ctx, r, 300)
	return fmt.Sprintf("made-up nodes joined or moved: %s %v", g.name, record.Prefixes), err
}

// leaves has a rogue leave.
func (a *arena) leaves(ctx context.Context, r *rand.Rand) (string, error) {
	g := a.rogues[r.IntN(len(a.rogues))]
	err := a.publish(ctx, g, registry.Record{Name: g.name, Left: true}, true)
	rest(ctx, r, 300)
	return "made-up nodes left: " + g.name, err
}

// alone has no made-up node in the mesh for a while: a rotation waits for all nodes,
// and these never answer.
func (a *arena) alone(ctx context.Context, r *rand.Rand) (string, error) {
	err := a.withdrawAll(ctx)
	rest(ctx, r, min(8000, int(time.Duration(a.c.Length).Milliseconds()/8)))
	return "made-up nodes gone: all", err
}

// conflicts are what a record may say that it should not. None of it may cost
// anybody a packet, if it is refused.
var conflicts = []struct {
	name string
	edit func(a *arena, r *rand.Rand, record *registry.Record)
}{
	{"another's prefix", func(a *arena, r *rand.Rand, record *registry.Record) {
		for _, p := range a.Nodes[a.anyNode(r)].PodCIDRs() {
			record.Prefixes = append(record.Prefixes, mesh.Claim{Prefix: p, Since: time.Now()})
		}
	}},
	{"a part of it", func(a *arena, r *rand.Rand, record *registry.Record) {
		p := a.Nodes[a.anyNode(r)].PodCIDRs()[0]
		record.Prefixes = append(record.Prefixes, mesh.Claim{Prefix: netip.PrefixFrom(p.Addr(), 25), Since: time.Now()})
	}},
	{"more than it", func(_ *arena, r *rand.Rand, record *registry.Record) {
		bits := 16 + r.IntN(7)
		p, _ := netip.AddrFrom4([4]byte{10, 244, 0, 0}).Prefix(bits)
		record.Prefixes = append(record.Prefixes, mesh.Claim{Prefix: p, Since: time.Now()})
	}},
	{"a default route", func(_ *arena, _ *rand.Rand, record *registry.Record) {
		record.Prefixes = append(record.Prefixes, mesh.Claim{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Since: time.Now()}, mesh.Claim{Prefix: netip.MustParsePrefix("::/0"), Since: time.Now()})
	}},
	{"a pod's address as its own", func(a *arena, r *rand.Rand, record *registry.Record) {
		p := a.pods[r.IntN(len(a.pods))]
		record.Addresses = append(record.Addresses, p.IPv4(), p.IPv6())
	}},
	{"an endpoint inside a prefix", func(a *arena, r *rand.Rand, record *registry.Record) {
		record.Endpoints = []string{netip.AddrPortFrom(a.pods[r.IntN(len(a.pods))].IPv4(), 51820).String()}
	}},
	{"another's endpoint", func(a *arena, r *rand.Rand, record *registry.Record) {
		record.Endpoints = []string{netip.AddrPortFrom(a.Nodes[a.anyNode(r)].IPv4, 51820).String()}
	}},
	{"the key of another made-up node", func(a *arena, r *rand.Rand, record *registry.Record) {
		record.PublicKey = a.rogues[r.IntN(len(a.rogues))].key
	}},
}

// conflict has a rogue claim what is another's.
func (a *arena) conflict(ctx context.Context, r *rand.Rand) (string, error) {
	g := a.rogues[r.IntN(len(a.rogues))]
	record := g.record(r)
	c := conflicts[r.IntN(len(conflicts))]
	c.edit(a, r, &record)
	sealed := r.IntN(4) > 0
	err := a.publish(ctx, g, record, sealed)
	rest(ctx, r, 400)
	return fmt.Sprintf("conflicting records: %s has %s (sealed if the mesh is: %v)", g.name, c.name, sealed), err
}

// robbery is a conflict that costs somebody traffic, as things are meant to be:
// somebody may write to the registry, and has the secret.
func (a *arena) robbery(ctx context.Context, r *rand.Rand) (string, error) {
	g, victim := a.rogues[r.IntN(len(a.rogues))], a.Nodes[a.anyNode(r)]
	record := g.record(r)
	var what string
	switch r.IntN(3) {
	case 0:
		key, err := publicKey(victim)
		if err != nil {
			return "", nil //nolint:nilerr // it is being replaced
		}
		what, record.PublicKey = "the key of "+victim.Name, key
	case 1:
		what = "the prefixes of " + victim.Name + " since 1970"
		for _, p := range victim.PodCIDRs() {
			record.Prefixes = append(record.Prefixes, mesh.Claim{Prefix: p, Since: time.Unix(0, 0)})
		}
	case 2:
		to := spots[r.IntN(len(spots))]
		what = fmt.Sprintf("the pods %v", to)
		for _, addr := range to {
			record.Pods = append(record.Pods, mesh.Claim{Prefix: netip.PrefixFrom(addr, addr.BitLen()), Since: time.Now()})
		}
	}
	err := a.publish(ctx, g, record, true)
	rest(ctx, r, 500)
	if err == nil {
		err = a.publish(ctx, g, registry.Record{Name: g.name, Left: true}, true)
	}
	return fmt.Sprintf("conflicting records: %s has %s for a moment", g.name, what), err
}

// fileOutages is all that may befall the shared file. Its older copy is of the
// action before.
func (a *arena) fileOutages() []action {
	older, at := []byte(nil), a.RegistryFile()
	spoil := func(name string, do func(*rand.Rand) error) action {
		return action{1, func(ctx context.Context, r *rand.Rand) (string, error) {
			if text, err := os.ReadFile(at); err == nil && r.IntN(2) == 0 {
				older = text
			}
			err := do(r)
			if errors.Is(err, fs.ErrNotExist) { // of the action before, and nobody has written since
				err = nil
			}
			rest(ctx, r, 800)
			return "registry outages: " + name, err
		}}
	}
	// away has the folder moved aside, and something else or nothing in its place.
	away := func(name string, block func() error) action {
		return action{1, func(ctx context.Context, r *rand.Rand) (string, error) {
			what := "registry outages: " + name
			if err := os.Rename(a.Shared, a.Shared+".away"); err != nil {
				return what, err
			}
			err := block()
			rest(ctx, r, 1500)
			if rerr := os.Remove(a.Shared); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
				err = errors.Join(err, rerr)
			}
			err = errors.Join(err, os.Rename(a.Shared+".away", a.Shared))
			rest(ctx, r, 400)
			return what, err
		}}
	}
	return []action{
		spoil("file emptied", func(*rand.Rand) error { return a.replace(nil) }),
		spoil("file truncated in place", func(r *rand.Rand) error { return os.Truncate(at, r.Int64N(500)) }),
		spoil("file has garbage", func(r *rand.Rand) error {
			garbage := make([]byte, 1+r.IntN(4000))
			for i := range garbage {
				garbage[i] = byte(r.Uint32())
			}
			return a.replace(garbage)
		}),
		spoil("file has no nodes", func(*rand.Rand) error { return a.replace([]byte(`{"version": 1, "nodes": {}}`)) }),
		spoil("file removed", func(*rand.Rand) error { return os.Remove(at) }),
		spoil("older copy restored", func(*rand.Rand) error {
			if older == nil {
				return nil
			}
			return a.replace(older)
		}),
		away("folder away", func() error { return nil }),
		away("a file in the folder's place", func() error { return os.WriteFile(a.Shared, nil, 0o644) }),
		// Root may read whatever has no permissions, but not a link to itself.
		away("folder unreadable", func() error { return os.Symlink(a.Shared, a.Shared) }),
	}
}

// etcdOutages is what may befall etcd.
func (a *arena) etcdOutages() []action {
	outage := func(weight int, name string, begin, end func(context.Context) error) action {
		return action{weight, func(ctx context.Context, r *rand.Rand) (string, error) {
			err := begin(ctx)
			rest(ctx, r, 1500)
			err = errors.Join(err, end(ctx))
			rest(ctx, r, 1000)
			return "registry outages: etcd " + name, err
		}}
	}
	kill := func(context.Context) error { return a.etcd.Kill() }
	return []action{
		outage(2, "killed", kill, a.etcd.Start),
		outage(1, "killed and wiped", kill, func(ctx context.Context) error { return errors.Join(a.etcd.Wipe(), a.etcd.Start(ctx)) }),
		outage(1, "stopped", func(context.Context) error { return a.etcd.Members[0].Pause() }, func(context.Context) error { return a.etcd.Members[0].Resume() }),
	}
}

// spots are the addresses that pods have in turn: most of them beyond all
// prefixes, some inside of one.
var spots = func() (all [][]netip.Addr) {
	for i := range 10 {
		all = append(all, []netip.Addr{netip.AddrFrom4([4]byte{10, 244, 99, byte(1 + i)}), netip.MustParseAddr(fmt.Sprintf("fd00:244:99::%x", 1+i))})
	}
	for i := range 3 {
		all = append(all, []netip.Addr{netip.AddrFrom4([4]byte{10, 244, byte(1 + i), 240}), netip.MustParseAddr(fmt.Sprintf("fd00:244:%x::f0f0", 1+i))})
	}
	return all
}()

// whereabouts are all addresses where there may be a pod, and one where there is none.
func (a *arena) whereabouts() (all []netip.AddrPort) {
	addresses := []netip.Addr{netip.MustParseAddr("10.244.250.1"), netip.MustParseAddr("fd00:244:250::1")}
	for _, s := range spots {
		addresses = append(addresses, s...)
	}
	for _, p := range a.pods {
		addresses = append(addresses, p.IPv4(), p.IPv6())
	}
	for _, addr := range addresses {
		all = append(all, netip.AddrPortFrom(addr, cluster.EchoPort))
	}
	return all
}
