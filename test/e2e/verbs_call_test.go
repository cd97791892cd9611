package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/wgcni/wgcni/test/cluster"
)

// prompt is the time that DEL may take, and STATUS at the very most.
var prompt = cluster.Patience(time.Second)

// A reply is what one call of the plugin's binary has brought.
type reply struct {
	code   int
	stdout string
	stderr string
	took   time.Duration
	err    types.Error // the CNI error on stdout, if the call failed
}

// A call is one of the plugin's binary, as libcni makes it.
type call struct {
	verb, container, netns, ifname, args string
	stdin                                string
}

// plugin calls the binary on a node, without libcni.
func plugin(t *testing.T, n *cluster.Node, c call) reply {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(30*time.Second))
	defer cancel()
	cmd := n.Command(ctx, bin("wgcni"))
	cmd.Env = append(cmd.Env, "CNI_COMMAND="+c.verb, "CNI_CONTAINERID="+c.container, "CNI_NETNS="+c.netns,
		"CNI_IFNAME="+c.ifname, "CNI_ARGS="+c.args, "CNI_PATH="+bin(""))
	cmd.Stdin = strings.NewReader(c.stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	err := cmd.Run()
	r := reply{stdout: stdout.String(), stderr: stderr.String(), took: time.Since(start)}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		r.code = exit.ExitCode()
		if err := json.Unmarshal(stdout.Bytes(), &r.err); err != nil {
			t.Errorf("%s failed, and stdout is no CNI error: %s%s", c.verb, r.stdout, r.stderr)
		}
	case err != nil:
		t.Fatal(err)
	}
	return r
}

// bin is the path of a binary that `make build tools` has made.
func bin(name string) string {
	root, err := cluster.RepoRoot()
	if err != nil {
		panic(err)
	}
	return filepath.Join(root, ".bin", name)
}

// stanza is the wgcni entry of a node's conflist with all that libcni adds, and
// with keys set or, if nil, deleted.
func stanza(t *testing.T, n *cluster.Node, keys map[string]any) string {
	t.Helper()
	text, err := n.Conflist(cluster.NetworkOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var list struct {
		Plugins []map[string]any `json:"plugins"`
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		t.Fatal(err)
	}
	entry := list.Plugins[len(list.Plugins)-1]
	entry["name"], entry["cniVersion"] = cluster.NetworkName, "1.1.0"
	for k, v := range keys {
		if v == nil {
			delete(entry, k)
		} else {
			entry[k] = v
		}
	}
	out, err := json.Marshal(entry)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// prevResult is what a primary plugin would have given to a pod.
func prevResult(netns, ifname string, addrs ...string) map[string]any {
	ips := []any{}
	for _, a := range addrs {
		ips = append(ips, map[string]any{"address": a, "interface": 0})
	}
	return map[string]any{
		"cniVersion": "1.1.0", "ips": ips,
		"interfaces": []any{map[string]any{"name": ifname, "sandbox": netns, "mac": "02:00:00:00:00:99"}},
	}
}

// libcniMarker makes the test binary a runtime that calls plugins by libcni.
const libcniMarker = "WGCNI_E2E_RUNTIME"

// A job is what such a runtime does: calls on one network, some at a time.
type job struct {
	List     json.RawMessage
	Parallel int
	Calls    []netCall
}

type netCall struct {
	Verb, Container, Netns, IfName string
	Args                           [][2]string
	Valid                          []types.GCAttachment // of GC
}

type netReply struct {
	Result  json.RawMessage
	Error   string
	Code    uint
	Warning string // what the plugins wrote to stderr
}

// init comes before TestMain, which is another file's.
func init() {
	if os.Getenv(libcniMarker) == "" {
		return
	}
	if err := beRuntime(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func beRuntime() error {
	var j job
	if err := json.NewDecoder(os.Stdin).Decode(&j); err != nil {
		return err
	}
	list, err := libcni.ConfListFromBytes(j.List)
	if err != nil {
		return err
	}
	replies := make([]netReply, len(j.Calls))
	slots := make(chan struct{}, max(j.Parallel, 1))
	var running sync.WaitGroup
	for i, c := range j.Calls {
		slots <- struct{}{}
		running.Go(func() {
			defer func() { <-slots }()
			replies[i] = one(list, c)
		})
	}
	running.Wait()
	return json.NewEncoder(os.Stdout).Encode(replies)
}

func one(list *libcni.NetworkConfigList, c netCall) (r netReply) {
	ctx, cancel := context.WithTimeout(context.Background(), cluster.Patience(time.Minute))
	defer cancel()
	var stderr bytes.Buffer
	cni := libcni.NewCNIConfig([]string{os.Getenv("CNI_PATH")}, &invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: &stderr}})
	defer func() { r.Warning = stderr.String() }()
	rt := &libcni.RuntimeConf{ContainerID: c.Container, NetNS: c.Netns, IfName: c.IfName, Args: c.Args}
	var err error
	switch c.Verb {
	case "ADD":
		var result types.Result
		if result, err = cni.AddNetworkList(ctx, list, rt); err == nil {
			var b bytes.Buffer
			err = result.PrintTo(&b)
			r.Result = b.Bytes()
		}
	case "DEL":
		err = cni.DelNetworkList(ctx, list, rt)
	case "CHECK":
		err = cni.CheckNetworkList(ctx, list, rt)
	case "GC":
		err = cni.GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: c.Valid})
	case "STATUS":
		err = cni.GetStatusNetworkList(ctx, list)
	default:
		err = fmt.Errorf("no such verb: %s", c.Verb)
	}
	if err != nil {
		r.Error = err.Error()
		var e *types.Error
		if errors.As(err, &e) {
			r.Code = e.Code
		}
	}
	return r
}

// runtime does calls through libcni, inside the node.
func runtime(t *testing.T, n *cluster.Node, o cluster.NetworkOptions, parallel int, calls ...netCall) []netReply {
	t.Helper()
	list, err := n.Conflist(o)
	if err != nil {
		t.Fatal(err)
	}
	replies, err := runtimeOf(t.Context(), n, list, parallel, calls)
	if err != nil {
		t.Fatal(err)
	}
	return replies
}

func runtimeOf(ctx context.Context, n *cluster.Node, list string, parallel int, calls []netCall) ([]netReply, error) {
	for i := range calls {
		if calls[i].IfName == "" {
			calls[i].IfName = "eth0"
		}
		if calls[i].Netns == "" && calls[i].Verb != "GC" && calls[i].Verb != "STATUS" {
			calls[i].Netns = cluster.NetnsPath(calls[i].Container)
		}
	}
	input, err := json.Marshal(job{List: json.RawMessage(list), Parallel: parallel, Calls: calls})
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, cluster.Patience(2*time.Minute))
	defer cancel()
	cmd := n.Command(ctx, self)
	cmd.Env = append(cmd.Env, libcniMarker+"=1", "CNI_PATH="+bin(""))
	cmd.Stdin = bytes.NewReader(input)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("the runtime on %s: %w: %s", n, err, &stderr)
	}
	var replies []netReply
	return replies, json.Unmarshal(stdout.Bytes(), &replies)
}
