package identity

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func ids(s Secrets) (out []SecretID) {
	for _, s := range s {
		out = append(out, s.ID())
	}
	return out
}

func TestLoadSecrets(t *testing.T) {
	a, b, c := vectors[0], vectors[1], vectors[2]
	many := make([]string, 0, maxSecrets+1)
	for i := range maxSecrets + 1 {
		s, err := NewSecret(time.Date(2026, 1, 1, i, 0, 0, 0, time.UTC))
		if err != nil {
			t.Fatal(err)
		}
		many = append(many, s.Reveal())
	}
	for _, tt := range []struct {
		name, text string
		want       []SecretID
		says       string // in place of want
	}{
		{"one", a.text + "\n", []SecretID{a.id}, ""},
		{"without a line end", a.text, []SecretID{a.id}, ""},
		{"in the order of the file", c.text + "\n" + a.text + "\n" + b.text + "\n", []SecretID{c.id, a.id, b.id}, ""},
		{"with comments", "# made on node-a\n\n" + a.text + "\n#" + b.text + "\n  # old\n" + c.text + "\n\n", []SecretID{a.id, c.id}, ""},
		{"with white space", "\r\n \t" + a.text + " \r\n\t\r\n" + b.text + "\r\n", []SecretID{a.id, b.id}, ""},
		{"as many as may be", strings.Join(many[:maxSecrets], "\n"), nil, ""},

		{"empty", "", nil, "no secret in it: make one with `wgcnid secret new`"},
		{"white space", " \n\n", nil, "no secret in it"},
		{"comments", "# none\n#" + a.text, nil, "no secret in it"},
		{"a password", "hunter2-hunter2\n", nil, "line 1: not a cluster secret"},
		{"a damaged line", "# one\n" + a.text + "\n\n" + b.text[:60] + "\n", nil, "line 4: not a cluster secret"},
		{"two on a line", a.text + " " + b.text, nil, "line 1: not a cluster secret"},
		{"a comment behind it", a.text + " # of node-a", nil, "line 1: not a cluster secret"},
		{"bytes", "\x00\xff\n", nil, "line 1: not a cluster secret"},
		{"twice", a.text + "\n" + b.text + "\n" + a.text, nil, "line 3: the secret of line 1 again"},
		{"too many", strings.Join(many, "\n"), nil, "line 17: more than 16 secrets"},
		{"too large", strings.Repeat("#\n", maxSecretFile/2) + a.text, nil, "more than 65536 bytes"},
		{"one long line", strings.Repeat("x", maxSecretFile), nil, "line 1: not a cluster secret"},
	} {
		path := secretFile(t, tt.text, 0o400)
		got, err := LoadSecrets(path)
		if tt.says == "" {
			if err != nil || tt.want != nil && !slices.Equal(ids(got), tt.want) {
				t.Errorf("%s: %v, %v, want %v", tt.name, ids(got), err, tt.want)
			}
			continue
		}
		if err == nil || got != nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v, %v, want an error about %s that says %q", tt.name, ids(got), err, path, tt.says)
			continue
		}
		for _, s := range []string{a.text[24:34], b.text[24:34], "hunter", "xxx"} {
			if strings.Contains(strings.ReplaceAll(err.Error(), path, ""), s) {
				t.Errorf("%s: the error quotes the file: %v", tt.name, err)
			}
		}
	}
}

func TestLoadSecretsRefusesFiles(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct {
		name, path, says string
		is               error
	}{
		{"missing", filepath.Join(dir, "none"), "`wgcnid secret new`", fs.ErrNotExist},
		{"a folder", dir, "no regular file", nil},
		{"open to others", secretFile(t, vectors[0].text, 0o644), "chmod 600", nil},
		{"open to others, in Kubernetes", secretFile(t, vectors[0].text, 0o644), "`defaultMode: 0400`", nil},
		{"below a file", filepath.Join(secretFile(t, "", 0o600), "secret"), "not a directory", nil},
	} {
		got, err := LoadSecrets(tt.path)
		if err == nil || got != nil || !strings.Contains(err.Error(), tt.path) || !strings.Contains(err.Error(), tt.says) || tt.is != nil && !errors.Is(err, tt.is) {
			t.Errorf("%s: %v, %v", tt.name, ids(got), err)
		}
	}
}

func TestCurrent(t *testing.T) {
	s := all(t)
	for _, tt := range []struct {
		secrets Secrets
		want    SecretID
	}{{s, s[0].ID()}, {s[1:], s[1].ID()}, {nil, ""}, {Secrets{}, ""}, {Secrets{{}}, ""}} {
		if got := tt.secrets.Current(); got != tt.want {
			t.Errorf("%v: %q, want %q", ids(tt.secrets), got, tt.want)
		}
		if tt.want != "" && !tt.secrets.Knows(tt.want) || tt.secrets.Knows("") || tt.secrets.Knows("ffffffff") {
			t.Errorf("%v: knows another than it has", ids(tt.secrets))
		}
		seal := tt.secrets.Seal([]byte("message"))
		if seal.Secret != tt.want || seal.IsZero() != (tt.want == "") {
			t.Errorf("%v: seals as %s", ids(tt.secrets), seal)
		}
	}
}

