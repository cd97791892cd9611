package doctor

import (
	"cmp"
	"slices"
)

// Level says how bad a finding is.
type Level string

// The levels. Only Fail means that something does not work.
const (
	OK   Level = "ok"
	Note Level = "note" // worth knowing
	Warn Level = "warn" // works, but will not always, or not well
	Fail Level = "fail" // does not work
)

var severity = map[Level]int{Fail: 0, Warn: 1, Note: 2, OK: 3}

// Check is one thing that was looked at.
type Check struct {
	// ID names the check for scripts: "firewall", "peer/node-b". It stays the same
	// whatever is found.
	ID    string `json:"id"`
	Title string `json:"title"`
	Level Level  `json:"level"`
	// Looked says what was looked at, Found what was there.
	Looked string `json:"looked"`
	Found  string `json:"found"`
	// Mend is what to do about it, with the very command or line where there is one;
	// "" if nothing needs to be done.
	Mend string `json:"mend,omitempty"`
}

// Sort puts the worst first, and leaves the order among equals.
func Sort(checks []Check) []Check {
	out := slices.Clone(checks)
	slices.SortStableFunc(out, func(a, b Check) int { return cmp.Compare(severity[a.Level], severity[b.Level]) })
	return out
}

// Count says how many checks have a level.
func Count(checks []Check, l Level) (n int) {
	for _, c := range checks {
		if c.Level == l {
			n++
		}
	}
	return n
}

// A topic is what the checks of one function have in common.
type topic struct{ id, title, looked string }

func (t topic) ok(found string) Check {
	return Check{ID: t.id, Title: t.title, Level: OK, Looked: t.looked, Found: found}
}

func (t topic) at(l Level, found, mend string) Check {
	return Check{ID: t.id, Title: t.title, Level: l, Looked: t.looked, Found: found, Mend: mend}
}

func (t topic) fail(found, mend string) Check { return t.at(Fail, found, mend) }
func (t topic) warn(found, mend string) Check { return t.at(Warn, found, mend) }
func (t topic) note(found, mend string) Check { return t.at(Note, found, mend) }
