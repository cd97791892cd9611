package chaos

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The environment variables of a campaign. Without them it is short and its seed
// is drawn.
const (
	SeedEnv    = "WGCNI_SEED"          // a whole number; the same one gives the same actions
	LengthEnv  = "WGCNI_CHAOS"         // how long things go wrong, a Go duration
	ResultsEnv = "WGCNI_CHAOS_RESULTS" // a folder to leave the result in
)

// Short is how long a campaign goes on if nobody says.
const Short = 20 * time.Second

// Result is what a campaign has found.
type Result struct {
	Campaign string         `json:"campaign"` // one word
	Length   Duration       `json:"length"`
	Seed     uint64         `json:"seed"`
	Done     map[string]int `json:"done"`           // what was done, and how often
	Bad      int            `json:"bad"`            // how often there was what should never be
	What     string         `json:"what"`           // what that is: "plaintext"
	Of       int            `json:"of"`             // how often it was looked for
	Unit     string         `json:"unit"`           // what was looked at: "packets captured"
	Note     string         `json:"note,omitempty"` // what else is worth telling
	Began    time.Time      `json:"began"`
	Version  string         `json:"version"` // what `wgcnid version` printed
}

// String is the result in a few words.
func (r Result) String() string {
	return fmt.Sprintf("%s %s of %s %s", thousands(r.Bad), r.What, thousands(r.Of), r.Unit)
}

// Duration is one that stands in JSON as Go prints it.
type Duration time.Duration

// MarshalText prints it without units that are zero.
func (d Duration) MarshalText() ([]byte, error) {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return []byte(s), nil
}

// UnmarshalText parses it.
func (d *Duration) UnmarshalText(text []byte) error {
	parsed, err := time.ParseDuration(string(text))
	*d = Duration(parsed)
	return err
}

// Begin reads the environment and returns what a campaign is to begin with: its
// name, its length, its seed and the time.
func Begin(campaign string) (Result, error) {
	r := Result{Campaign: campaign, Length: Duration(Short), Seed: uint64(time.Now().UnixNano()), Done: map[string]int{}, Began: time.Now().UTC()}
	if text := os.Getenv(LengthEnv); text != "" {
		if err := r.Length.UnmarshalText([]byte(text)); err != nil || r.Length <= 0 {
			return r, fmt.Errorf("%s: %q is not a duration, such as 20m", LengthEnv, text)
		}
	}
	if text := os.Getenv(SeedEnv); text != "" {
		seed, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return r, fmt.Errorf("%s: %q is not a whole number", SeedEnv, text)
		}
		r.Seed = seed
	}
	return r, nil
}

// Save leaves the result in the folder of [ResultsEnv], if there is one.
func (r Result) Save() error {
	if dir := os.Getenv(ResultsEnv); dir != "" {
		return r.Write(dir)
	}
	return nil
}

// Write writes the result into a folder, in a file of the campaign's name.
func (r Result) Write(dir string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, r.Campaign+".json"), append(text, '\n'), 0o644)
}

// Read reads a result.
func Read(file string) (r Result, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return r, err
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return r, fmt.Errorf("%s: %w", file, err)
	}
	return r, nil
}

// Load reads all results of a folder, in the order in which README shows them.
func Load(dir string) (results []Result, err error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		r, err := Read(file)
		if err != nil {
			return nil, err
		}
		results = append(results, r)
	}
	order := []string{"leak", "loss", "convergence"}
	slices.SortStableFunc(results, func(a, b Result) int {
		return cmp.Compare(slices.Index(order, a.Campaign), slices.Index(order, b.Campaign))
	})
	return results, nil
}

// marks enclose the table in README.
const (
	beginMark = "<!-- chaos -->"
	endMark   = "<!-- /chaos -->"
)

// kindsShown is how many kinds of what was done README names.
const kindsShown = 10

// Table prints results as README shows them.
func Table(results []Result) string {
	var b strings.Builder
	b.WriteString("| campaign | length | seed | what was done | result | date | version |\n|---|--:|--:|---|---|---|---|\n")
	for _, r := range results {
		length, _ := r.Length.MarshalText() // never fails
		result := r.String()
		if r.Bad == 0 {
			result = "**" + result + "**"
		}
		if r.Note != "" {
			result += "; " + r.Note
		}
		fmt.Fprintf(&b, "| %s | %s | %d | %s | %s | %s | `%s` |\n",
			r.Campaign, length, r.Seed, r.done(kindsShown), result, r.Began.Format(time.DateOnly), r.Version)
	}
	return b.String()
}

// done is what was done, the most frequent first, and the rest of more kinds than most
// in one sum.
func (r Result) done(most int) string {
	names := slices.SortedFunc(maps.Keys(r.Done), func(a, b string) int {
		return cmp.Or(cmp.Compare(r.Done[b], r.Done[a]), cmp.Compare(a, b))
	})
	var parts []string
	others := 0
	for i, name := range names {
		if i < most {
			parts = append(parts, thousands(r.Done[name])+" "+name)
		} else {
			others += r.Done[name]
		}
	}
	if others > 0 {
		parts = append(parts, fmt.Sprintf("and %s of %d other kinds", thousands(others), len(names)-most))
	}
	return strings.Join(parts, ", ")
}

// thousands prints a number with commas.
func thousands(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// Replace returns README with a new table between its marks.
func Replace(readme, table string) (string, error) {
	before, rest, ok := strings.Cut(readme, beginMark+"\n")
	_, after, ok2 := strings.Cut(rest, endMark)
	if !ok || !ok2 {
		return "", fmt.Errorf("README has not the lines %q and %q", beginMark, endMark)
	}
	return before + beginMark + "\n" + table + endMark + after, nil
}
