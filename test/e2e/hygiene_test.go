package e2e

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

// A whole life of a mesh, with everything that can go wrong with its secrets: none
// of them is ever told to anybody, nor stored anywhere but in its file.
func TestSecretsStaySecret(t *testing.T) {
	k := newKeeper(t, 3)
	a, b, c := k.Nodes[0], k.Nodes[1], k.Nodes[2]
	for i, n := range k.Nodes {
		if err := n.Configure(k.options); err != nil {
			t.Fatal(err)
		}
		k.start(t, n, "--log", []string{"text", "json", "text"}[i])
	}
	if err := k.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	k.keepKeys(t)
	pods := k.addPods(t)
	serveAll(t, pods)
	k.commands(t)
	k.failingAdds(t, a)
	k.look(t, "in full swing")

	k.end(t, b, unix.SIGKILL)
	k.start(t, b, "--log", "text")
	k.end(t, a, unix.SIGQUIT) // it prints every goroutine
	k.start(t, a, "--log", "json")
	loseTunnel(t, a)
	k.end(t, c, unix.SIGTERM)
	k.must(t, c, "sync")
	k.faults(t, c)
	wrong := "wrong " + rand.Text()
	k.keep("a wrong password", []byte(wrong), passwordFile)
	spoil(t, c, passwordFile, wrong, 0o600, func() {
		k.start(t, c)
		awaitRegistryLine(t, c, "refuses user")
		_, _ = k.command(t, c, "nodes")
		_, _ = k.command(t, c, "leave")
		k.look(t, "wrong password")
		k.end(t, c, unix.SIGTERM)
	})
	slices.Reverse(k.options.Secrets)
	for _, n := range k.Nodes {
		if err := n.Configure(k.options); err != nil {
			t.Fatal(err)
		}
	}
	k.start(t, c, "--log", "json")
	k.end(t, a, unix.SIGTERM)
	k.start(t, a)
	k.end(t, b, unix.SIGTERM)
	k.start(t, b, "--log", "json")
	if err := k.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	k.commands(t)

	k.must(t, a, "forget", "node-c")
	awaitStatus(t, c, "to know that it is forgotten", func(s cluster.Status) bool { return s.Report.Forgotten })
	k.commands(t)
	k.look(t, "forgotten")
	k.end(t, c, unix.SIGTERM)
	k.must(t, c, "leave", "--purge")
	k.must(t, b, "leave")
	k.look(t, "left")
	k.start(t, b)
	k.start(t, c)
	if err := k.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	k.keepKeys(t)
	if len(k.publics) != 4 {
		t.Errorf("%d keys in use; want 4, since node-c has a new one", len(k.publics))
	}
	k.keepPairs(t)
	awaitTalk(t, pods)
	for _, p := range pods {
		deletePod(t, p)
	}
	k.look(t, "at the end")
	for name, log := range k.logs {
		k.told[name] = []byte(log.String())
	}
	for _, n := range k.needles {
		for _, found := range k.told.find(n) {
			t.Error(found)
		}
	}
	k.mustHaveSearched(t)
}

func (k *keeper) addPods(t *testing.T) (pods []*cluster.Pod) {
	t.Helper()
	for _, n := range k.Nodes {
		p := addPod(t, n, cluster.NetworkName, n.Name+"-pod", cluster.PodOptions{})
		out, err := p.CNI(t.Context(), "check")
		if err != nil {
			t.Error(err)
		}
		k.say(n.Name+": ADD", p.Raw)
		k.say(n.Name+": CHECK", out)
		deletePod(t, addPod(t, n, cluster.NetworkName, n.Name+"-brief", cluster.PodOptions{}))
		pods = append(pods, p)
	}
	return pods
}

// commands runs all that only show something.
func (k *keeper) commands(t *testing.T) {
	t.Helper()
	for _, n := range k.Nodes {
		for _, command := range []string{"status", "status --json", "nodes", "nodes --json", "secret list", "sync", "version", "help"} {
			k.must(t, n, strings.Fields(command)...)
		}
		_, _ = k.command(t, n, "forget", n.Name)
		_, _ = k.command(t, n, "secret", "new", "--file", cluster.SecretFile) // which is there
	}
}

