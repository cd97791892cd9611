package userspace

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
)

// fakeBind refuses as Linux does, and keeps what it has sent.
type fakeBind struct {
	conn.Bind
	together bool // whether several at once may be sent
	away     bool // nothing can be sent
	sent     []string
}

// fakeEndpoint has a source address until it is made anew.
type fakeEndpoint struct {
	conn.Endpoint
	gone bool // the source address is
}

func (e fakeEndpoint) SrcIP() (a netip.Addr) {
	if e.gone {
		a = netip.IPv4Unspecified()
	}
	return a
}

func (e fakeEndpoint) DstToString() string { return "192.0.2.1:1" }

func (b *fakeBind) ParseEndpoint(string) (conn.Endpoint, error) { return fakeEndpoint{}, nil }

func (b *fakeBind) Send(bufs [][]byte, to conn.Endpoint) error {
	switch {
	case b.away:
		return unix.ENETUNREACH
	case to.SrcIP().IsValid(), len(bufs) > 1 && !b.together:
		return unix.EINVAL
	}
	for _, one := range bufs {
		b.sent = append(b.sent, string(one))
	}
	return nil
}

func TestSendAgain(t *testing.T) {
	bufs := [][]byte{[]byte("a"), []byte("b"), []byte("c")}
	all := []string{"a", "b", "c"}
	for name, tt := range map[string]struct {
		bind fakeBind
		to   fakeEndpoint
		want []string
		err  error
	}{
		"at once":                      {bind: fakeBind{together: true}, want: all},
		"one by one":                   {want: all},
		"from another address":         {bind: fakeBind{together: true}, to: fakeEndpoint{gone: true}, want: all},
		"one by one, from another":     {to: fakeEndpoint{gone: true}, want: all},
		"the underlay is away":         {bind: fakeBind{away: true}, err: unix.ENETUNREACH},
		"both away and from elsewhere": {bind: fakeBind{away: true}, to: fakeEndpoint{gone: true}, err: unix.ENETUNREACH},
	} {
		err := newBind(&tt.bind).Send(bufs, tt.to)
		if diff := cmp.Diff(tt.want, tt.bind.sent); diff != "" || !errors.Is(err, tt.err) {
			t.Errorf("%s: error %v, want %v; sent (-want +got):\n%s", name, err, tt.err, diff)
		}
	}
}
