package userspace

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn/bindtest"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// The library tells of packets with a source that is not allowed by its log alone:
// should it word that in another way, this fails.
func TestCountUnallowed(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	counter, logs := newCounter(), filepath.Join(t.TempDir(), "tunnel.log")
	path := countsPath(logs)
	if err := os.WriteFile(path, []byte(`{"unallowedSource": 99}`), 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); counter.keep(ctx, path, time.Millisecond) }()
	t.Cleanup(func() { cancel(); <-done })

	keys := [2]wgtypes.Key{}
	for i := range keys {
		var err error
		if keys[i], err = wgtypes.GeneratePrivateKey(); err != nil {
			t.Fatal(err)
		}
	}
	binds := bindtest.NewChannelBinds()
	tuns := [2]*tuntest.ChannelTUN{tuntest.NewChannelTUN(), tuntest.NewChannelTUN()}
	allowed := [2]string{"allowed_ip=0.0.0.0/0\nallowed_ip=::/0\n", "allowed_ip=10.0.0.1/32\nallowed_ip=fd00::1/128\n"}
	for i := range 2 {
		logger := &device.Logger{Verbosef: device.DiscardLogf, Errorf: t.Logf}
		if i == 1 {
			logger.Verbosef = counter.verbosef
		}
		d := device.NewDevice(tuns[i].TUN(), binds[i], logger)
		t.Cleanup(d.Close)
		public := keys[1-i].PublicKey()
		if err := d.IpcSet(fmt.Sprintf("private_key=%s\nreplace_peers=true\npublic_key=%s\nendpoint=127.0.0.1:%d\n%s", // bindtest: that of the other end is 1 or 2
			hex.EncodeToString(keys[i][:]), hex.EncodeToString(public[:]), 1+i, allowed[i])); err != nil {
			t.Fatal(err)
		}
		if err := d.Up(); err != nil {
			t.Fatal(err)
		}
	}
	send := func(from, to string) {
		tuns[0].Outbound <- tuntest.Ping(netip.MustParseAddr(to), netip.MustParseAddr(from))
	}
	arrive := func() {
		t.Helper()
		select {
		case got := <-tuns[1].Inbound:
			if len(got) == 0 {
				t.Error("an empty packet")
			}
		case <-time.After(10 * time.Second):
			t.Fatal("nothing arrives")
		}
	}
	send("10.0.0.1", "10.0.0.2")
	arrive()
	for range 3 {
		send("10.0.0.66", "10.0.0.2")
	}
	send("10.0.0.1", "10.0.0.2")
	arrive() // behind the others
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		c, err := ReadCounts(logs)
		if err == nil && c.UnallowedSource == 3 {
			break
		}
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(path)
			t.Fatalf("%+v, %v: %s; want 3", c, err, bytes.TrimSpace(text))
		}
	}
}