// mustHaveSearched fails unless the search came by what is no secret, and by a
// secret that is put where none should be.
func (k *keeper) mustHaveSearched(t *testing.T) {
	t.Helper()
	public := needle{name: "a public key", raw: k.publics[0][:]}
	k.mustBeFound(t, public, "node-b: wgcnid status --json", "node-b: wgcnid nodes", "node-a: HTTP /", "node-a: log", "peers.db", "etcd: get", "underlay:"+k.data)
	canary := make([]byte, 32)
	_, _ = rand.Read(canary) // never fails
	for i := range canary {
		canary[i] |= 1 // no zero, which would end an argument
	}
	a := k.Nodes[0]
	dirs := []string{"/run/wgcni/", "/var/lib/wgcni/", "/var/lib/cni/", "/etc/cni/"}
	for form, text := range written(canary) {
		for _, dir := range dirs {
			if err := a.WriteFile(dir+"canary, "+strings.ReplaceAll(form, "/", " "), text, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	rawEtcd{k.etcd}.ctl(t, "put", "canary", base64.StdEncoding.EncodeToString(canary))
	if _, err := a.Start("env", "CANARY="+string(canary), "sh", "-c", "sleep 1000; true", string(canary)); err != nil {
		t.Fatal(err)
	}
	err := cluster.Poll(t.Context(), "the canary's process", func() error {
		p, err := a.FindProcesses("sh -c sleep 1000; true ")
		if err == nil && len(p) != 1 {
			err = fmt.Errorf("%d processes", len(p))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	k.told = haystack{}
	k.look(t, "canary")
	k.say("output", run(t, a, "printf", "%s", string(canary)))
	var places []string
	for form := range written(canary) {
		for _, dir := range dirs {
			places = append(places, "node-a:"+dir+"canary, "+form+":")
		}
	}
	k.mustBeFound(t, needle{name: "the canary", raw: canary}, append(places,
		"etcd: get", "underlay:"+k.data, "node-a: cmdline of", "node-a: environ of", "output")...)
}

// mustBeFound fails unless a needle is found in places that have this in their names.
func (k *keeper) mustBeFound(t *testing.T, n needle, places ...string) {
	t.Helper()
	found := k.told.find(n)
	for _, place := range places {
		if !slices.ContainsFunc(found, func(f string) bool { return strings.Contains(f, place) }) {
			t.Errorf("%s was not found in: %s", n.name, place)
		}
	}
}

// What others may read is no secret any more: the helper and its commands refuse
// it, and the command that they name mends it.
func TestSecretFilesOpenToOthers(t *testing.T) {
	k := newKeeper(t, 1)
	n := k.Nodes[0]
	if err := n.Configure(k.options); err != nil {
		t.Fatal(err)
	}
	if err := k.start(t, n).WaitFor(t.Context(), "published"); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{privateKeyFile, cluster.SecretFile, passwordFile, clientKeyFile} {
		for _, mode := range []string{"0644", "0640", "0602"} {
			t.Run(mode+" "+file, func(t *testing.T) {
				k.end(t, n, unix.SIGTERM)
				run(t, n, "chmod", mode, file)
				mend := "chmod 600 " + file
				if file != privateKeyFile { // to leave takes no key
					if out, err := k.command(t, n, "leave"); err == nil || !strings.Contains(out, "`"+mend+"`") {
						t.Errorf("leave: %v; want it to say %q", err, mend)
					}
				}
				if out := run(t, n, "wg", "show", "wgcni0"); out == "" {
					t.Error("leave refused, and took away the tunnel")
				}
				h := k.start(t, n)
				if err := h.Log.WaitFor(t.Context(), "`"+mend+"`"); err != nil {
					t.Error(err)
				}
				err := cluster.Poll(t.Context(), "status to say how to mend it", func() error {
					if out, _ := k.command(t, n, "status"); !strings.Contains(out, "`"+mend+"`") {
						return errors.New(out)
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
				_ = h.Signal(t.Context(), unix.SIGTERM) // it may have refused to begin
				_ = h.Wait(t.Context())
				run(t, n, "sh", "-c", mend)
				began := time.Now()
				k.start(t, n)
				awaitStatus(t, n, "the helper to be content", func(s cluster.Status) bool {
					return s.OK && s.Helper && s.Report.At.After(began) && s.Report.RegistryError == "" && s.Report.PublishError == "" && s.Report.SecretsError == ""
				})
				for _, command := range []string{"status", "nodes"} {
					if out, err := k.command(t, n, command); err != nil || strings.Contains(out, "chmod") {
						t.Errorf("%s: %v\n%s", command, err, out)
					}
				}
			})
		}
	}
	k.end(t, n, unix.SIGTERM)
	k.must(t, n, "leave")
}
