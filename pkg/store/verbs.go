package store

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Verb is one that the plugin has answered.
type Verb struct {
	Name   string // one of VerbNames
	Failed bool   // for DEL: something was left to the helper
	Took   time.Duration
}

// VerbNames are the verbs that the plugin counts.
var VerbNames = []string{"ADD", "DEL", "CHECK", "GC", "STATUS"}

// verbsBound is how large the log of verbs grows, in bytes, while no helper reads
// it. Verbs that come then are not counted.
const verbsBound = 256 << 10

// VerbsPath is the file in which the plugin's verbs wait to be counted.
func VerbsPath(runDir string) string { return filepath.Join(runDir, "verbs.log") }

// LogVerb leaves a verb to be counted by the helper. It costs some microseconds,
// waits for nobody, and a verb that cannot be left is not counted: nothing of this
// is worth failing a pod for.
func LogVerb(runDir string, v Verb) {
	// O_NONBLOCK: a pipe in the file's place would wait for somebody who reads it.
	fd, err := unix.Open(VerbsPath(runDir), unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return
	}
	var st unix.Stat_t
	if unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size < verbsBound {
		// One write: O_APPEND keeps it apart from those of other verbs.
		_, _ = unix.Write(fd, v.line())
	}
	_ = unix.Close(fd)
}

const (
	verbDone   = "ok"
	verbFailed = "error"
)

func (v Verb) line() []byte {
	result := verbDone
	if v.Failed {
		result = verbFailed
	}
	return fmt.Appendf(nil, "%s %s %d\n", v.Name, result, v.Took.Microseconds())
}

func parseVerb(line []byte) (v Verb, ok bool) {
	var result string
	var took int64
	if n, err := fmt.Sscanf(string(line), "%s %s %d", &v.Name, &result, &took); n != 3 || err != nil {
		return Verb{}, false
	}
	if took < 0 || took > time.Hour.Microseconds() || result != verbDone && result != verbFailed {
		return Verb{}, false
	}
	v.Failed, v.Took = result == verbFailed, time.Duration(took)*time.Microsecond
	return v, slices.Contains(VerbNames, v.Name) // else whoever wrote it, it is none of ours
}

// VerbLog is the helper's end of the log. Its zero value has read nothing yet.
type VerbLog struct {
	// A verb may have the file open while it is taken away: so it is read once more
	// at the next Drain.
	last *os.File
	rest []byte // of last: a line whose end was not there yet
}

// Drain returns what has been left since it was called last, in no order that
// means anything. It is not safe for concurrent use.
func (l *VerbLog) Drain(runDir string) (out []Verb, err error) {
	if l.last != nil {
		out, err = l.read(out)
		l.Close()
		if err != nil {
			return out, err
		}
	}
	f, err := os.OpenFile(VerbsPath(runDir), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err != nil {
		return out, err
	}
	// Even where it cannot be read, the next one can.
	if err := os.Remove(f.Name()); err != nil {
		f.Close() //nolint:errcheck // nothing was written
		return out, err
	}
	l.last = f
	return l.read(out)
}

func (l *VerbLog) read(out []Verb) ([]Verb, error) {
	text, err := io.ReadAll(io.LimitReader(l.last, 2*verbsBound))
	text = append(l.rest, text...)
	end := bytes.LastIndexByte(text, '\n') + 1
	for line := range bytes.Lines(text[:end]) {
		if v, ok := parseVerb(line); ok {
			out = append(out, v)
		}
	}
	l.rest = bytes.Clone(text[end:])
	return out, err
}

// Close forgets what was not read yet.
func (l *VerbLog) Close() {
	if l.last != nil {
		l.last.Close() //nolint:errcheck // nothing was written
	}
	l.last, l.rest = nil, nil
}
