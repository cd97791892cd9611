package identity

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Secrets with what is derived from them, from an implementation of RFC 5869 and
// RFC 2104 that is not Go's. The nodes of a mesh are not all updated at once:
// another result here cuts it in two.
var vectors = []struct {
	text                 string
	id                   SecretID
	macEmpty, macMessage string // of "" and of "a message"
	psk, pskZero         string // of keyA and keyB, of keyA and the zero key
}{
	{
		"wgcni1_20261121T050000Z_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8", "03b342f8",
		"g4011G0csKaQXazvIiZxE4NOaaOAV+zh8/ceue8nis8=", "wqjwrNirfN8MQG8No7k4D92P1pA2OGYurHP517GScbE=",
		"fuOV1Wey7X57HgKycvovhGNJgMmApb+0qhTeAqoVx/o=", "991HR4mdP9gGfv0wHZRZo3wEnwlD8+UD1AhgVSwJpDU=",
	},
	{ // the same key, made a second later
		"wgcni1_20261121T050001Z_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8", "3da3d9f7",
		"MUM2XtH14ZorVlXBmB3Kg/nvX6Xq/Sd7+mUsOykgNIQ=", "jWAJavBamqNlI5Wi+62uTa6LN7+hrZqLuiU1UIY3w+8=",
		"KhNtycce94BqNLk0MJHrKEXexTcBOqEp3005fspg0oY=", "4ilTpNnwbDify+9mOfsRbdXKk6AmOhJYG8f3m6vra7M=",
	},
	{
		"wgcni1_20280229T235959Z___79_Pv6-fj39vX08_Lx8O_u7ezr6uno5-bl5OPi4eA", "68ff8900",
		"iRwzOvYvRJDI/OqYVZqO7sA9yImlnfZg1EZq1IBv4pM=", "HnEyvADye4hDACsbyz+Sqr/Jx4mMVcKOle22rIckAQQ=",
		"aLtiOqBhCD0JsanyZrkbOC04awJ1IfBHqRFNlQH62ro=", "gKp5g7T/hHI/YZgzSNMh1yP7TIQPnos9cBgEE1fbyKE=",
	},
	{ // as old as the first
		"wgcni1_20261121T050000Z_-_v7-_v7-_v7-_v7-_v7-_v7-_v7-_v7-_v7-_v7-_s", "4a5d15c3",
		"Mu81/upvf2jYWgjeuPFTiQSCXdU/fLFcluWtntWuYDg=", "VDcRP/cn8iiAordPWvDGiWA+J15845fxVbuoHPS5Z5w=",
		"O6GBTc2TRslwIZNLgxvs5QWYoq07KjO9LES8yCsugPs=", "ImWtcbkm6WFr4EKwlDpOfPfsiXjDayRH0WdK0zYfF7o=",
	},
}

var keyA, keyB = wgtypes.Key(bytes.Repeat([]byte{0x11}, wgtypes.KeyLen)), wgtypes.Key{0xee}

