package identity

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

const wgGenkey = "YAnt4ZlNsnz2KDdrQNO3pVFbsWFF4Ea0EbBp+HyR32k="

func write(t *testing.T, text string, mode os.FileMode) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.WriteFile(Path(dir), []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(Path(dir), mode); err != nil { // whatever the umask
		t.Fatal(err)
	}
	return dir
}

func TestFormats(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		ok         bool
	}{
		{"as wg genkey writes it", wgGenkey + "\n", true},
		{"without newline", wgGenkey, true},
		{"with white space", " \t" + wgGenkey + "\r\n\n", true},
		{"empty", "", false},
		{"white space", "\n", false},
		{"cut", wgGenkey[:20], false},
		{"too long", wgGenkey + wgGenkey, false},
		{"two lines", wgGenkey + "\n" + wgGenkey, false},
		{"16 bytes", base64.StdEncoding.EncodeToString(make([]byte, 16)), false},
		{"hexadecimal", strings.Repeat("60", 32), false},
		{"not base64", strings.Replace(wgGenkey, "Z", "!", 1), false},
		{"zero bytes", string(make([]byte, 45)), false},
	} {
		dir := write(t, tt.text, 0o600)
		k, err := Load(dir)
		if tt.ok {
			if err != nil || k.Reveal().String() != wgGenkey {
				t.Errorf("%s: %v", tt.name, err)
			}
			continue
		}
		if err == nil || errors.Is(err, ErrNoKey) {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if !strings.Contains(err.Error(), Path(dir)) || !strings.Contains(err.Error(), "wg genkey") {
			t.Errorf("%s: the error does not say what is wrong with which file: %v", tt.name, err)
		}
		if s := strings.TrimSpace(tt.text); len(s) > 8 && strings.Contains(err.Error(), s[:8]) {
			t.Errorf("%s: the error quotes the file: %v", tt.name, err)
		}
		// A new key in its place would cut the node off from all its peers.
		if _, err := LoadOrCreate(dir); err == nil {
			t.Errorf("%s: a new key was made", tt.name)
		}
		if after, _ := os.ReadFile(Path(dir)); string(after) != tt.text {
			t.Errorf("%s: the file was altered", tt.name)
		}
	}
}

func TestModes(t *testing.T) {
	for _, tt := range []struct {
		mode os.FileMode
		ok   bool
	}{
		{0o600, true}, {0o400, true}, {0o644, false}, {0o640, false}, {0o604, false}, {0o620, false}, {0o601, false}, {0o777, false},
	} {
		dir := write(t, wgGenkey, tt.mode)
		_, err := Load(dir)
		if (err == nil) != tt.ok {
			t.Errorf("%04o: %v", tt.mode, err)
		}
		if err != nil && (!strings.Contains(err.Error(), "chmod 600 "+Path(dir)) || !strings.Contains(err.Error(), fmt.Sprintf("%04o", tt.mode))) {
			t.Errorf("%04o: the error has no command that mends it: %v", tt.mode, err)
		}
	}
}

// checkHidden fails the test where a way of printing shows raw, which the values
// hold, or one of the texts.
func checkHidden(t *testing.T, raw []byte, texts []string, values ...any) {
	t.Helper()
	decimal := strings.Trim(fmt.Sprintf("%d", raw[:4]), "[]") // 96 9 237 225
	base := base64.StdEncoding.EncodeToString(raw)
	source := strings.TrimSuffix(strings.TrimPrefix(fmt.Sprintf("%#v", raw[:4]), "[]byte{"), "}") // 0x60, 0x9, 0xed, 0xe1
	secrets := append([]string{base, base[:12], hex.EncodeToString(raw), hex.EncodeToString(raw[:4]), decimal, source}, texts...)
	check := func(how, text string) {
		t.Helper()
		for _, s := range secrets {
			if strings.Contains(strings.ToLower(text), strings.ToLower(s)) {
				t.Errorf("%s shows the secret: %s", how, text)
			}
		}
	}
	verbs := []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%o", "%b", "%c", "%U", "% x", "%#x", "%10v", "%t", "%g"}
	for _, v := range values {
		for _, verb := range verbs {
			check(fmt.Sprintf("%s of %T", verb, v), fmt.Sprintf(verb, v))
		}
		if text, err := json.Marshal(v); err == nil {
			check(fmt.Sprintf("JSON of %T", v), string(text))
		}
		for name, handler := range map[string]func(*bytes.Buffer) slog.Handler{
			"slog's text": func(b *bytes.Buffer) slog.Handler { return slog.NewTextHandler(b, nil) },
			"slog's JSON": func(b *bytes.Buffer) slog.Handler { return slog.NewJSONHandler(b, nil) },
		} {
			var b bytes.Buffer
			slog.New(handler(&b)).Info("message", "key", v)
			check(fmt.Sprintf("%s of %T", name, v), b.String())
		}
	}
}

