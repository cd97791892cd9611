package operate

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/test/cluster"
)

// The page in a real browser: it shows what there is and follows what changes, with
// no word of complaint in the console, and asks nobody but the helper.
func TestPage(t *testing.T) {
	c, helpers, pods := cluster.NewMeshT(t, 3, 1, cluster.NetworkOptions{})
	a := c.Nodes[0]
	cluster.ServeT(t, pods[1])
	if err := cluster.Talk(t.Context(), pods[0], pods[1], bytes.Repeat([]byte("x"), 1000)); err != nil {
		t.Fatal(err)
	}
	b := browse(t, a.Machine)
	site := "http://" + cluster.HelperHTTP + "/"
	for _, width := range []int{1280, 360} {
		for _, scheme := range []string{"light", "dark"} {
			b.open(site, width, scheme)
			if dir := os.Getenv("WGCNI_SCREENSHOTS"); dir != "" {
				if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("page-%d-%s.png", width, scheme)), b.picture(), 0o644); err != nil {
					t.Error(err)
				}
			}
			if got := b.eval("document.documentElement.scrollWidth - document.documentElement.clientWidth"); got != "0" {
				t.Errorf("%d pixels wide, %s: the page is %s pixels wider", width, scheme, got)
			}
		}
	}
	for _, want := range []string{"Pod traffic to all 2 other nodes is encrypted", "node-b", "node-c", "10.244.3.0/24", "connected", "starting node=node-a"} {
		if b.eval(fmt.Sprintf("document.querySelector('main').innerText.includes(%q)", want)) != "true" {
			t.Errorf("it does not say %q", want)
		}
	}
	if got := b.eval("document.querySelectorAll('#picture svg rect.chip').length"); got < "3" {
		t.Errorf("%s machines are drawn", got)
	}

	// It follows by itself, without being loaded anew.
	b.eval("window.still = true")
	if _, err := a.AddPod(t.Context(), cluster.NetworkName, "another", cluster.PodOptions{}); err != nil {
		t.Fatal(err)
	}
	b.await("[...document.querySelectorAll('#tiles div')].some(e => e.innerText.startsWith('Pods\\n2')) && window.still")
	requests, complains := b.said()
	for _, url := range requests {
		if !strings.HasPrefix(url, site) && !strings.HasPrefix(url, "data:") {
			t.Errorf("the page asks for %s", url)
		}
	}
	if len(requests) == 0 || len(complains) > 0 {
		t.Errorf("%d requests; the browser says %q", len(requests), complains)
	}

	// And it says so when nobody answers any more.
	if err := helpers[0].Kill(); err != nil {
		t.Fatal(err)
	}
	// It need not be waited for any longer that it asks by itself.
	b.await("renew(), !document.getElementById('lost').hidden && document.getElementById('lost').innerText.startsWith('wgcnid has not answered since')")
	if _, err := a.StartHelper(); err != nil {
		t.Fatal(err)
	}
	b.await("renew(), document.getElementById('lost').hidden && window.still")
}
