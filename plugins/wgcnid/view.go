package main

import (
	"context"
	"errors"
	"fmt"
	"html/template"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/page"
	"github.com/wgcni/wgcni/pkg/store"
	"github.com/wgcni/wgcni/pkg/version"
)

const (
	// manyDrawn is how many machines a picture may have: its lines are as many as
	// pairs, and nobody could tell them apart.
	manyDrawn = 300
	// manyListed is how many peers the page lists.
	manyListed = 200
	// manyEvents is how many lines of the log the page shows.
	manyEvents = 30
)

var errManyMachines = fmt.Errorf("more than %d machines are not drawn", manyDrawn)

// viewPatience is how long a caller waits for what has to be made.
const viewPatience = 15 * time.Second

// made is what make returns. Callers of the same moment get the same; those of a
// node that does not answer are not kept waiting for ever.
func (w *web) made(name string, make func(context.Context) (string, error)) (string, error) {
	// Not the caller's context: others wait for it as well.
	done := w.flight.DoChan(name, func() (any, error) { return make(context.Background()) })
	patience := time.NewTimer(viewPatience)
	defer patience.Stop()
	select {
	case got := <-done:
		text, _ := got.Val.(string)
		return text, got.Err
	case <-patience.C:
		return "", fmt.Errorf("the node's state cannot be read within %s", viewPatience)
	}
}

// readSpare reads the second interface, which is there while keys are replaced. What
// cannot be read is as good as not there: the first one tells whether all is well.
func readSpare(c config.Config) kernel.Reading {
	k, err := kernel.Open(kernel.Config{Interface: mesh.SpareInterface(c.Interface)})
	if err != nil {
		return kernel.Reading{}
	}
	defer k.Close()
	r, err := k.Read()
	if err != nil {
		return kernel.Reading{}
	}
	return r
}

func (w *web) servePage(rw http.ResponseWriter, _ *http.Request) {
	text, err := w.made("page", func(ctx context.Context) (string, error) {
		var b strings.Builder
		err := w.page(ctx).Render(&b)
		return b.String(), err
	})
	if err != nil {
		answer(rw, err)
		return
	}
	rw.Header().Set("Content-Type", "text/html; charset=utf-8")
	rw.Header().Set("Content-Security-Policy", page.Policy())
	_, _ = io.WriteString(rw, text) // a caller that has gone needs no answer
}

func (w *web) serveGraph(rw http.ResponseWriter, _ *http.Request) {
	text, err := w.made("graph", w.picture)
	switch {
	case errors.Is(err, errManyMachines):
		http.Error(rw, err.Error()+"; `wgcnid graph` draws them", http.StatusNotFound)
	case err != nil:
		answer(rw, err)
	default:
		rw.Header().Set("Content-Type", "image/svg+xml")
		rw.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
		_, _ = io.WriteString(rw, text)
	}
}

// picture draws what this node knows; the registry is not asked.
func (w *web) picture(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	c, err := w.options.loadLast()
	if err != nil {
		return "", err
	}
	known, _, err := store.LoadKnown(ctx, w.config.StateDir)
	if err != nil {
		return "", err
	}
	if len(known.Records.Nodes) > manyDrawn {
		return "", errManyMachines
	}
	v := meshView{self: known.Self, records: known.Records}
	return printable(drawMesh(c, v).WithTunnels(ownTunnels(c, v, time.Now())).SVG()), nil
}

// page looks at the node, as `wgcnid status` does.
func (w *web) page(ctx context.Context) page.Page {
	p := page.Page{Node: printable(w.config.NodeName), Version: version.String(), Time: localTime(time.Now()), Events: w.events.Latest()}
	for i := range p.Events {
		p.Events[i].Text = printable(p.Events[i].Text)
	}
	s, err := readStatus(ctx, w.options)
	if err != nil {
		p.Level, p.Verdict = page.Fault, "The state of this node cannot be read: "+printable(oneLine(err.Error()))
	} else {
		w.describe(&p, s)
	}
	picture, err := w.picture(ctx)
	if err != nil {
		p.PictureNote = "There is no picture: " + printable(oneLine(err.Error()))
	}
	p.Picture = template.HTML(picture) //nolint:gosec // graph escapes what it writes
	return p
}

func (w *web) describe(p *page.Page, s Status) {
	p.Verdict, p.Level = printable(fmt.Sprintf("%s. %s", s.Answer, s.Verdict)), page.OK
	switch {
	case !s.OK, s.Answer == AnswerNo:
		p.Level = page.Fault
	case s.Answer == AnswerPartly, s.Encryption == mesh.Preferred:
		p.Level = page.Note
	}
	p.Faults = pageFaults(s)
	p.Peers, p.PeersNote = pagePeers(s)
	p.Tiles = w.tiles(s)
	p.Facts = pageFacts(s)
}