func TestCheck(t *testing.T) {
	s := all(t)
	a, b, c := s[0], s[1], s[2]
	message := []byte("message")
	seal := Secrets{b}.Seal(message)
	renamed := seal
	renamed.Secret = a.ID()
	for _, tt := range []struct {
		name    string
		secrets Secrets
		message string
		seal    Seal
		want    error
		says    []SecretID
	}{
		{"the first", Secrets{b, a}, "message", seal, nil, nil},
		{"another", Secrets{a, c, b}, "message", seal, nil, nil},
		{"no seal", Secrets{a, b}, "message", Seal{}, ErrUnsealed, nil},
		{"no secret and no seal", nil, "message", Seal{}, ErrUnsealed, nil},
		{"no seal, and an empty secret", Secrets{{}}, "message", Seal{}, ErrUnsealed, nil},
		{"a MAC by nobody", Secrets{a, b}, "message", Seal{MAC: seal.MAC}, ErrUnsealed, nil},
		{"no secret", nil, "message", seal, ErrUnknownSecret, []SecretID{b.ID(), "none"}},
		{"unknown", Secrets{a, c}, "message", seal, ErrUnknownSecret, []SecretID{a.ID(), b.ID(), c.ID()}},
		{"altered message", Secrets{a, b}, "massage", seal, ErrForged, nil},
		{"longer message", Secrets{a, b}, "message\x00", seal, ErrForged, nil},
		{"no message", Secrets{a, b}, "", seal, ErrForged, nil},
		{"no MAC", Secrets{a, b}, "message", Seal{Secret: b.ID()}, ErrForged, nil},
		{"as if by another", Secrets{a, b}, "message", renamed, ErrForged, nil},
	} {
		err := tt.secrets.Check([]byte(tt.message), tt.seal)
		if !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
			continue
		}
		for _, id := range tt.says {
			if !strings.Contains(err.Error(), string(id)) {
				t.Errorf("%s: %v, want one that names %s", tt.name, err, id)
			}
		}
	}
	for bit := range len(seal.MAC) * 8 {
		flipped := seal
		flipped.MAC[bit/8] ^= 1 << (bit % 8)
		if err := (Secrets{b}).Check(message, flipped); !errors.Is(err, ErrForged) {
			t.Errorf("bit %d of the MAC flipped: %v", bit, err)
		}
	}
}

func TestSealText(t *testing.T) {
	seal := Secrets{parse(t, vectors[0].text)}.Seal(nil)
	text := seal.String()
	for _, tt := range []struct {
		text string
		want Seal
		ok   bool
	}{
		{text, seal, true},
		{"", Seal{}, true},
		{"00000000:" + strings.Repeat("A", 43) + "=", Seal{Secret: "00000000"}, true},
		{text + " ", Seal{}, false},
		{text + "\n", Seal{}, false},
		{text[:20] + "\n" + text[20:], Seal{}, false},
		{text[:len(text)-1], Seal{}, false},
		{text + "=", Seal{}, false},
		{text[:len(text)-2] + "9=", Seal{}, false}, // bits behind the last
		{strings.ToUpper(text[:8]) + text[8:], Seal{}, false},
		{text[1:], Seal{}, false},
		{"0" + text, Seal{}, false},
		{text[9:], Seal{}, false},
		{":" + text[9:], Seal{}, false},
		{text[:9], Seal{}, false},
		{text[:8], Seal{}, false},
		{text + ":" + text, Seal{}, false},
		{"ed25519:" + text, Seal{}, false},
		{"gggggggg" + text[8:], Seal{}, false},
		{":", Seal{}, false},
		{"\x00\xff", Seal{}, false},
	} {
		got := seal
		err := got.UnmarshalText([]byte(tt.text))
		if !tt.ok {
			if err == nil || !strings.Contains(err.Error(), "newer version") || got != seal {
				t.Errorf("%q: %s, %v", tt.text, got, err)
			}
			continue
		}
		if again, marshalErr := got.MarshalText(); err != nil || marshalErr != nil || got != tt.want || string(again) != tt.text {
			t.Errorf("%q: %s, %v, %v", tt.text, got, err, marshalErr)
		}
	}
}

func TestSealJSON(t *testing.T) {
	type record struct {
		Seal Seal `json:"seal,omitzero"`
	}
	seal := Secrets{parse(t, vectors[0].text)}.Seal(nil)
	for _, tt := range []struct {
		in   record
		want string
	}{{record{}, `{}`}, {record{seal}, `{"seal":"03b342f8:` + vectors[0].macEmpty + `"}`}} {
		text, err := json.Marshal(tt.in)
		if err != nil || string(text) != tt.want {
			t.Errorf("%s, %v, want %s", text, err, tt.want)
		}
		var out record
		if err := json.Unmarshal(text, &out); err != nil || out != tt.in {
			t.Errorf("%s: %v, %v", text, out, err)
		}
	}
}

