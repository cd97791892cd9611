package page_test

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"html/template"
	"log/slog"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/graph"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/page"
)

func render(t *testing.T, p page.Page) string {
	t.Helper()
	var b strings.Builder
	if err := p.Render(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// hostile is what somebody who can write to the registry might call a node.
const hostile = `"><script>alert(1)</script><img src=x onerror=alert(2)>'`

func TestRenderEscapes(t *testing.T) {
	p := page.Page{
		Node: hostile, Version: hostile, Time: hostile, Verdict: hostile, Level: page.OK, Faults: []string{hostile},
		Tiles: []page.Tile{{hostile, hostile, hostile, page.OK}}, PictureNote: hostile, PeersNote: hostile,
		Peers: []page.Peer{{hostile, hostile, page.OK, hostile, hostile, hostile, hostile, hostile, hostile}},
		Facts: []page.Fact{{hostile, hostile}}, Events: []page.Event{{hostile, page.OK, hostile}},
	}
	text := render(t, p)
	if strings.Contains(text, "<script>alert") || strings.Contains(text, "<img") {
		t.Errorf("it is not escaped:\n%s", text)
	}
	if n := strings.Count(text, "&lt;script&gt;"); n < 20 {
		t.Errorf("it is there %d times:\n%s", n, text)
	}
}

// A browser runs the script only if its hash is the policy's.
func TestPolicyAllowsTheScript(t *testing.T) {
	text := render(t, page.Page{})
	found := regexp.MustCompile(`(?s)<script>(.*?)</script>`).FindAllStringSubmatch(text, -1)
	if len(found) != 1 {
		t.Fatalf("%d scripts", len(found))
	}
	sum := sha256.Sum256([]byte(found[0][1]))
	if want := "script-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"; !strings.Contains(page.Policy(), want) {
		t.Errorf("the policy is %s; want %s", page.Policy(), want)
	}
	if strings.Contains(text, "ZgotmplZ") {
		t.Error("the template refuses a value")
	}
}

// The picture's style holds for the whole page: no class may be of both.
func TestClassesOfPictureAndPage(t *testing.T) {
	class := regexp.MustCompile(`class="([^"]*)"`)
	svg := graph.New([]mesh.Node{{Name: "a"}, {Name: "b"}}, nil, "a").SVG()
	text := render(t, page.Page{
		Level: page.OK, Picture: template.HTML(svg), Faults: []string{"x"}, Tiles: []page.Tile{{Level: page.OK}}, PeersNote: "x",
		Peers: []page.Peer{{Level: page.OK, Reason: "x"}}, Facts: []page.Fact{{}}, Events: []page.Event{{Level: page.OK}},
	})
	if !strings.Contains(text, svg) {
		t.Fatal("the picture is not there as it is")
	}
	for _, m := range class.FindAllStringSubmatch(strings.Replace(text, svg, "", 1), -1) {
		for name := range strings.FieldsSeq(m[1]) {
			if !strings.HasPrefix(name, "p-") {
				t.Errorf("class %s of the page", name)
			}
		}
	}
	if strings.Contains(svg, ".p-") {
		t.Error("the picture has a class that begins with p-")
	}
}

func TestEvents(t *testing.T) {
	var b strings.Builder
	events := page.NewEvents(3)
	log := slog.New(events.Handler(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelWarn})))
	log.Debug("not kept")
	log.Info("dropped again")
	log.With("node", "a").WithGroup("g").Info("kept", "n", 1, "text", "two words", slog.Group("h", "x", 2))
	log.Warn("warned", "error", errors.New("it broke"))
	log.Error(strings.Repeat("ä", 1000))
	var got []string
	for _, e := range events.Latest() {
		got = append(got, fmt.Sprintf("%s %d %.60s", e.Level, len(e.Time), e.Text))
	}
	want := []string{
		"fault 19 " + strings.Repeat("ä", 60),
		`note 19 warned error="it broke"`,
		`ok 19 kept node=a g.n=1 g.text="two words" g.h.x=2`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if n := len(events.Latest()[0].Text); n > 610 {
		t.Errorf("a line of %d bytes is kept", n)
	}
	if strings.Contains(b.String(), "kept") || !strings.Contains(b.String(), "warned") {
		t.Errorf("handed on: %s", &b)
	}
}
