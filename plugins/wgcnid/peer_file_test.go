package main

import (
	"bytes"
	"encoding/json"
	"image"
	"image/color"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/makiuchi-d/gozxing"
	"github.com/makiuchi-d/gozxing/qrcode"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
)

// With segments the file has exactly what the machine may talk to.
func TestPeerSegments(t *testing.T) {
	m := newPeerMesh(t, 0)
	for name, segments := range map[string][]string{"a": {"lab", "office"}, "b": {"lab"}, "c": {"office"}} {
		r := m.stored(name)
		r.Segments, r.Revision = segments, 2
		m.publish(r)
	}
	file := m.addPeer("laptop", "--segment", "lab", "--via", "b")
	want := "AllowedIPs = 10.244.1.0/24, 10.244.2.0/24, fd00:244:1::/64, fd00:244:2::/64\n"
	if !strings.Contains(file, want) || !strings.Contains(file, "print this file again when the mesh has grown") {
		t.Errorf("want %s in\n%s", want, file)
	}
}

// A machine of one family is told nothing of the other.
func TestPeerOfOneFamily(t *testing.T) {
	for peerCIDR, want := range map[string]string{
		"10.99.0.0/24": "AllowedIPs = 10.244.1.0/32, 10.99.0.0/24, 10.244.0.0/16\n",
		"fc99::/64":    "AllowedIPs = fd00:244:1::/128, fc99::/64, fd00::/16\n",
	} {
		m := newPeerMesh(t, 0, peerCIDR)
		if file := m.addPeer("laptop", "--via", "a", "--via", "b"); !strings.Contains(file, want) || !strings.Contains(file, "PostUp = coproc") {
			t.Errorf("want %s in\n%s", want, file)
		}
	}
}

// An entry node's endpoint stays outside of the tunnel.
func TestPeerReachesEndpoints(t *testing.T) {
	m := newPeerMesh(t, 0)
	m.configure(t, "externalCIDRs", []string{"192.0.2.0/30"})
	if file := m.addPeer("laptop"); !strings.Contains(file, "192.0.2.0/32, 192.0.2.2/31, ") {
		t.Errorf("the file is\n%s", file)
	}
}

func TestPeerOfItsOwnKey(t *testing.T) {
	m := newPeerMesh(t, 0)
	key := wgtypes.Key{200}
	file := m.addPeer("laptop", "--public-key", key.String(), "--endpoint", "203.0.113.1:51999")
	if m.stored("laptop").PublicKey != key {
		t.Error("it was added with another key")
	}
	for _, want := range []string{"\nPostUp = wg set %i private-key /etc/wireguard/laptop.key\n", "\nListenPort = 51999\n"} {
		if !strings.Contains(file, want) {
			t.Errorf("%q is missing in\n%s", want, file)
		}
	}
	for _, not := range []string{"PrivateKey", "PersistentKeepalive", "PresharedKey"} {
		if strings.Contains(file, not) {
			t.Errorf("%q is in\n%s", not, file)
		}
	}
}

// A file that others may read is refused before anything is done.
func TestPeerNotForOthers(t *testing.T) {
	m := newPeerMesh(t, 0)
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "laptop.conf"), os.O_CREATE|os.O_WRONLY, 0o644)
	m.must(err)
	defer f.Close()
	root := rootCommand()
	root.SetOut(f)
	root.SetErr(new(bytes.Buffer))
	root.SetArgs([]string{"peer", "add", "laptop", "--config", m.conf})
	if err := root.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), "umask 077") {
		t.Errorf("error %v", err)
	}
	if r := m.stored("laptop"); r.Name != "" {
		t.Error("it was added")
	}
}

func TestPeerRenew(t *testing.T) {
	m := newPeerMesh(t, 2)
	older, newer := m.trust.Secrets[0], m.trust.Secrets[1]
	m.addPeer("laptop", "--via", "a")
	before := m.stored("laptop")
	m.trust.Secrets[0], m.trust.Secrets[1] = newer, older
	m.writeSecrets()
	if _, _, err := m.run("peer", "config", "laptop", "--renew"); err == nil || !strings.HasPrefix(err.Error(), "--renew: a, by which laptop enters, does not use secret "+string(newer.ID())+" yet") {
		t.Errorf("error %v", err)
	}
	a := m.stored("a")
	a.Revision++
	m.publish(a)
	for _, args := range []string{"secret list", "status-seal"} {
		note := behindNote(behindSecrets(m.trust, registry.NewSnapshot(before)))
		if args == "secret list" {
			note, _, _ = m.run("secret", "list")
		}
		if !strings.Contains(note, "peers that depend on an older secret: 1: laptop") {
			t.Errorf("%s says %s", args, note)
		}
	}
	file, errs, err := m.run("peer", "config", "laptop", "--renew")
	m.must(err)
	after := m.stored("laptop")
	if after.Seal.Secret != newer.ID() || !after.Since.Equal(before.Since) || !slices.Equal(claimed(after), claimed(before)) {
		t.Errorf("renewed it is %+v", after)
	}
	if psk := newer.PresharedKey(wgtypes.Key{1}, after.PublicKey).String(); !strings.Contains(file, "PresharedKey = "+psk+"\n") {
		t.Error("the file has another preshared key")
	}
	if !strings.Contains(errs, "its old file is of no use any more") {
		t.Errorf("it says %q", errs)
	}
	if out, _, _ := m.run("secret", "list"); strings.Contains(out, "older secret") {
		t.Errorf("secret list still says\n%s", out)
	}
}

