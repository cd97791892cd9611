package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"

	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// Every example is a command line that wgcnid takes: the command is there, its
// flags are and take such values, and so are the arguments.
func TestExamplesParse(t *testing.T) {
	commands(rootCommand(), func(name []string, cmd *cobra.Command) {
		path := strings.Join(name, " ")
		own := 0
		for _, line := range examples(cmd.Example) {
			args, err := wgcnidArguments(line)
			if err != nil {
				t.Errorf("%s: %v", path, err)
			}
			if args == nil {
				continue // another program
			}
			found, err := parse(args)
			if err != nil {
				t.Errorf("%s: %s: %v", path, line, err)
			} else if found.Name() == cmd.Name() {
				own++
			}
		}
		if own == 0 && !cmd.HasSubCommands() {
			t.Errorf("no example of %s uses it:\n%s", path, cmd.Example)
		}
	})
}

// What is wrong in an example is found.
func TestExamplesThatDoNotParse(t *testing.T) {
	for _, line := range []string{
		"wgcnid stats", "wgcnid status --jsno", "wgcnid graph --format", "wgcnid forget", "wgcnid forget a b", "wgcnid secret nwe",
		"wgcnid endpoint --drain 5", "wgcnid nodes | jq . && wgcnid node", `wgcnid status --json | jq '.peers`,
	} {
		args, err := wgcnidArguments(line)
		if err == nil {
			_, err = parse(args)
		}
		if err == nil {
			t.Errorf("%s is taken", line)
		}
	}
}

// parse is all that comes before a command runs.
func parse(args []string) (*cobra.Command, error) {
	cmd, rest, err := rootCommand().Find(args)
	if err != nil {
		return nil, err
	}
	if err := cmd.ParseFlags(rest); err != nil {
		return nil, err
	}
	return cmd, cmd.ValidateArgs(cmd.Flags().Args())
}

// examples are the lines, those that a backslash continues being one.
func examples(text string) (out []string) {
	for line := range strings.Lines(strings.ReplaceAll(text, "\\\n", " ")) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			out = append(out, line)
		}
	}
	return out
}

// wgcnidArguments are those of the last wgcnid in a shell's command line; nil if it calls none.
func wgcnidArguments(line string) ([]string, error) {
	words, err := shellWords(line)
	if err != nil {
		return nil, err
	}
	var args []string
	for _, w := range words {
		switch {
		case w == "wgcnid":
			args = []string{}
		case args == nil: // before it
		case w == "|" || w == "&&" || strings.HasPrefix(w, ">") || strings.HasPrefix(w, "#"):
			if rest := words[slices.Index(words, w):]; slices.Contains(rest, "wgcnid") {
				return wgcnidArguments(strings.Join(rest, " "))
			}
			return args, nil
		default:
			args = append(args, w)
		}
	}
	return args, nil
}

// shellWords splits a command line. What is quoted, or in $( ) or <( ), is not looked into.
func shellWords(line string) (words []string, err error) {
	var word strings.Builder
	closes := rune(0)
	for _, r := range strings.NewReplacer("$(", "(", "<(wgcnid ", "wgcnid ", "<(", "(").Replace(line) {
		switch {
		case closes != 0:
			switch {
			case r == closes:
				closes = 0
			case closes != ')':
				word.WriteRune(r)
			default:
				word.WriteRune('x')
			}
		case r == '\'' || r == '"':
			closes = r
		case r == '(':
			closes = ')'
		case r == ')': // of a <(wgcnid ...)
		case r == ' ':
			if word.Len() > 0 {
				words = append(words, word.String())
				word.Reset()
			}
		default:
			word.WriteRune(r)
		}
	}
	if closes != 0 {
		return nil, fmt.Errorf("%s: a %q that nothing closes", line, closes)
	}
	if word.Len() > 0 {
		words = append(words, word.String())
	}
	return words, nil
}