func parse(t testing.TB, text string) Secret {
	t.Helper()
	s, err := ParseSecret(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// all are the secrets of the vectors.
func all(t testing.TB) (out Secrets) {
	t.Helper()
	for _, v := range vectors {
		out = append(out, parse(t, v.text))
	}
	return out
}

func TestVectors(t *testing.T) {
	for _, v := range vectors {
		s := parse(t, v.text)
		if s.ID() != v.id || s.Reveal() != v.text || s.Made().Format("20060102T150405Z") != v.text[7:23] || s.Made().Location() != time.UTC {
			t.Errorf("%s: it is %s, %s, made %s", v.id, s.ID(), s.Reveal(), s.Made())
		}
		for message, want := range map[string]string{"": v.macEmpty, "a message": v.macMessage} {
			if got := (Secrets{s}).Seal([]byte(message)); got.String() != string(v.id)+":"+want {
				t.Errorf("%s: seal of %q: %s, want %s", v.id, message, got, want)
			}
		}
		for _, pair := range []struct {
			a, b wgtypes.Key
			want string
		}{{keyA, keyB, v.psk}, {keyB, keyA, v.psk}, {keyA, wgtypes.Key{}, v.pskZero}, {wgtypes.Key{}, keyA, v.pskZero}} {
			if got := s.PresharedKey(pair.a, pair.b); got.String() != pair.want {
				t.Errorf("%s: preshared key of %s and %s: %s, want %s", v.id, pair.a, pair.b, got, pair.want)
			}
		}
	}
}

// TestPresharedKey: every pair of nodes has its own, the same on both ends.
func TestPresharedKey(t *testing.T) {
	var nodes []wgtypes.Key
	for i := range byte(8) {
		nodes = append(nodes, wgtypes.Key{i, 31: 7 - i})
	}
	type use struct {
		secret SecretID
		a, b   wgtypes.Key
	}
	seen := map[wgtypes.Key]use{}
	for _, s := range all(t) {
		for i, a := range nodes {
			for _, b := range nodes[:i+1] {
				psk := s.PresharedKey(a, b)
				if psk != s.PresharedKey(b, a) {
					t.Errorf("%s: the two ends of %s and %s differ", s.ID(), a, b)
				}
				if other, ok := seen[psk]; ok || psk == (wgtypes.Key{}) {
					t.Errorf("%s: that of %s and %s is that of %v", s.ID(), a, b, other)
				}
				seen[psk] = use{s.ID(), a, b}
			}
		}
	}
}

func TestParseSecretRefuses(t *testing.T) {
	good := vectors[0].text
	key := good[24:]
	for name, text := range map[string]string{
		"empty":                   "",
		"a password":              "correct horse battery staple",
		"a key of wg genkey":      wgGenkey,
		"a key in hexadecimal":    strings.Repeat("5a", 32),
		"the key alone":           key,
		"no time":                 "wgcni1_" + key,
		"no key":                  good[:24],
		"another version":         "wgcni2" + good[6:],
		"the version in capitals": "WGCNI1" + good[6:],
		"white space before":      " " + good,
		"a line end":              good + "\n",
		"a line end in the key":   good[:30] + "\n" + good[30:],
		"a line end for a letter": good[:30] + "\n" + good[31:],
		"a letter missing":        good[:len(good)-1],
		"a letter more":           good + "A",
		"padding":                 good + "=",
		"bits behind the last":    good[:len(good)-1] + "9",
		"the other base64":        strings.Replace(good, key[:2], "+/", 1),
		"16 bytes":                good[:24] + base64.RawURLEncoding.EncodeToString(make([]byte, 16)),
		"33 bytes":                good[:24] + base64.RawURLEncoding.EncodeToString(make([]byte, 33)),
		"a part more":             good + "_x",
		"no such day":             "wgcni1_20260231T050000Z_" + key,
		"no such hour":            "wgcni1_20261121T240000Z_" + key,
		"a fraction of a second":  "wgcni1_20261121T050000.5Z_" + key,
		"a comma of a second":     "wgcni1_20261121T050000,5Z_" + key,
		"another zone":            "wgcni1_20261121T050000+0100_" + key,
		"no zone":                 "wgcni1_20261121T050000_" + key,
		"RFC 3339":                "wgcni1_2026-11-21T05:00:00Z_" + key,
		"not UTF-8":               good[:len(good)-1] + "\xff",
		"zero bytes":              strings.Repeat("\x00", len(good)),
	} {
		s, err := ParseSecret(text)
		if !errors.Is(err, errNotSecret) || err.Error() != errNotSecret.Error() || s.ID() != "" {
			t.Errorf("%s: %s, %v", name, s.ID(), err)
		}
	}
	if !strings.Contains(errNotSecret.Error(), "`wgcnid secret new`") {
		t.Errorf("it does not say how to make one: %v", errNotSecret)
	}
}

func TestNewSecret(t *testing.T) {
	now := time.Date(2026, 11, 21, 6, 0, 0, 987654321, time.FixedZone("", 3600))
	form := regexp.MustCompile(`^wgcni1_20261121T050000Z_[A-Za-z0-9_-]{43}$`)
	seen := map[SecretID]bool{}
	for range 16 {
		s, err := NewSecret(now)
		if err != nil || !form.MatchString(s.Reveal()) || !s.Made().Equal(now.Truncate(time.Second)) {
			t.Fatalf("%s, made %s, %v", s.Reveal(), s.Made(), err)
		}
		if again := parse(t, s.Reveal()); again.ID() != s.ID() || again.PresharedKey(keyA, keyB) != s.PresharedKey(keyA, keyB) {
			t.Errorf("%s becomes another by being written", s.ID())
		}
		seen[s.ID()] = true
	}
	if len(seen) != 16 {
		t.Errorf("of 16 secrets %d differ", len(seen))
	}
	for _, year := range []int{-1, 10000} {
		if s, err := NewSecret(time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC)); err == nil || s.ID() != "" || !strings.Contains(err.Error(), fmt.Sprint(year)) {
			t.Errorf("in the year %d: %s, %v", year, s.ID(), err)
		}
	}
}

func TestNoSecret(t *testing.T) {
	var none Secret
	if none.ID() != "" || !none.Made().IsZero() || none.Reveal() != "" || none.PresharedKey(keyA, keyB) != (wgtypes.Key{}) {
		t.Errorf("the zero value is some secret: %s", none.ID())
	}
}

// TestSecretsAreHidden: no way of printing shows a secret, or a preshared key.
func TestSecretsAreHidden(t *testing.T) {
	text := vectors[2].text
	s := parse(t, text)
	raw := s.value().key
	list := Secrets{s, parse(t, vectors[0].text)}
	pairs := NewPairs(keyA, list)
	psk, ok := pairs.PresharedKey(s.ID(), s.ID(), keyB)
	if !ok {
		t.Fatal("no preshared key")
	}
	type exported struct {
		Secret  Secret
		Secrets Secrets
		Pairs   *Pairs
	}
	type unexported struct {
		secret  Secret
		secrets Secrets
		pairs   *Pairs
	}
	e, u := exported{s, list, pairs}, unexported{s, list, pairs}
	values := []any{s, &s, list, &list, pairs, e, &e, u, &u, []Secrets{list}, map[string]Secret{"secret": s}, fmt.Errorf("secret %v of %v", s, list)}
	checkHidden(t, raw[:], []string{text, text[24:36]}, values...)
	// What is derived from it is as secret.
	checkHidden(t, psk[:], nil, values...)
	seal := s.value().seal
	checkHidden(t, seal[:], nil, values...)

	if got := fmt.Sprintf("%v %s %#v %d %v", s, s, s, list, pairs); got != "(hidden) (hidden) (hidden) [(hidden) (hidden)] (hidden)" {
		t.Errorf("they print %q", got)
	}
	if got, err := json.Marshal(e); err != nil || string(got) != `{"Secret":"(hidden)","Secrets":["(hidden)","(hidden)"],"Pairs":"(hidden)"}` {
		t.Errorf("JSON: %s, %v", got, err)
	}
	if got := fmt.Sprint((*Pairs)(nil), Secrets(nil), Secret{}); got != "<nil> [] (hidden)" {
		t.Errorf("none print %q", got)
	}
}

func TestWriteSecret(t *testing.T) {
	s := parse(t, vectors[0].text)
	path := filepath.Join(t.TempDir(), "secret")
	defer unix.Umask(unix.Umask(0o777)) // the mode does not depend on it
	if err := WriteSecret(path, s); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != s.Reveal()+"\n" {
		t.Errorf("%d bytes, %v", len(text), err)
	}
	if got, err := LoadSecrets(path); err != nil || got.Current() != s.ID() {
		t.Errorf("read again: %s, %v", got.Current(), err)
	}
}

func TestWriteSecretFails(t *testing.T) {
	s := parse(t, vectors[0].text)
	dir := t.TempDir()
	there, dangling := filepath.Join(dir, "there"), filepath.Join(dir, "dangling")
	if err := errors.Join(os.WriteFile(there, []byte("old"), 0o600), os.Symlink("nowhere", dangling)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{there, dangling, dir} {
		err := WriteSecret(path, s)
		if !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "as the last line") {
			t.Errorf("%s: %v", path, err)
		}
	}
	for path, s := range map[string]Secret{filepath.Join(dir, "none"): {}, filepath.Join(dir, "no", "folder"): s} {
		if err := WriteSecret(path, s); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
	entries, err := os.ReadDir(dir)
	if text, _ := os.ReadFile(there); err != nil || string(text) != "old" || len(entries) != 2 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}
