package reconcile

import (
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel"
)

// Each drawing is a look a second: > something was sent since the one before, < some
// came, x both, . none, 0 the count of another interface. Below, X is where the name
// is to be looked up.
func TestCalledInVain(t *testing.T) {
	for _, c := range []struct{ name, looks, want string }{
		{"idle", "......", "------"},
		{"well", "xxx.x.xxxx", "----------"},
		{"only takes in", ">>>><>>>><>>", "---X---XX---"},
		{"dies under traffic", "xx>>>>>>", "----XXXX"},
		{"is called once, and does not answer", ".....>.......", "-------XXXXXX"},
		{"sends although it is not sent to", "<<<<<<", "------"},
		{"comes back", "x>>>>x>", "---XX--"},
		{"another interface", "x>>>>0>>>", "---XX---X"},
		{"nobody calls it any more", "x>................................", "---XXXXXXXXXXXXXXXXXXXXXXXXXXXX---"},
	} {
		var n answers
		h, now, got := kernel.Handshake{Received: 1000, Sent: 1000}, time.Unix(1e9, 0), ""
		for _, l := range c.looks {
			switch l {
			case '>':
				h.Sent += 100
			case '<':
				h.Received += 100
			case 'x':
				h.Sent, h.Received = h.Sent+100, h.Received+100
			case '0':
				h = kernel.Handshake{}
			}
			mark := "-"
			if n.look(wgtypes.Key{1}, h, now) {
				mark = "X"
			}
			got, now = got+mark, now.Add(time.Second)
		}
		if got != c.want {
			t.Errorf("%s:\nlooks %s\ngot   %s\nwant  %s", c.name, c.looks, got, c.want)
		}
	}
}
