package etcd

import (
	"fmt"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/registry/etcd/etcdtest"
)

func TestTry(t *testing.T) {
	b := time.Now()
	srv := etcdtest.Start(t, etcdtest.Options{})
	t.Log("start", time.Since(b))
	s := New(Config{Endpoints: srv.Endpoints()})
	defer s.Close()
	t.Log(s.Entries(t.Context()))
	ch := s.Watch(t.Context())
	t.Log(<-ch)
	t.Log(s.Update(t.Context(), "node-a", func(b []byte) ([]byte, error) { return []byte(fmt.Sprintf("x%q", b)), nil }))
	t.Log(<-ch)
	b = time.Now()
	srv.Kill()
	t.Log(<-ch, time.Since(b))
	t.Log(s.Entries(t.Context()))
	b = time.Now()
	t.Log(srv.Restart(t.Context()), time.Since(b))
	t.Log(<-ch, time.Since(b))
	srv.Pause()
	b = time.Now()
	t.Log(<-ch, time.Since(b))
	srv.Resume()
	b = time.Now()
	t.Log(<-ch, time.Since(b))
}
