package main

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
	"time"
)

// The picture is well-formed, names what it shows, and every point lies inside it.
func TestPlot(t *testing.T) {
	var all []grown
	for _, n := range growthSizes {
		all = append(all, grown{
			nodes: n, cold: time.Duration(n) * time.Millisecond, coldCPU: 60*time.Millisecond + time.Duration(n)*240*time.Microsecond,
			change: .0024 + float64(n)*2e-6, resident: 24<<20 + int64(n)*6<<10,
		})
	}
	svg := plot(all)
	circles, d := 0, xml.NewDecoder(strings.NewReader(svg))
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, svg)
		}
		if e, ok := token.(xml.StartElement); ok && e.Name.Local == "circle" {
			circles++
			for _, a := range e.Attr {
				if strings.HasPrefix(a.Value, "-") || strings.Contains(a.Value, "NaN") {
					t.Errorf("a point at %s=%s", a.Name.Local, a.Value)
				}
			}
		}
	}
	if want := 3 * len(growthSizes); circles != want {
		t.Errorf("%d points, want %d", circles, want)
	}
	for _, text := range []string{"5,000", "one node changed", "full apply", "64 MiB", "nodes in the mesh", "prefers-color-scheme: dark"} {
		if !strings.Contains(svg, text) {
			t.Errorf("%q is not in the picture", text)
		}
	}
}
