package main

import (
	"fmt"
	"math"
	"slices"
)

// samples are the measurements of one thing, in the order in which they were taken.
type samples []float64

// quantile returns the value below or at which the share q (0 to 1) of the
// samples lies, interpolated between neighbours. NaN without samples.
func (s samples) quantile(q float64) float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(s))
	at := q * float64(len(sorted)-1)
	low := int(at)
	if low == len(sorted)-1 {
		return sorted[low]
	}
	return sorted[low] + (at-float64(low))*(sorted[low+1]-sorted[low])
}

func (s samples) median() float64 { return s.quantile(0.5) }

// paired is the median of the quotients of what was measured in the same round.
// A machine that is busy for some rounds is so for both, which leaves quotients
// steadier than the medians they are made of.
func (s samples) paired(to samples) float64 {
	var quotients samples
	for i := range min(len(s), len(to)) {
		quotients = append(quotients, s[i]/to[i])
	}
	return quotients.median()
}

// verb is what one verb of one plugin has cost, in seconds.
type verb struct {
	elapsed samples // from the start of the process to its end
	cpu     samples // user and system time of the process and its children
}

func (v *verb) take(t timing) {
	v.elapsed = append(v.elapsed, t.Elapsed.Seconds())
	v.cpu = append(v.cpu, t.CPU.Seconds())
}

func milliseconds(seconds float64) string { return fmt.Sprintf("%.2f ms", seconds*1e3) }

func mebibytes(bytes int64) string { return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20)) }
