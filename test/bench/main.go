// bench measures what wgcni costs: its verbs beside those of the reference
// plugins, its verbs as a node fills, how soon another node knows of a pod, what
// a large mesh takes to hold, to set up and to join, how that grows, and the throughput between pods, and
// between a pod and a virtual machine. All that is compared runs in turns, since only ratios within one run mean anything.
//
//	go run ./test/bench [--short] [--sections verbs,scale,announce,mesh,growth,apply,join,throughput,vm,endpoint] [--markdown] [--plot FILE]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/test/cluster"
)

// benches are the parts of a run, in their order.
var benches = []struct {
	name string
	run  func(context.Context, *bench) ([]section, error)
}{
	{"verbs", benchVerbs},
	{"scale", benchScale},
	{"announce", benchAnnounce},
	{"mesh", benchMesh},
	{"growth", benchGrowth},
	{"apply", benchApply},
	{"join", benchJoin},
	{"throughput", benchThroughput},
	{"vm", benchVM},
	{"endpoint", benchEndpoint},
}

func main() {
	cluster.Init()
	if len(os.Args) == 2 && os.Args[1] == timerArg {
		exitOn(serveTimings(os.Stdin, os.Stdout))
		return
	}
	b := &bench{started: time.Now(), terminal: isTerminal(os.Stderr)}
	var names string
	var asMarkdown bool
	flag.BoolVar(&b.short, "short", false, "fewer rounds: a few minutes, and less exact")
	flag.StringVar(&names, "sections", strings.Join(sectionNames(), ","), "what to measure")
	flag.BoolVar(&asMarkdown, "markdown", false, "print the table for the README")
	flag.StringVar(&b.plot, "plot", "", "a `file` for the picture of section growth, as SVG")
	flag.Parse()
	if flag.NArg() > 0 {
		exitOn(fmt.Errorf("%q: bench takes flags only", flag.Arg(0)))
	}
	if os.Geteuid() != 0 {
		exitOn(errors.New("run it as root: it makes network namespaces"))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	sections, err := b.all(ctx, names)
	b.clearProgress()
	if ctx.Err() != nil {
		err = errors.Join(append(b.errs, errors.New("interrupted"))...) // by now all is removed, but for errors
	}
	exitOn(err)
	show(sections, asMarkdown, time.Since(b.started))
}

func exitOn(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func show(sections []section, asMarkdown bool, took time.Duration) {
	fmt.Println(machine())
	fmt.Println()
	if asMarkdown {
		fmt.Print(markdown(sections))
	} else {
		fmt.Print(text(sections))
	}
	n, of := missed(sections)
	fmt.Printf("%d of %d budgets missed; took %s.\n", n, of, took.Round(time.Second))
}

// machine says what the figures were measured on.
func machine() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown machine: " + err.Error()
	}
	where := "in userspace (wireguard-go)"
	if kernel.HasWireGuard() {
		where = "in the kernel"
	}
	return fmt.Sprintf("%d cores, Linux %s, %s, WireGuard %s.",
		runtime.NumCPU(), unix.ByteSliceToString(u.Release[:]), runtime.Version(), where)
}

// bench is one run.
type bench struct {
	short    bool
	plot     string // where to; "" for nowhere
	terminal bool   // stderr is one
	started  time.Time
	told     time.Time // of the last progress
	errs     []error   // of cleaning up
}

// all runs the named sections.
func (b *bench) all(ctx context.Context, names string) ([]section, error) {
	wanted := strings.Split(names, ",")
	for _, name := range wanted {
		if !slices.Contains(sectionNames(), name) {
			return nil, fmt.Errorf("--sections: %q is none of %s", name, strings.Join(sectionNames(), ", "))
		}
	}
	var sections []section
	for _, x := range benches {
		if !slices.Contains(wanted, x.name) {
			continue
		}
		s, err := x.run(ctx, b)
		if err := errors.Join(append(b.errs, err)...); err != nil {
			return nil, fmt.Errorf("%s: %w", x.name, err)
		}
		sections = append(sections, s...)
	}
	return sections, nil
}

func sectionNames() []string {
	var names []string
	for _, x := range benches {
		names = append(names, x.name)
	}
	return names
}

// rounds and span choose between the whole and the short form.
func (b *bench) rounds(whole, short int) int {
	if b.short {
		return short
	}
	return whole
}

func (b *bench) span(whole, short time.Duration) time.Duration {
	if b.short {
		return short
	}
	return whole
}

// remove takes a cluster down, and keeps the error for the end.
func (b *bench) remove(c *cluster.Cluster) {
	if err := c.Close(); err != nil {
		b.errs = append(b.errs, fmt.Errorf("remove the cluster: %w", err))
	}
}

// progress tells on stderr what is being done: on one line of a terminal, else a
// line every ten seconds.
func (b *bench) progress(format string, args ...any) {
	pause, form := 10*time.Second, "[%3.0fs] %s\n"
	if b.terminal {
		pause, form = 250*time.Millisecond, clearLine+"[%3.0fs] %s"
	}
	if now := time.Now(); now.Sub(b.told) > pause {
		b.told = now
		fmt.Fprintf(os.Stderr, form, now.Sub(b.started).Seconds(), fmt.Sprintf(format, args...))
	}
}

// clearLine goes back to the start of the line and erases it (ECMA-48, EL).
const clearLine = "\r\x1b[K"

func (b *bench) clearProgress() {
	if b.terminal {
		fmt.Fprint(os.Stderr, clearLine)
	}
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