func TestPeerList(t *testing.T) {
	now := joinedAt.Add(time.Hour)
	m := newPeerMesh(t, 0)
	for _, args := range []string{"laptop --via a --via b", "phone --via b --via a", "site --nat --subnet 192.168.1.0/24", "new"} {
		m.addPeer(strings.Fields(args)...)
	}
	carry := func(name string, peers ...string) {
		r := m.stored(name)
		r.Revision++
		for _, p := range peers {
			for _, c := range m.stored(p).Prefixes {
				r.Pods = append(r.Pods, mesh.Claim{Prefix: c.Prefix, Since: c.Since})
			}
		}
		m.publish(r)
	}
	carry("a", "laptop")
	carry("b", "phone")
	c, v := m.config, meshView{}
	c.PeerCIDRs = []netip.Prefix{netip.MustParsePrefix("10.99.0.0/29"), netip.MustParsePrefix("fc99::/64")}
	snapshot, err := m.registry.Snapshot(t.Context())
	m.must(err)
	v.records = snapshot
	heard := map[wgtypes.Key]kernel.Handshake{
		m.stored("laptop").PublicKey: {At: now.Add(-5 * time.Second)}, m.stored("site").PublicKey: {At: now.Add(-time.Hour)},
	}
	var out strings.Builder
	m.must(printPeers(&out, listPeers(c, v, heard, now), false))
	want := `PEER    ADDRESSES                                  VIA  CARRIED BY  HANDSHAKE   SEGMENTS  SEALED BY  STATE
laptop  10.99.0.1/32 fc99::1/128                   a b  a           5s ago      -         -          connected
new     10.99.0.4/32 fc99::4/128                   a    -           -           -         -          not carried
phone   10.99.0.2/32 fc99::2/128                   b a  b           -           -         -          elsewhere
site    10.99.0.3/32 fc99::3/128 192.168.1.0/24    a    nat         1h0m0s ago  -         -          idle
`
	squeeze := func(s string) string { return regexp.MustCompile(` +`).ReplaceAllString(s, " ") }
	if diff := cmp.Diff(squeeze(want), squeeze(out.String())); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	var l PeerList
	text, _, err := m.run("peer", "list", "--json")
	if err != nil || json.Unmarshal([]byte(text), &l) != nil || len(l.Peers) != 4 || l.Peers[0].CarriedBy != "a" {
		t.Errorf("%v: %s", err, text)
	}
	if out, _, _ := newPeerMesh(t, 0).run("peer", "list"); !strings.Contains(out, "There are no peers") {
		t.Errorf("without peers: %s", out)
	}
	if out, _, _ := m.run("nodes"); !regexp.MustCompile(`(?m)^phone +peer `).MatchString(out) {
		t.Errorf("nodes:\n%s", out)
	}
}

// What a phone sees is the file, with its private key, and without any hook.
func TestPeerQR(t *testing.T) {
	m := newPeerMesh(t, 1)
	out := m.addPeer("phone", "--via", "a", "--via", "b", "--qr")
	got := scan(t, out)
	if strings.Count(got, "[Peer]") != 1 || strings.ContainsAny(got, "#") || strings.Contains(got, "PostUp") || !strings.Contains(got, "\nPersistentKeepalive = 25\n") {
		t.Errorf("the code says\n%s", got)
	}
	private := regexp.MustCompile(`(?m)^PrivateKey = (.*)$`).FindStringSubmatch(got)
	if private == nil {
		t.Fatalf("the code has no private key:\n%s", got)
	}
	if key, err := identity.ParsePrivateKey(private[1]); err != nil || key.Public() != m.stored("phone").PublicKey {
		t.Errorf("the private key is another's, or %v", err)
	}
	keyFile := filepath.Join(t.TempDir(), "key")
	m.must(os.WriteFile(keyFile, []byte(private[1]), 0o600))
	again, _, err := m.run("peer", "config", "phone", "--qr", "--private-key-file", keyFile)
	if err != nil || scan(t, again) != got {
		t.Errorf("again: %v", err)
	}
}

// scan reads a code as a camera does, from the colours that a terminal shows.
func scan(t *testing.T, drawn string) string {
	t.Helper()
	const pixels = 4 // a module
	rows := strings.Split(strings.TrimSuffix(drawn, "\n"), "\n")
	width := 0
	light := map[image.Point]bool{}
	for y, row := range rows {
		row = strings.TrimSuffix(strings.TrimPrefix(row, "\x1b[97;40m"), "\x1b[0m")
		for x, r := range []rune(row) {
			width = max(width, x+1)
			light[image.Pt(x, 2*y)] = r == '█' || r == '▀'
			light[image.Pt(x, 2*y+1)] = r == '█' || r == '▄'
		}
	}
	img := image.NewGray(image.Rect(0, 0, width*pixels, 2*len(rows)*pixels))
	for x := range img.Rect.Dx() {
		for y := range img.Rect.Dy() {
			if light[image.Pt(x/pixels, y/pixels)] {
				img.SetGray(x, y, color.Gray{Y: 255})
			}
		}
	}
	bits, err := gozxing.NewBinaryBitmapFromImage(img)
	if err != nil {
		t.Fatal(err)
	}
	result, err := qrcode.NewQRCodeReader().Decode(bits, nil)
	if err != nil {
		t.Fatalf("the code cannot be read: %v\n%s", err, drawn)
	}
	return result.GetText()
}

// A gateway that only its own location can call is no entry from outside.
func TestPeerPassesOverGatewaysBehindNAT(t *testing.T) {
	m := newPeerMesh(t, 0)
	r := m.stored("b")
	r.Role, r.Location, r.CalledInside, r.Revision = mesh.RoleGateway, "cloud", true, 2
	m.publish(r)
	m.addPeer("laptop")
	if via := m.stored("laptop").Via; len(via) != 1 || via[0] != "a" {
		t.Errorf("it enters by %q, want this node", via)
	}
}