// What Tab offers, as the scripts of the shells ask for it.
func TestCompletion(t *testing.T) {
	m := newMesh(t, 1)
	laptop := registrytest.Record("laptop", 5)
	laptop.Place = registry.Place{Via: []string{"a"}}
	laptop.Endpoints, laptop.Pods, laptop.Hosts = nil, nil, nil
	m.publish(registrytest.Record("a", 1), registrytest.Record("node-b", 2), registrytest.Record("node-c", 3), laptop, tombstone("left", 5))
	complete := func(args ...string) []string {
		t.Helper()
		out, err := execute(append([]string{cobra.ShellCompNoDescRequestCmd, "--config", m.conf}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		out, _, _ = strings.Cut(out, "Completion ended") // for people, on stderr
		lines := strings.Split(strings.TrimSpace(out), "\n")
		if last := lines[len(lines)-1]; last != fmt.Sprintf(":%d", cobra.ShellCompDirectiveNoFileComp) {
			t.Errorf("%q: files are offered too (%s)", args, last)
		}
		return lines[:len(lines)-1]
	}
	for _, tt := range []struct {
		args string // the last word is what was typed of it
		want []string
	}{
		{"forget |", []string{"laptop", "node-b", "node-c"}},
		{"forget |node-", []string{"node-b", "node-c"}},
		{"forget node-b |", nil},
		{"peer config |", []string{"laptop"}},
		{"peer remove |l", []string{"laptop"}},
		{"peer add phone --via |", []string{"a", "node-b", "node-c"}},
		{"graph --format |", []string{"svg", "dot", "mermaid", "json"}},
		{"run --log |", []string{"text", "json"}},
		{"endpoint --log-level |", []string{"debug", "info", "warn", "error"}},
		{"completion |", []string{"bash", "zsh", "fish"}},
		{"peer |re", []string{"remove"}},
		{"status |", nil},
	} {
		before, typed, _ := strings.Cut(tt.args, "|")
		got := complete(append(strings.Fields(before), typed)...)
		if diff := cmp.Diff(tt.want, got, cmp.Transformer("none", func(s []string) []string { return append([]string{}, s...) })); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.args, diff)
		}
	}
	// Commands that take a machine offer one.
	commands(rootCommand(), func(name []string, cmd *cobra.Command) {
		if _, ok := completed[strings.Join(name, " ")]; ok && !slices.Contains(complete(append(slices.Clone(name), "")...), "laptop") {
			t.Errorf("%s does not offer the peer", cmd.CommandPath())
		}
	})
	// Nobody is told of what is wrong, or kept waiting: there is a line being typed.
	m.must(os.WriteFile(m.conf, []byte("{"), 0o600))
	if got := complete("forget", ""); len(got) != 0 {
		t.Errorf("with a configuration that is none: %q", got)
	}
}

func TestCompletionScripts(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		script, err := execute("completion", shell)
		if err != nil || !strings.Contains(script, cobra.ShellCompRequestCmd) {
			t.Errorf("%s: %v", shell, err)
		}
		if shell != "bash" {
			continue
		}
		cmd := exec.CommandContext(t.Context(), "bash", "-n")
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("bash does not take the script: %v: %s", err, out)
		}
	}
}

// There is a page for each command, with what its help says.
func TestManPages(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "go", "run", "-trimpath", "-tags", "man", ".", "man", dir)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // what it needs is built already, by make build
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var want []string
	page := func(name []string, cmd *cobra.Command) {
		file := strings.Join(append([]string{"wgcnid"}, name...), "-") + ".1"
		want = append(want, file)
		text, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Error(err)
			return
		}
		plain := strings.ReplaceAll(string(text), `\`, "")
		for line := range strings.Lines(cmd.Example) { // as they are, since they are to be copied
			if !strings.Contains(plain, strings.ReplaceAll(strings.TrimSpace(line), "\\", "")) {
				t.Errorf("%s lacks the example %s", file, line)
			}
		}
		if !strings.Contains(plain, strings.SplitN(cmd.Short, "`", 2)[0]) || strings.Contains(plain, "spf13") {
			t.Errorf("%s:\n%s", file, text)
		}
	}
	page(nil, rootCommand())
	commands(rootCommand(), page)
	var got []string
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		got = append(got, e.Name())
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the pages (-want +got):\n%s", diff)
	}
}

// A line has the same keys in both formats, so that whoever looks for one finds it.
func TestLogFormatsHaveTheSameKeys(t *testing.T) {
	lines := map[string]string{}
	for _, format := range logFormats {
		var b bytes.Buffer
		log, err := logFlags{format, "warn"}.logger(&b)
		if err != nil {
			t.Fatal(err)
		}
		log.Info("not of that level")
		log.Error("pass failed", "error", errors.New("two\nlines"), "after", time.Second, "prefixes", []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}, slog.Int("ops", 3))
		if lines[format] = b.String(); strings.Count(b.String(), "\n") != 1 {
			t.Errorf("%s: not one line:\n%s", format, &b)
		}
	}
	var fields map[string]any
	if err := json.Unmarshal([]byte(lines["json"]), &fields); err != nil {
		t.Fatal(err)
	}
	if want := []string{"after", "error", "level", "msg", "ops", "prefixes", "time"}; !slices.Equal(slices.Sorted(maps.Keys(fields)), want) {
		t.Errorf("json: %s", lines["json"])
	}
	for key := range fields {
		if !strings.Contains(" "+lines["text"], " "+key+"=") {
			t.Errorf("the text lacks %s: %s", key, lines["text"])
		}
	}
}
