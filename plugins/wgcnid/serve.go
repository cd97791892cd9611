package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sync/singleflight"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/kernel/userspace"
	"github.com/wgcni/wgcni/pkg/metrics"
	"github.com/wgcni/wgcni/pkg/page"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/store"
	"github.com/wgcni/wgcni/pkg/version"
)

// defaultHTTP is where the helper is asked how it fares, by its own machine alone.
const defaultHTTP = "127.0.0.1:51822"

const (
	// listenAgain is how often a port that is taken is tried.
	listenAgain = 5 * time.Second
	// manyConnections is how many are served at once; more wait in the kernel.
	manyConnections = 32
)

// web is what the helper serves: whether it lives, whether the node is as planned,
// metrics, and a page for people. It changes nothing.
type web struct {
	options options
	config  config.Config
	listen  string
	log     *slog.Logger
	metrics *metrics.Metrics
	events  *page.Events
	started time.Time
	flight  singleflight.Group

	counting sync.Mutex
	verbs    store.VerbLog
}

// parseListen checks --http; it is "" where nothing is to be served.
func parseListen(text string) (string, error) {
	if text == "off" {
		return "", nil
	}
	_, port, err := net.SplitHostPort(text)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return "", fmt.Errorf("--http: %q is neither ADDRESS:PORT nor \"off\"", text)
	}
	return text, nil
}

func newWeb(o options, c config.Config, listen string, events *page.Events, log *slog.Logger) *web {
	w := &web{options: o, config: c, listen: listen, events: events, log: log, started: time.Now()}
	w.metrics = metrics.New(metrics.Config{
		Version: version.String(), Node: c.NodeName, Interface: c.Interface, Encryption: c.Encryption.String(),
		Read: w.read, State: peerState, States: peerStates, Now: time.Now,
	})
	return w
}

// read reads by a connection of its own: the loop does not wait for scrapes, and
// nothing of what was read is kept.
func (w *web) read() (r metrics.Reading, err error) {
	if keys, err := identity.LoadKeys(w.config.StateDir); err == nil {
		r.KeySince = keys.Since
	}
	k, err := kernel.Open(kernel.Config{Interface: w.config.Interface})
	if err != nil {
		return r, err
	}
	defer k.Close()
	if r.Reading, err = k.Read(); err != nil {
		return r, err
	}
	if r.Userspace { // a process of an older version counts nothing
		if c, err := userspace.ReadCounts(tunnelLog(w.config, w.config.Interface)); err == nil {
			r.Unallowed = &c.UnallowedSource
		}
	}
	r.Spare = readSpare(w.config).Peers
	r.Drops, err = k.Drops()
	return r, err
}

// passed is for reconcile.Loop.
func (w *web) passed(p reconcile.Passed) {
	w.metrics.Passed(p)
	w.countVerbs() // now and then, even if nobody asks: their log is bounded
}

func (w *web) countVerbs() {
	w.counting.Lock()
	defer w.counting.Unlock()
	verbs, _ := w.verbs.Drain(w.config.RunDir) // what cannot be read was written by no verb
	w.metrics.Verbs(verbs)
}

// run serves until ctx ends. A port that is taken is no reason for a node to be
// without its helper.
func (w *web) run(ctx context.Context) {
	if w.listen == "" {
		return
	}
	failing := ""
	for {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", w.listen)
		if err == nil {
			if failing != "" {
				w.log.Info("serving metrics and status", "address", l.Addr())
			}
			failing = ""
			err = w.serve(ctx, l)
		}
		if ctx.Err() != nil {
			return
		}
		if text := err.Error(); text != failing {
			failing = text
			w.log.Warn("cannot serve metrics and status; trying again every few seconds", "error", err, "mend", `free the port, or name another by --http; --http off serves nothing`)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(listenAgain):
		}
	}
}

func (w *web) serve(ctx context.Context, l net.Listener) error {
	server := &http.Server{
		Handler: w.handler(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug), // what callers do wrong is theirs to see
	}
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	return server.Serve(netutil.LimitListener(l, manyConnections))
}

func (w *web) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(rw http.ResponseWriter, _ *http.Request) {
		answer(rw, metrics.Alive(w.metrics.Last(), w.started, time.Now()))
	})
	mux.HandleFunc("GET /readyz", func(rw http.ResponseWriter, _ *http.Request) {
		last := w.metrics.Last()
		err := errors.New("the first pass is not done yet")
		if last != nil {
			err = errors.Join(metrics.Alive(last, w.started, time.Now()), metrics.Ready(last.Report))
		}
		answer(rw, err)
	})
	scrape := w.metrics.Handler()
	mux.HandleFunc("GET /metrics", func(rw http.ResponseWriter, r *http.Request) {
		w.countVerbs()
		scrape.ServeHTTP(rw, r)
	})
	mux.HandleFunc("GET /{$}", w.servePage)
	mux.HandleFunc("GET /graph.svg", w.serveGraph)
	return w.guarded(mux)
}

func answer(rw http.ResponseWriter, err error) {
	if err != nil {
		http.Error(rw, printable(oneLine(err.Error())), http.StatusServiceUnavailable)
		return
	}
	rw.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = io.WriteString(rw, "ok\n") // a caller that has gone needs no answer
}

// guarded answers nobody who was led here by a name of their own: a web site could
// have its visitors' browsers ask their machine (DNS rebinding).
func (w *web) guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if !w.addressed(r.Host) {
			http.Error(rw, "this server answers to addresses and to localhost only", http.StatusMisdirectedRequest)
			return
		}
		h := rw.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-store")
		next.ServeHTTP(rw, r)
	})
}

// addressed reports whether a Host header names this server as no stranger's name
// could: an address, localhost, or the very name that --http has.
func (w *web) addressed(host string) bool {
	if host == "" {
		return true // HTTP/1.0, which no browser speaks
	}
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	name = strings.TrimSuffix(strings.TrimPrefix(name, "["), "]")
	own, _, _ := net.SplitHostPort(w.listen)
	_, err := netip.ParseAddr(name)
	return err == nil || strings.EqualFold(name, "localhost") || own != "" && strings.EqualFold(name, own)
}
