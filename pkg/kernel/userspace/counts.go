package userspace

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/wgcni/wgcni/pkg/durable"
)

// Counts are what a tunnel process has counted since it was started, for WireGuard
// on a tun device has no counters of its own.
type Counts struct {
	// UnallowedSource are the packets that a peer had sealed, but not with a source
	// address that is allowed to it.
	UnallowedSource uint64 `json:"unallowedSource"`
}

// countsEnv names the file in which a tunnel process leaves its Counts.
const countsEnv = "WGCNI_TUNNEL_COUNTS"

// countsEvery is how often that file is written at most.
const countsEvery = time.Second

func countsPath(logFile string) string {
	return strings.TrimSuffix(logFile, filepath.Ext(logFile)) + ".json"
}

// ReadCounts reads what the tunnel process has counted that logs to this file.
func ReadCounts(logFile string) (c Counts, err error) {
	text, err := os.ReadFile(countsPath(logFile))
	if err != nil {
		return c, err
	}
	return c, json.Unmarshal(text, &c)
}

// counter counts what the library only logs.
type counter struct {
	unallowed atomic.Uint64
	changed   chan struct{}
}

func newCounter() *counter { return &counter{changed: make(chan struct{}, 1)} }

// verbosef is a device.Logger's. A flood of such packets costs no more than the
// counting of them.
func (c *counter) verbosef(format string, _ ...any) {
	switch format {
	case "IPv4 packet with disallowed source address from %v", "IPv6 packet with disallowed source address from %v":
		c.unallowed.Add(1)
		select {
		case c.changed <- struct{}{}:
		default:
		}
	}
}

// keep writes the file until ctx ends, when there is news and no more often than
// every so long. It begins with zero, lest the last process's counts stay.
func (c *counter) keep(ctx context.Context, path string, every time.Duration) {
	for {
		text, err := json.Marshal(Counts{UnallowedSource: c.unallowed.Load()})
		if err == nil { // what cannot be written now is tried again with the next one
			_ = durable.Replace(path, append(text, '\n'), 0o600)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(every):
		}
		select {
		case <-ctx.Done():
			return
		case <-c.changed:
		}
	}
}
