// testsummary reads `go test -json` and prints a line a package, the output of
// what failed, and how many tests ran. Skipped tests are failures: a test that
// needs something says so by failing. So are those that began and did not end,
// because their program or their machine did.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
)

type event struct {
	Action  string
	Package string
	Test    string
	Elapsed float64
	Output  string
}

func main() {
	if err := summarize(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func summarize(in io.Reader, out io.Writer) error {
	output := map[[2]string]*strings.Builder{}
	count := map[string]int{}
	running := map[[2]string]bool{}
	var failed, skipped []string
	fail := func(name string, key [2]string) {
		failed = append(failed, name)
		if output[key] != nil {
			fmt.Fprintf(out, "--- %s\n%s", name, output[key])
		}
	}
	for d := json.NewDecoder(in); ; {
		var e event
		if err := d.Decode(&e); err == io.EOF {
			break
		} else if err != nil {
			return fmt.Errorf("read the output of go test -json: %w", err)
		}
		key := [2]string{e.Package, e.Test}
		switch e.Action {
		case "output", "build-output":
			if output[key] == nil {
				output[key] = &strings.Builder{}
			}
			output[key].WriteString(e.Output)
		case "run":
			running[key] = true
		case "pass", "fail", "skip":
			delete(running, key)
			if e.Test == "" {
				fmt.Fprintf(out, "%-4s  %6.1fs  %s\n", e.Action, e.Elapsed, e.Package)
			} else {
				count[e.Action]++
			}
			name := strings.TrimSpace(e.Package + " " + e.Test)
			if e.Action == "skip" && e.Test != "" {
				skipped = append(skipped, name)
			}
			if e.Action == "fail" {
				fail(name, key)
			}
		}
	}
	for _, key := range slices.SortedFunc(maps.Keys(running), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) }) {
		count["fail"]++
		fail(key[0]+" "+key[1]+" (did not end)", key)
	}
	fmt.Fprintf(out, "\n%d passed, %d failed, %d skipped\n", count["pass"], count["fail"], count["skip"])
	if len(failed)+len(skipped) > 0 {
		slices.Sort(failed)
		return fmt.Errorf("failed: %s\nskipped: %s", strings.Join(failed, ", "), strings.Join(skipped, ", "))
	}
	return nil
}
