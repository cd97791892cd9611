// Package matrix holds what the end-to-end tests have found out about the
// plugins that wgcni is chained with, and prints it as README shows it.
package matrix

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
)

// Outcome is what a test has seen of one cell.
type Outcome string

// The outcomes. There is no mark for what no test has run.
const (
	Works      Outcome = "works"
	Refused    Outcome = "refused" // by wgcni, with a reason, and with nothing left behind
	Fails      Outcome = "fails"
	Impossible Outcome = "impossible" // this kernel lacks what the plugins of the cell need
)

// Cell is a combination that a test runs.
type Cell struct {
	Table   string  `json:"table"`  // which of README's tables: one of the constants below
	Row     string  `json:"row"`    // the plugin whose place in the chain is tested
	Detail  string  `json:"detail"` // the IPAM plugin of a primary, what is looked at of a chained one
	Column  string  `json:"column"` // the addresses of the pods, or the place in the chain
	Outcome Outcome `json:"outcome"`
}

// The tables.
const (
	Primaries = "primary"
	Chained   = "chained"
)

// Name identifies a cell.
func (c Cell) Name() string {
	return c.Table + "/" + c.Row + "/" + c.Detail + "/" + c.Column
}

// Kind is which WireGuard the results of a file are of.
type Kind string

// The kinds.
const (
	Userspace Kind = "userspace"
	Kernel    Kind = "kernel"
)

// File is the name of a kind's results.
func (k Kind) File() string { return string(k) + ".json" }

// Load reads results. A file that does not exist has none.
func Load(file string) ([]Cell, error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var cells []Cell
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&cells); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	for _, c := range cells {
		if !slices.Contains([]Outcome{Works, Refused, Fails, Impossible}, c.Outcome) {
			return nil, fmt.Errorf("%s: %s: no such outcome: %q", file, c.Name(), c.Outcome)
		}
	}
	return cells, nil
}

// Save writes results, one cell a line.
func Save(file string, cells []Cell) error {
	b := bytes.NewBufferString("[\n")
	for i, c := range cells {
		line, err := json.Marshal(c)
		if err != nil {
			return err
		}
		b.Write(line)
		if i < len(cells)-1 {
			b.WriteByte(',')
		}
		b.WriteByte('\n')
	}
	b.WriteString("]\n")
	return os.WriteFile(file, b.Bytes(), 0o644)
}

// Find returns the outcome of a cell, or an empty one.
func Find(cells []Cell, name string) Outcome {
	for _, c := range cells {
		if c.Name() == name {
			return c.Outcome
		}
	}
	return ""
}
