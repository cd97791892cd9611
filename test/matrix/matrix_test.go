package matrix

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSection(t *testing.T) {
	cell := func(row, column string, o Outcome) Cell {
		return Cell{Table: Primaries, Row: row, Detail: "host-local", Column: column, Outcome: o}
	}
	userspace := []Cell{cell("bridge", "IPv4", Works), cell("bridge", "IPv6", Fails), cell("macvlan", "IPv4", Refused), cell("ipvlan", "IPv4", Impossible)}
	kernel := []Cell{cell("bridge", "IPv4", Works), cell("bridge", "IPv6", Works), cell("ipvlan", "IPv4", Refused), cell("vlan", "IPv6", Works)}
	text := Section(userspace, kernel)
	for _, want := range []string{
		"| primary plugin | IPAM | IPv4 | IPv6 |\n",
		"| bridge | host-local | ✓ | ✗ᵘ ✓ᵏ |\n",
		"| macvlan | host-local | ⊘ᵘ |  |\n",
		"| ipvlan | host-local | ⊘ᵏ |  |\n",
		"| vlan | host-local |  | ✓ᵏ |\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no line %q in\n%s", want, text)
		}
	}
}

func TestReplace(t *testing.T) {
	got, err := Replace("a\n"+Begin+"\nold\n"+End+"\nz\n", "new\n")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff("a\n"+Begin+"\nnew\n"+End+"\nz\n", got); d != "" {
		t.Error(d)
	}
	for _, text := range []string{"", Begin + "\n", End, Begin + " " + End} {
		if _, err := Replace(text, "new"); err == nil {
			t.Errorf("%q: no error", text)
		}
	}
}

func TestSaveAndLoad(t *testing.T) {
	file := filepath.Join(t.TempDir(), Userspace.File())
	if cells, err := Load(file); err != nil || cells != nil {
		t.Errorf("no file: %v, %v", cells, err)
	}
	want := []Cell{{Chained, "portmap", "a port answers", "before", Works}, {Primaries, "bridge", "host-local", "IPv4", Fails}}
	if err := Save(file, want); err != nil {
		t.Fatal(err)
	}
	got, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if err := Save(file, []Cell{{Outcome: "perhaps"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(file); err == nil {
		t.Error("an outcome that is none was read")
	}
}
