package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"testing"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/store"
	"github.com/wgcni/wgcni/test/cluster"
)

const attachmentsDB = "/run/wgcni/attachments.db"

// del calls DEL and checks what it promises whatever the circumstances: exit 0,
// within a second, nothing on stdout. A failing DEL leaks the pod's address in
// the primary's IPAM (containerd#12130, cilium#8313).
func del(t *testing.T, n *cluster.Node, c call) reply {
	t.Helper()
	c.verb, c.ifname = "DEL", "eth0"
	var r reply
	for range 3 { // this machine may be busy, and that only ever makes it slower
		if r = plugin(t, n, c); r.code != 0 || r.took < prompt {
			break
		}
	}
	if r.code != 0 || r.stdout != "" {
		t.Errorf("exit status %d, stdout %q, stderr %q", r.code, r.stdout, r.stderr)
	}
	if r.took >= prompt {
		t.Errorf("it took %v: %s", r.took, r.stderr)
	}
	return r
}

func lockFile(path string) (release func() error, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, err
	}
	return f.Close, nil
}

// circumstances of a DEL: what they do, and how they end. One that leaves the
// attachment must also leave it to the helper.
var circumstances = []struct {
	name  string
	make  func(n *cluster.Node) (end func() error, err error)
	keys  map[string]any // of the stanza
	leave bool           // the attachment stays for the helper's sweep
	lost  bool           // all attachments are lost with the store
}{
	{name: "all is well"},
	{name: "unknown key", keys: map[string]any{"clusterCidr": 5}},
	{name: "wrong values", keys: map[string]any{"clusterCIDRs": "x", "registry": nil, "mtu": true}},
	{name: "a store of garbage", lost: true, make: damaged(func([]byte) []byte { return bytes.Repeat([]byte("garbage "), 5000) })},
	// Cut where pods begin: bbolt may have all that counts in the first half of its pages.
	{name: "a store cut in the middle", lost: true, make: damaged(func(b []byte) []byte {
		head, _, _ := bytes.Cut(b, []byte("containerID"))
		return head
	})},
	{name: "a store of one page", lost: true, make: damaged(func(b []byte) []byte { return b[:4096] })},
	{name: "zeroed pages", lost: true, make: damaged(func(b []byte) []byte { clear(b[8192:]); return b })},
	{name: "pages of random content", lost: true, make: damaged(func(b []byte) []byte {
		for i := 8192; i < len(b); i++ {
			b[i] = byte(i*i>>3) ^ byte(i)
		}
		return b
	})},
	{name: "a value that is no JSON", make: damagedValue("{no json")},
	{name: "a value that is no attachment", make: damagedValue(`["x"]`)},
	{name: "a run folder that never was", keys: map[string]any{"runDir": "/run/none"}, leave: true},
	{name: "a file in the place of the run folder", keys: map[string]any{"runDir": "/etc/hostname"}, leave: true},
	{name: "our lock held", leave: true, make: func(n *cluster.Node) (func() error, error) {
		return lockFile(n.Path(attachmentsDB + ".lock"))
	}},
	{name: "bbolt's lock held", leave: true, make: func(n *cluster.Node) (func() error, error) {
		db, err := bolt.Open(n.Path(attachmentsDB), 0o600, nil)
		if err != nil {
			return nil, err
		}
		return db.Close, nil
	}},
	{name: "a read-only disk", leave: true, make: func(n *cluster.Node) (func() error, error) {
		err := nsenter(n, "mount --bind /run/wgcni /run/wgcni && mount -o remount,bind,ro /run/wgcni")
		return func() error { return nsenter(n, "umount /run/wgcni") }, err
	}},
}

func nsenter(n *cluster.Node, script string) error {
	return n.Command(context.Background(), "sh", "-c", script).Run()
}

func damaged(change func([]byte) []byte) func(n *cluster.Node) (func() error, error) {
	return func(n *cluster.Node) (func() error, error) {
		path := n.Path(attachmentsDB)
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		return nil, os.WriteFile(path, change(b), 0o600)
	}
}

func damagedValue(value string) func(n *cluster.Node) (func() error, error) {
	return func(n *cluster.Node) (func() error, error) {
		db, err := bolt.Open(n.Path(attachmentsDB), 0o600, nil)
		if err != nil {
			return nil, err
		}
		err = db.Update(func(tx *bolt.Tx) error {
			return tx.Bucket([]byte("attachments")).Put([]byte("other\x00eth0"), []byte(value))
		})
		if cerr := db.Close(); err == nil {
			err = cerr
		}
		return nil, err
	}
}

