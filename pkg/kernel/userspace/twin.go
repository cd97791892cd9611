package userspace

import (
	"reflect"
	"unsafe"

	"golang.zx2c4.com/wireguard/conn"
)

// twin sends to IPv6 endpoints by the sockets of another bind.
//
// The library pools the addresses that it sends to. It cuts one to 4 bytes for an
// IPv4 endpoint, and for an IPv6 one copies the address before it lengthens the
// slice (StdNetBind.Send in conn/bind_std.go): what was pooled by the one and is
// used by the other keeps 12 bytes of an earlier address, and the packets go to
// some other machine. Each bind has a pool of its own, so one for each family never
// comes to that. Nothing that the library exports gives a bind another's sockets.
type twin struct{ conn.Bind }

// follow takes over the sockets that a bind has just opened. Of a bind that is not
// the library's there is no twin.
func (t *twin) follow(b conn.Bind) {
	t.Bind = nil
	from, ok := b.(*conn.StdNetBind)
	if !ok {
		return
	}
	to, _ := conn.NewStdNetBind().(*conn.StdNetBind)
	for _, name := range []string{"ipv6", "ipv6PC", "ipv6TxOffload"} {
		theirs, ours := field(from, name), field(to, name)
		if !theirs.IsValid() || !ours.IsValid() {
			return
		}
		ours.Set(theirs)
	}
	t.Bind = to
}

func field(b *conn.StdNetBind, name string) reflect.Value {
	f := reflect.ValueOf(b).Elem().FieldByName(name)
	if !f.IsValid() {
		return f
	}
	return reflect.NewAt(f.Type(), unsafe.Pointer(f.UnsafeAddr())).Elem()
}