// TestHidden: no way of printing shows the key, alone or inside something else.
func TestHidden(t *testing.T) {
	raw, err := wgtypes.ParseKey(wgGenkey)
	if err != nil {
		t.Fatal(err)
	}
	k := PrivateKey{conceal(raw)}
	type exported struct{ Key PrivateKey }
	type unexported struct{ key PrivateKey }
	checkHidden(t, raw[:], nil, k, &k, exported{k}, &exported{k}, unexported{k}, []PrivateKey{k}, map[string]PrivateKey{"key": k}, any(k), fmt.Errorf("key %v", k))
	if got := fmt.Sprintf("%v %s %#v %d", k, k, k, k); got != strings.TrimSpace(strings.Repeat(hidden+" ", 4)) {
		t.Errorf("it prints %q", got)
	}
	if text, err := json.Marshal(exported{k}); err != nil || string(text) != `{"Key":"`+hidden+`"}` {
		t.Errorf("JSON: %s, %v", text, err)
	}
	if k.Public() != raw.PublicKey() || k.Reveal() != raw {
		t.Error("it has become another key")
	}
	if (PrivateKey{}).Reveal() != (wgtypes.Key{}) {
		t.Error("the zero value is some key")
	}
}

func TestCreate(t *testing.T) {
	defer unix.Umask(unix.Umask(0)) // the mode does not depend on it
	dir := filepath.Join(t.TempDir(), "lib", "wgcni")
	if _, err := Load(dir); !errors.Is(err, ErrNoKey) {
		t.Fatalf("without a folder: %v", err)
	}
	k, err := LoadOrCreate(dir)
	if err != nil {
		t.Fatal(err)
	}
	for path, mode := range map[string]os.FileMode{dir: 0o700, Path(dir): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: mode %v, %v", path, info.Mode(), err)
		}
	}
	text, err := os.ReadFile(Path(dir))
	if err != nil || string(text) != k.Reveal().String()+"\n" {
		t.Errorf("the file is not as wg genkey writes it: %d bytes, %v", len(text), err)
	}
	// A reboot is no outage for the peers (flannel, wormhole, wesher).
	before, _ := os.Stat(Path(dir))
	again, err := LoadOrCreate(dir)
	if err != nil || again.Reveal() != k.Reveal() {
		t.Errorf("the second start has another key: %v", err)
	}
	if after, _ := os.Stat(Path(dir)); !os.SameFile(before, after) || after.ModTime() != before.ModTime() {
		t.Error("the second start wrote the file")
	}
	other, err := LoadOrCreate(t.TempDir())
	if err != nil || other.Reveal() == k.Reveal() {
		t.Errorf("two nodes have one key: %v", err)
	}
}

// TestCreateIsAtomic: whoever looks while the key is made sees none or a whole
// one, and nothing else is left in the folder.
func TestCreateIsAtomic(t *testing.T) {
	dir := t.TempDir()
	// What a start that lost its power may have left.
	if err := os.WriteFile(filepath.Join(dir, ".private.key123"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 50 {
		stop, seen := make(chan struct{}), make(chan error, 1)
		go func() {
			for {
				if _, err := Load(dir); err != nil && !errors.Is(err, ErrNoKey) {
					seen <- err
					return
				}
				select {
				case <-stop:
					seen <- nil
					return
				default:
				}
			}
		}()
		_, err := LoadOrCreate(dir)
		close(stop)
		if err := errors.Join(err, <-seen); err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 2 {
			t.Fatalf("left behind: %v, %v", entries, err)
		}
		if err := os.Remove(Path(dir)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCreateFails(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOrCreate(filepath.Join(dir, "file", "wgcni")); err == nil {
		t.Error("a key was made below a file")
	}
	// A folder of that name is no key.
	if err := os.Mkdir(Path(dir), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOrCreate(dir); err == nil || errors.Is(err, ErrNoKey) {
		t.Errorf("a folder in the key's place: %v", err)
	}
}

func TestPrivateKeyText(t *testing.T) {
	made, err := NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	text := made.Reveal().String()
	read, err := ParsePrivateKey(" " + text + "\n")
	if err != nil || read.Reveal() != made.Reveal() {
		t.Errorf("it is read as another, or %v", err)
	}
	if shown := fmt.Sprintf("%v %+v %#v", read, read, read); strings.Contains(shown, text) {
		t.Error("the key is shown")
	}
	for _, bad := range []string{"", text[1:], text + "x", strings.Repeat("=", 44)} {
		if _, err := ParsePrivateKey(bad); err == nil || bad != "" && strings.Contains(err.Error(), bad) {
			t.Errorf("%d characters: error %v", len(bad), err)
		}
	}
}