// TestForPair: the laws of a pair's secret, over all pairs and all files.
func TestForPair(t *testing.T) {
	s := all(t) // made in the order 0 and 3, 1, 2; the ID of 0 is the lower
	age := map[SecretID]int{s[0].ID(): 0, s[3].ID(): 1, s[1].ID(): 2, s[2].ID(): 3}
	names := append(ids(s), "", "ffffffff")
	for _, file := range permutations(s) {
		for _, a := range names {
			for _, b := range names {
				got, ok := file.ForPair(a, b)
				if ok != (file.Knows(a) && file.Knows(b)) {
					t.Errorf("%v: %q and %q: %v", ids(file), a, b, ok)
				}
				if !ok {
					if got.ID() != "" {
						t.Errorf("%v: %q and %q: false, and %s", ids(file), a, b, got.ID())
					}
					continue
				}
				want := a
				if age[b] < age[a] {
					want = b
				}
				if got.ID() != want {
					t.Errorf("%v: %s and %s: %s, want the older", ids(file), a, b, got.ID())
				}
				if other, _ := file.ForPair(b, a); other.ID() != got.ID() {
					t.Errorf("%v: %s and %s: the two ends differ", ids(file), a, b)
				}
			}
		}
	}
}

// permutations are all files that hold some of the secrets, in every order.
func permutations(s Secrets) []Secrets {
	out := []Secrets{nil}
	for i := range s {
		rest := slices.Delete(slices.Clone(s), i, i+1)
		for _, p := range permutations(rest) {
			out = append(out, append(Secrets{s[i]}, p...))
		}
	}
	return out
}

// TestRotation: three nodes change the secret one by one, in three rounds: all
// know the new one, all use it, all forget the old one. At no step does one pair
// disagree, and each pair changes over once, when both its nodes have.
func TestRotation(t *testing.T) {
	s := all(t)
	older, newer := s[0], s[2]
	rounds := []Secrets{{older}, {older, newer}, {newer, older}, {newer}}
	nodes := []Secrets{rounds[0], rounds[0], rounds[0]}
	for _, to := range rounds[1:] {
		for changed := range nodes {
			nodes[changed] = to
			for a := range nodes {
				for b := range nodes {
					atA, okA := nodes[a].ForPair(nodes[a].Current(), nodes[b].Current())
					atB, okB := nodes[b].ForPair(nodes[b].Current(), nodes[a].Current())
					want := older.ID()
					if nodes[a].Current() == newer.ID() && nodes[b].Current() == newer.ID() {
						want = newer.ID()
					}
					if !okA || !okB || atA.ID() != want || atB.ID() != want {
						t.Errorf("%v and %v: %s and %s, want %s", ids(nodes[a]), ids(nodes[b]), atA.ID(), atB.ID(), want)
					}
				}
			}
		}
	}
}

// FuzzSecrets: no text makes the parser panic; what it accepts is what stands
// there, and an error is one of these, with nothing of the text in it.
func FuzzSecrets(f *testing.F) {
	for _, v := range vectors {
		f.Add(v.text)
		f.Add("# comment\r\n\n " + v.text + "\n" + vectors[0].text + "\n")
	}
	f.Add("hunter2\n")
	f.Add("wgcni1__")
	f.Add("")
	known := regexp.MustCompile(`^(no secret in it: .*|line \d+: (not a cluster secret .*|the secret of line \d+ again: .*|more than 16 secrets: .*))$`)
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseSecrets(text)
		if err != nil {
			words := regexp.MustCompile(`\d+`).ReplaceAllString(err.Error(), "")
			if s != nil || !known.MatchString(err.Error()) || len(words) > 120 {
				t.Errorf("%v, %v", ids(s), err)
			}
			return
		}
		var lines []string
		for line := range strings.Lines(text) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
				lines = append(lines, line)
			}
		}
		var got []string
		for _, s := range s {
			got = append(got, s.Reveal())
		}
		if diff := cmp.Diff(lines, got); diff != "" || len(s) > maxSecrets || !s.Knows(s.Current()) {
			t.Error(diff)
		}
	})
}

// TestSecretsInPlace: kubelet puts a new version of a mounted secret in place by
// renaming a link, and the next read has it.
func TestSecretsInPlace(t *testing.T) {
	dir := t.TempDir()
	version := func(v, text string) {
		t.Helper()
		link := filepath.Join(dir, "..tmp")
		if err := errors.Join(
			os.Mkdir(filepath.Join(dir, v), 0o700),
			os.WriteFile(filepath.Join(dir, v, "secret"), []byte(text), 0o400),
			os.Symlink(v, link),
			os.Rename(link, filepath.Join(dir, "..data")),
		); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "secret")
	if err := os.Symlink("..data/secret", path); err != nil {
		t.Fatal(err)
	}
	for _, v := range vectors {
		version("..v"+string(v.id), v.text)
		if got, err := LoadSecrets(path); err != nil || got.Current() != v.id {
			t.Errorf("%s, %v, want %s", got.Current(), err, v.id)
		}
	}
}
