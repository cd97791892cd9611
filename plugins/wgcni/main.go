// wgcni is a chained CNI plugin that encrypts pod traffic with WireGuard,
// whatever plugin runs before it.
//
// This file speaks the protocol. The way to the kernel from here:
//
//	main.go -> add.go -> pkg/reconcile/pass.go -> pkg/mesh/plan.go, diff.go -> pkg/kernel/kernel.go
package main

import (
	"bytes"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/store"
	wgversion "github.com/wgcni/wgcni/pkg/version"
)

func main() {
	// The private key stays out of core files, those that core_pattern pipes away included (core(5)).
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		warn("should this process crash, a core file may hold the node's keys: %v", err)
	}
	// A process of a few milliseconds has no use for a garbage collector.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(256 << 20) // from here on it has
	skel.PluginMainFuncs(skel.CNIFuncs{
		Add:    verb("ADD", add),
		Del:    del,
		Check:  verb("CHECK", check),
		GC:     verb("GC", gc),
		Status: verb("STATUS", status),
	}, version.All, "CNI plugin wgcni "+wgversion.String()+": encrypts pod traffic with WireGuard, chained after any primary plugin")
}

// verb gives a verb's error its CNI form, and turns a panic into one.
func verb(name string, run func(*skel.CmdArgs) error) func(*skel.CmdArgs) error {
	return func(args *skel.CmdArgs) (err error) {
		defer func() { logVerb(name, args, err) }() // the last to run
		defer func() {
			if p := recover(); p != nil {
				err = cniError(fmt.Errorf("internal fault in %s: %v", name, p))
			}
		}()
		if err := run(args); err != nil {
			return cniError(err)
		}
		return nil
	}
}

// started is nearly when the runtime started us.
var started = time.Now()

// logVerb leaves to the helper what became of a verb: metrics of this process
// would be gone with it.
func logVerb(name string, args *skel.CmdArgs, err error) {
	runDir := config.DefaultRunDir
	if bytes.Contains(args.StdinData, []byte(`"runDir"`)) { // parsing all of it would take longer than all else here
		runDir = config.RunDirOf(args.StdinData)
	}
	store.LogVerb(runDir, store.Verb{Name: name, Failed: err != nil, Took: time.Since(started)})
}

// warn tells the operator without failing the verb; runtimes log stderr.
func warn(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "wgcni: "+format+"\n", args...)
}
