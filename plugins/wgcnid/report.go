package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// manyRefused is how many refused records status lists: somebody who floods the
// registry is not to push what matters off the screen.
const manyRefused = 10

// printReport prints what the helper found at fault.
func printReport(b *strings.Builder, s Status) {
	r := s.Report
	var lines []string
	add := func(format string, args ...any) { lines = append(lines, oneLine(fmt.Sprintf(format, args...))) }
	if r.Error != "" {
		add("the last pass failed: %s", r.Error)
	}
	for _, c := range r.Conflicts {
		add("conflict: %s", c)
	}
	if r.Rival {
		add("conflict: another node publishes as %s: set \"nodeName\" so that each node has its own", s.Node)
	}
	for _, f := range r.Refused[:min(len(r.Refused), manyRefused)] {
		add("refused since %s: %s", localTime(f.Since), f.Reason)
	}
	if more := len(r.Refused) - manyRefused; more > 0 {
		add("refused: %d records more; `wgcnid nodes` lists all", more)
	}
	if total := refusedTotal(r.RefusedTotal); total != "" {
		add("refused in all since wgcnid's start: %s", total)
	}
	if r.SecretsError != "" && s.Helper && (s.Seal == nil || s.Seal.Error == "") { // else it has been said
		add("wgcnid goes on with the secrets that it read last: %s", r.SecretsError)
	}
	if len(lines) > 0 && !s.Helper {
		fmt.Fprintf(b, "As wgcnid saw it last, at %s:\n", localTime(r.At))
	}
	for _, line := range lines {
		fmt.Fprintln(b, line)
	}
}

// rotation is one line about that of this node's key; "" if none is going on.
func (s Status) rotation() string {
	if s.Report == nil || s.Report.Rotation == nil {
		return ""
	}
	note := "of this node's key: " + rotationNote(s.Report.Rotation)
	if !s.Helper {
		note += fmt.Sprintf(" (as wgcnid saw it last, at %s; it goes on when it runs)", localTime(s.Report.At))
	}
	return note
}

func localTime(t time.Time) string { return t.Local().Format(time.DateTime) }

func registryNote(s Status) string {
	r := s.Report
	if r == nil {
		return ""
	}
	var note string
	switch {
	case r.RegistryError != "":
		note = fmt.Sprintf(", away since %s: %s", localTime(r.RegistrySince), oneLine(r.RegistryError))
	case r.PublishError != "":
		note = fmt.Sprintf(", refuses this node's record since %s: %s", localTime(r.PublishSince), oneLine(r.PublishError))
	}
	if note != "" && !s.Helper {
		note += fmt.Sprintf(" (as wgcnid saw it last, at %s)", localTime(r.At))
	}
	return note
}

// refusedTotal prints how many records were refused, by kind.
func refusedTotal(total map[string]uint64) string {
	var words []string
	for _, kind := range slices.Sorted(maps.Keys(total)) {
		words = append(words, fmt.Sprintf("%d %s", total[kind], kind))
	}
	return strings.Join(words, ", ")
}
