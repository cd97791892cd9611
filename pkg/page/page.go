// Package page shows a node's state to people: one page of HTML, with nothing in
// it that a browser would have to fetch from elsewhere.
package page

import (
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"html/template"
	"io"
)

// Levels, by which the page is coloured.
const (
	OK    = "ok"
	Note  = "note"
	Fault = "fault"
)

// Page is what there is to show.
type Page struct {
	Node    string
	Version string
	Time    string // when it was made
	// Verdict answers, in one sentence, whether traffic is encrypted.
	Verdict string
	Level   string // of the verdict
	Faults  []string
	Tiles   []Tile
	// Picture is SVG; "" where PictureNote says why there is none.
	Picture     template.HTML
	PictureNote string
	Peers       []Peer
	// PeersNote says what the table leaves out; "" if nothing.
	PeersNote string
	Facts     []Fact
	Events    []Event // the latest first
}

// Tile is a figure to be seen at a glance.
type Tile struct{ Name, Value, Note, Level string }

// Fact is a line about the node itself.
type Fact struct{ Name, Value string }

// Peer is a line of the table.
type Peer struct {
	Name, State, Level, Reason                      string
	Endpoint, Handshake, Received, Sent, AllowedIPs string
}

//go:embed page.html
var source string

//go:embed page.js
var script string

//go:embed page.css
var style string

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"style":  func() template.CSS { return template.CSS(style) }, //nolint:gosec // embedded
	"script": func() template.JS { return template.JS(script) },  //nolint:gosec // embedded
}).Parse(source))

// Policy is the page's Content-Security-Policy: its own script, told by its hash,
// may ask this server for the page again; all else is forbidden. Styles are inline,
// also in the picture.
func Policy() string {
	sum := sha256.Sum256([]byte(script))
	return "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; script-src 'sha256-" +
		base64.StdEncoding.EncodeToString(sum[:]) + "'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}

// Render writes the page as HTML.
func (p Page) Render(w io.Writer) error { return page.Execute(w, p) }
