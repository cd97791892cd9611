// demo shows what wgcni does, on three nodes in network namespaces of this
// machine: with the real plugins, cnitool, wgcnid and a capture on the network
// between the nodes. What it says is measured, and it fails if anything is not
// as it should be. Nothing is left behind, after Ctrl-C neither.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

const (
	// timeLimit ends a demo that hangs.
	timeLimit = 3 * time.Minute
	// exitInterrupted is what shells give to a program that SIGINT has ended.
	exitInterrupted = 130
)

func main() {
	cluster.Init()
	verbose := flag.Bool("verbose", false, "also show whole conflists, CNI results, the captured packets and the helpers' logs")
	flag.Parse()
	os.Exit(run(os.Stdout, os.Stderr, *verbose))
}

func run(stdout *os.File, stderr io.Writer, verbose bool) int {
	if err := checkMachine(); err != nil {
		fmt.Fprintln(stderr, "demo:", err)
		return 1
	}
	interrupted, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	// A second Ctrl-C ends the demo at once; the machines' inits then clean up.
	context.AfterFunc(interrupted, stop)
	ctx, cancel := context.WithTimeout(interrupted, timeLimit)
	defer cancel()

	d := &demo{narrator: newNarrator(stdout, verbose)}
	start := time.Now()
	err := d.play(ctx, steps)
	if err != nil && interrupted.Err() == nil {
		d.explain(stderr, err)
	}
	cerr := d.close()
	if cerr != nil {
		fmt.Fprintln(stderr, "demo: clean up:", cerr)
	}
	switch {
	case interrupted.Err() != nil && cerr == nil:
		fmt.Fprintln(stderr, "demo: interrupted; everything it made is gone")
		return exitInterrupted
	case err != nil || cerr != nil:
		return 1
	}
	if verbose {
		d.showLogs(stdout)
	}
	d.say("\nAll of it held: %d steps in %s. Nothing is left of it on this machine.", len(steps), seconds(time.Since(start)))
	return 0
}

// checkMachine says what to do when the demo can't run here.
func checkMachine() error {
	if os.Geteuid() != 0 {
		return errors.New("it makes network namespaces, so it must run as root: sudo make demo")
	}
	root, err := cluster.RepoRoot()
	if err != nil {
		return fmt.Errorf("%w: run it inside the repository", err)
	}
	for _, name := range []string{"wgcni", "wgcnid", "cnitool", "bridge", "host-local"} {
		if _, err := os.Stat(filepath.Join(root, ".bin", name)); err != nil {
			return fmt.Errorf("%w: run `make build tools` first", err)
		}
	}
	for _, name := range []string{"ip", "nft", "nsenter"} {
		if !slices.ContainsFunc(strings.Split("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", ":"), func(dir string) bool {
			_, err := os.Stat(filepath.Join(dir, name))
			return err == nil
		}) {
			return fmt.Errorf("the command %s is missing: run `make deps`", name)
		}
	}
	return nil
}

// demo is what the steps share.
type demo struct {
	*narrator

	cluster *cluster.Cluster
	helpers map[*cluster.Node]*cluster.Process // the last one of each node
	logs    []helperLog                        // of all helpers there were
	pods    []*cluster.Pod
	servers []*cluster.Server
	capture *cluster.Capture // from before the first helper until after the last
	stream  *cluster.Stream
	tunnel  cluster.Tunnel          // of the first node, before its helper was stopped
	before  map[*cluster.Node]state // without wgcni
}

type helperLog struct {
	node *cluster.Node
	log  *cluster.Log
}

// step is one line of the demo.
type step struct {
	title string
	// do returns the measured fact that stands behind the title.
	do func(context.Context, *demo) (fact string, err error)
}

// play does the steps until one fails.
func (d *demo) play(ctx context.Context, steps []step) error {
	d.say("wgcni: encrypt the pod traffic of a cluster, whatever its network plugin\n")
	for i, s := range steps {
		d.begin(i+1, s.title)
		fact, err := s.do(ctx, d)
		if ctx.Err() != nil { // else the error is of what was cut short
			err = ctx.Err()
		}
		d.end(fact, err)
		if err != nil {
			return fmt.Errorf("step %d, %s: %w", i+1, s.title, err)
		}
	}
	return nil
}

// explain says what the helpers have to say, and what has failed; that last,
// since it may be all that somebody sees of a long log.
func (d *demo) explain(w io.Writer, err error) {
	d.showLogs(w)
	fmt.Fprintf(w, "\ndemo: %v\n", err)
}

func (d *demo) showLogs(w io.Writer) {
	for _, h := range d.logs {
		fmt.Fprintf(w, "\nwgcnid on %s said:\n%s", h.node.Name, indent(h.log.String()))
	}
}

// close removes everything. Sockets go first: they would hold a namespace.
func (d *demo) close() error {
	d.closeTraffic()
	if d.cluster == nil {
		return nil
	}
	return d.cluster.Close()
}

// closeTraffic ends the stream and the servers.
func (d *demo) closeTraffic() {
	if d.stream != nil {
		d.stream.Stop()
		d.stream = nil
	}
	for _, s := range d.servers {
		_ = s.Close() // a listener of ours, closed only here
	}
	d.servers = nil
}
