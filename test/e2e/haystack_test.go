package e2e

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/test/cluster"
)

// A haystack is what programs have printed and stored, by the place where it was found.
type haystack map[string][]byte

// A needle is what may stand nowhere, but in its homes.
type needle struct {
	name  string
	raw   []byte
	homes []string // what the names of such places end with
}

// find returns where a needle is that should not be there, and in which form.
func (h haystack) find(n needle) (found []string) {
	for place, data := range h {
		if slices.ContainsFunc(n.homes, func(home string) bool { return strings.HasSuffix(place, home) }) {
			continue
		}
		for form, text := range forms(n.raw) {
			if bytes.Contains(data, text) {
				found = append(found, fmt.Sprintf("%s: %s, %s", place, n.name, form))
			}
		}
	}
	slices.Sort(found)
	return found
}

// forms are what to look for, so that bytes are found whatever they are part of.
func forms(raw []byte) map[string][]byte {
	numbers := strings.Trim(fmt.Sprintf("%d", raw), "[]") // as fmt prints bytes
	quoted := strconv.Quote(string(raw))
	out := map[string][]byte{
		"as it is":          raw,
		"hexadecimal":       []byte(hex.EncodeToString(raw)),
		"HEXADECIMAL":       []byte(strings.ToUpper(hex.EncodeToString(raw))),
		"a list of numbers": []byte(numbers),
		"a list in JSON":    []byte(strings.ReplaceAll(numbers, " ", ",")),
		"quoted":            []byte(quoted[1 : len(quoted)-1]),
	}
	for name, alphabet := range map[string]*base64.Encoding{"base64": base64.RawStdEncoding, "base64 of URLs": base64.RawURLEncoding} {
		// Each letter stands for six bits. Those at either end that have bits of
		// their neighbours too are left out, and so is what pads.
		for before := range 3 {
			text := alphabet.EncodeToString(append(make([]byte, before), raw...))
			first, last := (8*before+5)/6, 8*(before+len(raw))/6
			out[fmt.Sprintf("%s, %d bytes in", name, before)] = []byte(text[first:last])
		}
	}
	return out
}

// written is how programs may write bytes: each of these must be found.
func written(raw []byte) map[string]string {
	out := map[string]string{
		"raw":             string(raw),
		"hexadecimal":     hex.EncodeToString(raw),
		"HEXADECIMAL":     fmt.Sprintf("%X", raw),
		"list of numbers": fmt.Sprintf("%d", raw),
		"list in JSON":    strings.ReplaceAll(fmt.Sprintf("%d", raw), " ", ","),
		"quoted":          strconv.Quote(string(raw)),
	}
	for name, alphabet := range map[string]*base64.Encoding{
		"base64": base64.StdEncoding, "base64, unpadded": base64.RawStdEncoding,
		"base64 of URLs": base64.URLEncoding, "base64 of URLs, unpadded": base64.RawURLEncoding,
	} {
		for _, user := range []string{"", "u", "us"} {
			out[fmt.Sprintf("%s behind %q", name, user)] = alphabet.EncodeToString(append([]byte(user), append(raw, '\n')...))
		}
		out[name] = alphabet.EncodeToString(raw)
	}
	return out
}

// addFiles takes in the files of folders of a machine, but for what vanishes meanwhile.
func (h haystack) addFiles(t *testing.T, m *cluster.Machine, stage string, dirs ...string) {
	t.Helper()
	for _, dir := range dirs {
		root := m.Path(dir)
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return nil //nolint:nilerr // it is gone
			}
			data, err := os.ReadFile(path)
			if err == nil {
				h[fmt.Sprintf("%s, %s:%s", stage, m.Name, filepath.Join(dir, strings.TrimPrefix(path, root)))] = withoutZeros(data)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// withoutZeros cuts off empty pages at the end: etcd's log has 64 MiB from the first.
func withoutZeros(data []byte) []byte {
	var page [4096]byte
	for bytes.HasSuffix(data, page[:]) {
		data = data[:len(data)-len(page)]
	}
	return bytes.Clone(data) // the pages themselves are given back
}

// addProcesses takes in what everybody on a machine may read of its processes,
// and what their owner may.
func (h haystack) addProcesses(t *testing.T, m *cluster.Machine, stage string) {
	t.Helper()
	processes, err := m.Processes()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes {
		for _, file := range []string{"cmdline", "environ"} {
			data, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.HostPID, file))
			if err == nil { // else it has ended
				h[fmt.Sprintf("%s, %s: %s of process %d, %s", stage, m.Name, file, p.PID, filepath.Base(p.Args[0]))] = data
			}
		}
	}
}

func TestNeedlesAreFound(t *testing.T) {
	raw := make([]byte, 32)
	_, _ = rand.Read(raw) // never fails
	for form, text := range written(raw) {
		h := haystack{"somewhere": []byte("before " + text + " behind"), "elsewhere": []byte("nothing")}
		if found := h.find(needle{name: "canary", raw: raw}); len(found) == 0 {
			t.Errorf("%s: not found in %q", form, text)
		}
		if found := h.find(needle{name: "canary", raw: raw, homes: []string{"where"}}); len(found) > 0 {
			t.Errorf("%s: found at home: %v", form, found)
		}
	}
}
