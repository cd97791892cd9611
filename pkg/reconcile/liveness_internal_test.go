package reconcile

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// Each drawing is a look a second: | more bytes have come from the other gateway,
// . none, d none since this machine is cut off, 0 the count of another interface,
// ? the other is no WireGuard peer just now, ! it is no gateway any more, and a
// blank no look at all. Below, X is where the other is accused.
func TestLiveness(t *testing.T) {
	for _, c := range []struct {
		name        string
		said        bool // an accusation of an earlier run
		looks, want string
	}{
		{
			name: "heard", looks: "|..|..|..|..|..|..|",
			want: "-------------------",
		},
		{
			name: "dies and comes back", looks: "|..|..|...............|..|..|..|",
			want: "---------------XXXXXXXXXXXXX----",
		},
		{
			name: "two of three keepalives lost", looks: "|..|........|..|........|..|",
			want: "----------------------------",
		},
		{
			name: "never heard since the start", looks: ".............|..|..|..|",
			want: "---------XXXXXXXXXX----",
		},
		{
			name: "a few bytes are no return", looks: "|............|......|.......|..|..|",
			want: "---------XXXXXXXXXXXXXXXXXXXXXXXXX-",
		},
		{
			name: "starved: looks two seconds apart", looks: "| . . . . . . . | | | | ",
			want: "- - - - - X X X X X X - ",
		},
		{
			name: "asleep for a minute", looks: "|..|.      .......|..|",
			want: "-----      -----------",
		},
		{
			name: "asleep, and the other died meanwhile", looks: "|..|.      ...........",
			want: "-----      ---------XX",
		},
		{
			name: "an accusation outlasts a nap", looks: "|...........     ...........|..|..|",
			want: "---------XXX     XXXXXXXXXXXXXXXXX-",
		},
		{
			name: "cut off, and back", looks: "|..|dddddddddddddd....|..|..",
			want: "----------------------------",
		},
		{
			name: "cut off and back, and the other has died", looks: "|..|ddddd.............",
			want: "-----------------XXXXX",
		},
		{
			name: "a new tunnel of our own", looks: "|..|......0........|..|",
			want: "-----------------------",
		},
		{
			name: "not a peer for a while", looks: "|..|......????????..........",
			want: "---------------------------X",
		},
		{
			name: "accused and not a peer for a while", looks: "|..........??????....|..|..|",
			want: "---------XXXXXXXXXXXXXXXXXX-",
		},
		{
			name: "no gateway any more", looks: "|...........!!!..|..|..",
			want: "---------XXX-----------",
		},
		{
			name: "said before a restart, and still silent", said: true, looks: "..............",
			want: "XXXXXXXXXXXXXX",
		},
		{
			name: "said before a restart, and heard again", said: true, looks: "..|..|..|..",
			want: "XXXXXXXX---",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := draw(c.looks, c.said); got != c.want {
				t.Errorf("looks %s\nwant  %s\ngot   %s", c.looks, c.want, got)
			}
		})
	}
}

var liveEpoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// draw runs a drawing, and makes the one below it.
func draw(looks string, said bool) string {
	var before []mesh.Silence
	if said {
		before = []mesh.Silence{{Node: "b", Since: liveEpoch.Add(-time.Hour)}}
	}
	v, bytes := newLiveness(before), int64(1000)
	var out strings.Builder
	for i, look := range looks {
		received := map[string]int64{"b": bytes}
		switch look {
		case ' ':
			out.WriteByte(' ')
			continue
		case '|':
			bytes += 32
			received["b"] = bytes
		case '0':
			bytes = 0
			received["b"] = bytes
		case '?':
			received["b"] = -1
		case '!':
			delete(received, "b")
		}
		v.look(liveEpoch.Add(time.Duration(i)*time.Second), look == 'd', received)
		if len(v.silences()) > 0 {
			out.WriteByte('X')
		} else {
			out.WriteByte('-')
		}
	}
	return out.String()
}

// A clock that is set, forwards or back, neither accuses nor takes back.
func TestLivenessClockJumps(t *testing.T) {
	for _, jump := range []time.Duration{-time.Hour, 4 * time.Second, 24 * time.Hour} {
		v, now, bytes := newLiveness(nil), liveEpoch, int64(0)
		look := func(n int, heard bool) {
			for range n {
				if now = now.Add(time.Second); heard {
					bytes++
				}
				v.look(now, false, map[string]int64{"b": bytes})
			}
		}
		look(5, true)
		look(8, false)
		now = now.Add(jump)
		look(9, false)
		if got := v.silences(); got != nil {
			t.Errorf("jump of %v: accused at once: %v", jump, got)
		}
		look(1, false)
		said := v.silences()
		if want := []mesh.Silence{{Node: "b", Since: now}}; cmp.Diff(want, said) != "" {
			t.Errorf("jump of %v: %v, want %v", jump, said, want)
		}
		look(4, true)
		now = now.Add(jump)
		look(5, true)
		if got := v.silences(); cmp.Diff(said, got) != "" {
			t.Errorf("jump of %v: %v became %v", jump, said, got)
		}
		look(2, true)
		if got := v.silences(); got != nil {
			t.Errorf("jump of %v: heard for six seconds, and still %v", jump, got)
		}
	}
}

// Each gateway is judged by itself, and all accusations are sorted.
func TestLivenessOfMany(t *testing.T) {
	v := newLiveness(nil)
	for i := range 20 {
		n := int64(i)
		v.look(liveEpoch.Add(time.Duration(i)*time.Second), false, map[string]int64{"c": min(n, 3), "a": min(n, 5), "b": n})
	}
	want := []mesh.Silence{{Node: "a", Since: liveEpoch.Add(14 * time.Second)}, {Node: "c", Since: liveEpoch.Add(12 * time.Second)}}
	if diff := cmp.Diff(want, v.silences()); diff != "" {
		t.Errorf("accused (-want +got):\n%s", diff)
	}
}
