package main

import (
	"fmt"
	"math"
	"strings"
)

// budget bounds a ratio. The zero value is no budget.
type budget struct {
	limit   float64
	atLeast bool // else at most
}

func atMost(limit float64) budget  { return budget{limit: limit} }
func atLeast(limit float64) budget { return budget{limit: limit, atLeast: true} }

// verdict judges a ratio as it is printed: nobody should read "1.10 MISSED"
// beside a limit of 1.10.
func (b budget) verdict(ratio float64) string {
	sign, ok := "<=", hundredths(ratio) <= hundredths(b.limit)
	if b.atLeast {
		sign, ok = ">=", hundredths(ratio) >= hundredths(b.limit)
	}
	word := "MISSED"
	if ok {
		word = "ok"
	}
	return fmt.Sprintf("%s %.2f %s", sign, b.limit, word)
}

// hundredths of NaN are less and greater than nothing: such a budget is missed.
func hundredths(x float64) float64 { return math.Round(x * 100) }

// row is one line of the table. Empty fields print as nothing.
type row struct {
	what   string
	median string
	p90    string
	p99    string
	time   string
	memory string
	count  string
	cpu    string
	ratio  float64 // 0: none
	to     string  // what the ratio refers to
	budget budget
}

// figure is what a row has in a column of figures.
func (r row) figure(column string) string {
	switch column {
	case "median":
		return r.median
	case "time":
		return r.time
	case "p90":
		return r.p90
	case "p99":
		return r.p99
	case "memory":
		return r.memory
	case "revisions": // of etcd
		return r.count
	case "cpu":
		return r.cpu
	}
	panic("no column " + column)
}

// section is a part of the table with a heading of its own.
type section struct {
	title   string
	figures [3]string // optional: the columns of figures; median, p90 and cpu by default
	rows    []row
	notes   []string
}

func (s section) columns() [3]string {
	if s.figures == [3]string{} {
		return [3]string{"median", "p90", "cpu"}
	}
	return s.figures
}

func (r row) missed() bool {
	return r.budget != budget{} && strings.HasSuffix(r.budget.verdict(r.ratio), "MISSED")
}

func (r row) cells(figures [3]string) []string {
	cells := []string{r.what}
	for _, column := range figures {
		cells = append(cells, r.figure(column))
	}
	var ratio, verdict string
	if r.ratio != 0 {
		ratio = fmt.Sprintf("%.2f", r.ratio)
	}
	if r.budget != (budget{}) {
		verdict = r.budget.verdict(r.ratio)
	}
	return append(cells, ratio, r.to, verdict)
}

// leftColumns are those of words; the others are figures.
var leftColumns = map[int]bool{0: true, 5: true, 6: true}

func heading(s section) []string {
	f := s.columns()
	return []string{s.title, f[0], f[1], f[2], "ratio", "to", "budget"}
}

// text prints the sections as one table, aligned over all of them.
func text(sections []section) string {
	widths := make([]int, len(heading(section{})))
	for _, s := range sections {
		for _, cells := range append([][]string{heading(s)}, cellsOf(s)...) {
			for i, c := range cells {
				widths[i] = max(widths[i], len(c))
			}
		}
	}
	var b strings.Builder
	line := func(cells []string) {
		var l strings.Builder
		for i, c := range cells {
			if leftColumns[i] {
				fmt.Fprintf(&l, "%-*s  ", widths[i], c)
			} else {
				fmt.Fprintf(&l, "%*s  ", widths[i], c)
			}
		}
		b.WriteString(strings.TrimRight(l.String(), " ") + "\n")
	}
	for _, s := range sections {
		line(heading(s))
		for _, cells := range cellsOf(s) {
			line(cells)
		}
		for _, n := range s.notes {
			b.WriteString("  (" + n + ")\n")
		}
		b.WriteByte('\n')
	}
	return b.String()
}

func cellsOf(s section) [][]string {
	var out [][]string
	for _, r := range s.rows {
		cells := r.cells(s.columns())
		cells[0] = "  " + cells[0]
		out = append(out, cells)
	}
	return out
}

// markdown prints each section as a table.
func markdown(sections []section) string {
	var b strings.Builder
	line := func(cells []string) { b.WriteString("| " + strings.Join(cells, " | ") + " |\n") }
	for _, s := range sections {
		line(heading(s))
		rule := heading(s)
		for i := range rule {
			rule[i] = "---"
			if !leftColumns[i] {
				rule[i] = "---:"
			}
		}
		line(rule)
		for _, r := range s.rows {
			line(r.cells(s.columns()))
		}
		b.WriteByte('\n')
		for _, n := range s.notes {
			b.WriteString(n + "\n\n")
		}
	}
	return b.String()
}

// missed counts the budgets that were missed, and all.
func missed(sections []section) (missed, all int) {
	for _, s := range sections {
		for _, r := range s.rows {
			if r.budget != (budget{}) {
				all++
			}
			if r.missed() {
				missed++
			}
		}
	}
	return missed, all
}