// TestDELAlwaysSucceeds runs with the helper down, which is a circumstance of
// its own; what DEL could not do is done once the helper runs again.
func TestDELAlwaysSucceeds(t *testing.T) {
	c := configured(t, 1, cluster.NetworkOptions{})
	n := c.Nodes[0]
	helperDown(t, helperUp(t, n))

	t.Run("odd calls", func(t *testing.T) {
		good := stanza(t, n, nil)
		addPod(t, n, cluster.NetworkName, "kept", cluster.PodOptions{})
		kept := cluster.ContainerID(cluster.NetnsPath("kept"))
		for name, c := range map[string]call{
			"unknown container":              {container: "unknown", netns: "/run/netns/kept", stdin: good},
			"neither netns nor prevResult":   {container: "unknown", stdin: good}, // containerd's second DEL
			"a netns that is gone":           {container: "unknown", netns: "/run/netns/none", stdin: good},
			"a netns that is none":           {container: "unknown", netns: "/etc/hostname", stdin: good},
			"CNI 0.3.1, without prevResult":  {container: "unknown", stdin: stanza(t, n, map[string]any{"cniVersion": "0.3.1"})},
			"a prevResult that is none":      {container: "unknown", stdin: stanza(t, n, map[string]any{"prevResult": map[string]any{"ips": "x"}})},
			"another network, other address": {container: "unknown", stdin: stanza(t, n, map[string]any{"name": "other"})},
		} {
			t.Run(name, func(t *testing.T) {
				if r := del(t, n, c); r.stderr != "" {
					t.Errorf("it warns of nothing that could be mended: %s", r.stderr)
				}
				if got := containers(t, n); !slices.Equal(got, []string{kept}) {
					t.Errorf("attachments %v, want %s", got, kept)
				}
			})
		}
		for _, which := range []string{"first", "second", "third"} {
			del(t, n, call{container: kept, stdin: good})
			if got := containers(t, n); len(got) != 0 {
				t.Errorf("after the %s DEL: %v", which, got)
			}
		}
		if got := leases(t, n); len(got) != 2 {
			t.Errorf("leases %v: those of kept are bridge's to give back", got)
		}
		if _, err := n.CNI(t.Context(), "del", cluster.NetworkName, "/run/netns/kept"); err != nil {
			t.Error(err)
		}
	})

	for i, tt := range circumstances {
		t.Run(tt.name, func(t *testing.T) {
			name := fmt.Sprintf("pod%d", i)
			p := addPod(t, n, cluster.NetworkName, name, cluster.PodOptions{})
			end := func() error { return nil }
			if tt.make != nil {
				e, err := tt.make(n)
				if err != nil {
					t.Fatal(err)
				}
				if e != nil {
					end = e
				}
			}
			r := del(t, n, call{container: p.ContainerID(), netns: p.Netns, stdin: stanza(t, n, tt.keys)})
			if said := r.stderr != ""; said != (tt.leave || tt.lost) && tt.keys == nil {
				t.Errorf("stderr %q", r.stderr)
			}
			if tt.keys == nil {
				// The whole chain, so that bridge gives back the address.
				if _, err := p.CNI(t.Context(), "del"); err != nil {
					t.Error(err)
				}
				if got := leases(t, n); slices.Contains(got, p.IPv4().String()) || slices.Contains(got, p.IPv6().String()) {
					t.Errorf("leaked in IPAM: %v", got)
				}
			}
			if err := end(); err != nil {
				t.Fatal(err)
			}
			if _, ok := attachments(t, n)[p.ContainerID()]; ok != tt.leave {
				t.Errorf("still attached: %v, want %v", ok, tt.leave)
			}
			if !tt.leave {
				deletePod(t, p)
			}
		})
	}

	// The namespaces of those that were left go, and nobody calls DEL again: a
	// crash of the runtime (containerd#12923).
	before := containers(t, n)
	if len(before) == 0 {
		t.Fatal("nothing was left to the helper")
	}
	h := helperUp(t, n)
	if got := containers(t, n); len(got) != len(before) {
		t.Errorf("the helper forgot pods whose namespace is there: %v of %v", got, before)
	}
	for i, tt := range circumstances {
		if tt.leave {
			removeNetns(t, n, fmt.Sprintf("pod%d", i))
		}
	}
	if err := cluster.Poll(t.Context(), "the helper to sweep", func() error {
		left, err := stored(t.Context(), n)
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("left: %v", left)
		}
		return err
	}); err != nil {
		t.Errorf("%v\n%s", err, h.Log)
	}
	agrees(t, n)
	if s, err := n.Status(t.Context()); err != nil || s.Pods != 0 {
		t.Errorf("%d pods, %v", s.Pods, err)
	}
}

// TestDELWithoutAnything: neither a boot with a pod, nor a key, nor a folder, and
// DEL makes none: the portmap plugin's took a lock with nothing to do.
func TestDELWithoutAnything(t *testing.T) {
	c := configured(t, 1, cluster.NetworkOptions{})
	n := c.Nodes[0]
	if r := del(t, n, call{container: "unknown", stdin: stanza(t, n, nil)}); r.stderr != "" {
		t.Errorf("stderr %q", r.stderr)
	}
	for _, dir := range []string{"/run/wgcni", "/var/lib/wgcni/private.key"} {
		if _, err := os.Stat(n.Path(dir)); !os.IsNotExist(err) {
			t.Errorf("DEL made %s: %v", dir, err)
		}
	}
	if _, err := os.Stat(store.KnownPath(n.Path("/var/lib/wgcni"))); !os.IsNotExist(err) {
		t.Errorf("DEL made the store of peers: %v", err)
	}
}