// pageFaults are what `wgcnid status` prints beside its table.
func pageFaults(s Status) (out []string) {
	var b strings.Builder
	if s.Report != nil {
		printReport(&b, s)
	}
	for _, op := range s.Pending {
		fmt.Fprintln(&b, "pending:", op)
	}
	if s.Forwarding != "" {
		fmt.Fprintln(&b, s.Forwarding)
	}
	if s.Interface != nil && s.Interface.Fragments != "" {
		fmt.Fprintln(&b, s.Interface.Fragments)
	}
	for line := range strings.Lines(printable(b.String())) {
		out = append(out, strings.TrimSpace(line))
	}
	const most = 20
	if more := len(out) - most; more > 0 {
		out = append(out[:most], fmt.Sprintf("and %d more; `wgcnid status` lists all", more))
	}
	return out
}

func stateLevel(state string) string {
	switch state {
	case stateConnected:
		return page.OK
	case stateMissing:
		return page.Fault
	}
	return page.Note // it may be that nobody had anything to say
}

// pagePeers has those first that are not connected, where not all are listed.
func pagePeers(s Status) (out []page.Peer, note string) {
	peers := s.Peers
	if len(peers) > manyListed {
		peers = slices.Clone(peers)
		slices.SortStableFunc(peers, func(a, b PeerStatus) int {
			return slices.Index(peerStates, b.State) - slices.Index(peerStates, a.State)
		})
		note = fmt.Sprintf("%d peers more; `wgcnid status` lists all.", len(peers)-manyListed)
		peers = peers[:manyListed]
	}
	for _, p := range peers {
		endpoint := "–"
		if p.Endpoint.IsValid() {
			endpoint = p.Endpoint.String()
		}
		out = append(out, page.Peer{
			Name: printable(p.Name), State: p.State, Level: stateLevel(p.State), Reason: printable(oneLine(p.Reason)), Endpoint: endpoint, Handshake: ago(s.Time, p.LastHandshake),
			Received: size(p.ReceiveBytes), Sent: size(p.TransmitBytes), AllowedIPs: list(p.AllowedIPs),
		})
	}
	return out, note
}

func (w *web) tiles(s Status) []page.Tile {
	connected := 0
	for _, p := range s.Peers {
		if p.State == stateConnected {
			connected++
		}
	}
	peers := page.Tile{Name: "Peers connected", Value: fmt.Sprintf("%d of %d", connected, len(s.Peers)), Note: "the others when there is traffic"}
	if connected == len(s.Peers) {
		peers.Note = "with a handshake in the last 3 minutes"
	}
	own := page.Tile{Name: "Pods", Value: fmt.Sprint(s.Pods), Note: "on this node"}
	if s.Machine != nil {
		own = page.Tile{Name: "Machine", Value: "no pods", Note: "reached at " + few(texts(s.Machine.Hosts), "none of its own addresses")}
	}
	tiles := []page.Tile{peers, own, dropTile("Plaintext out", s.Dropped.Out), dropTile("Plaintext in", s.Dropped.In)}
	if r, err := w.read(); err == nil && r.Unallowed != nil {
		tiles = append(tiles, page.Tile{Name: "Unallowed sources", Value: fmt.Sprint(*r.Unallowed), Note: "packets dropped", Level: noteIf(*r.Unallowed > 0)})
	}
	return tiles
}

func dropTile(name string, d kernel.DropCount) page.Tile {
	return page.Tile{Name: name, Value: fmt.Sprint(d.Packets), Note: "packets kept back", Level: noteIf(d.Packets > 0)}
}

func noteIf(is bool) string {
	if is {
		return page.Note
	}
	return page.OK
}

// pageFacts are the head of `wgcnid status`.
func pageFacts(s Status) (out []page.Fact) {
	add := func(name, value string) {
		if value != "" {
			out = append(out, page.Fact{Name: name, Value: printable(value)})
		}
	}
	add("prefixes", list(s.Prefixes))
	if s.Machine != nil {
		add("hint", s.Machine.Hint)
	}
	if i := s.Interface; i != nil {
		add("interface", fmt.Sprintf("%s, UDP port %d, MTU %d", i.Name, i.ListenPort, i.MTU))
	}
	add("public key", s.PublicKey)
	add("rotation", s.rotation())
	add("encryption", s.Encryption.String())
	add("registry", s.Registry+registryNote(s))
	add("seal", sealNote(s))
	if s.Nodes != nil {
		add("node traffic", s.Nodes.note(s.Peers))
	}
	if s.Report != nil {
		add("last pass", localTime(s.Report.At))
	}
	return out
}
