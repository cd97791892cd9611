// Package etcd keeps a registry in etcd, one key a node: <prefix>nodes/<name>.
//
// The keys carry no lease. An etcd that is down, wiped or restored from an old
// backup takes no record away from a node that has it; see registry.Merge.
//
// A Store connects at its first use and goes on trying after any failure, so
// that a node starts while etcd is down. What it keeps open is one connection,
// which all its calls share, and one stream for each running Watch.
package etcd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"github.com/wgcni/wgcni/pkg/registry"
)

var _ registry.Store = (*Store)(nil)

const (
	// pageKeys bounds what etcd has to put together for one answer.
	pageKeys = 1000
	// maxBytes bounds what is read into memory, as in package file: 1,000 bytes
	// for each of 67,000 nodes.
	maxBytes = 64 << 20
)

// Config says where etcd is and as whom to speak to it.
type Config struct {
	// Endpoints are its members, such as "https://192.0.2.1:2379"; at least one.
	Endpoints []string
	// Prefix is what the keys begin with, "/wgcni/" by default.
	Prefix string
	// CAFile, in PEM form, vouches for etcd. Optional: the system's by default.
	CAFile string
	// CertFile and KeyFile, in PEM form, are this client's certificate. Both or
	// none. Nobody but the owner may be allowed to read KeyFile.
	CertFile, KeyFile string
	// Username and PasswordFile are for an etcd with authentication. Both or
	// none. Nobody but the owner may be allowed to read PasswordFile.
	Username, PasswordFile string
}

// Store is a handle onto the keys below one prefix of one etcd.
type Store struct {
	cfg     Config
	folder  string // what all our keys begin with
	timeout time.Duration
	probe   time.Duration
	relist  time.Duration
	page    int64
	limit   int
	longest time.Duration // between two attempts while etcd is away
	costly  time.Duration // the same, where an attempt is dear to etcd; see failure
	options []grpc.DialOption

	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	dialing sync.WaitGroup

	mu      sync.Mutex
	conn    *connection // nil while there is none
	watches map[*watch]struct{}
}

// Option changes how a Store works.
type Option func(*Store)

// WithTimeout sets how long a request waits for etcd at most, 5 s by default.
// A call that needs several requests may take several times that.
func WithTimeout(d time.Duration) Option { return func(s *Store) { s.timeout = d } }

// WithProbeInterval sets how often a Watch asks etcd whether it is still there,
// 9 s by default: with the timeout that makes 15 s to notice one that is silent.
func WithProbeInterval(d time.Duration) Option { return func(s *Store) { s.probe = d } }

// WithRelistInterval sets how often a Watch reads all entries even though it
// heard of every change, 10 min by default, and as much again for each MiB.
func WithRelistInterval(d time.Duration) Option { return func(s *Store) { s.relist = d } }

// New returns the registry in the etcd of cfg. It touches nothing yet; what is
// wrong with cfg, or with a file that it names, is said by the first use.
func New(cfg Config, options ...Option) *Store {
	cfg.Endpoints = slices.Clone(cfg.Endpoints)
	if cfg.Prefix == "" {
		cfg.Prefix = "/wgcni/"
	}
	cfg.Prefix = strings.TrimRight(cfg.Prefix, "/") + "/"
	s := &Store{
		cfg: cfg, folder: cfg.Prefix + "nodes/",
		timeout: 5 * time.Second, probe: 9 * time.Second, relist: 10 * time.Minute,
		page: pageKeys, limit: maxBytes, longest: 3 * time.Second, costly: 30 * time.Second,
		watches: map[*watch]struct{}{},
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	for _, o := range options {
		o(s)
	}
	return s
}

// String returns "etcd:", the endpoints and the prefix.
func (s *Store) String() string {
	shown := make([]string, len(s.cfg.Endpoints))
	for i, e := range s.cfg.Endpoints {
		shown[i] = e
		if at := strings.LastIndex(e, "@"); at >= 0 { // after a password, perhaps; see Config.check
			scheme, _, found := strings.Cut(e, "://")
			if shown[i] = e[at+1:]; found {
				shown[i] = scheme + "://" + shown[i]
			}
		}
	}
	return "etcd:" + strings.Join(shown, ",") + s.cfg.Prefix
}

// Close ends the connection. A Watch that still runs sends an error, and closes
// its channel when its ctx ends. It returns nil.
func (s *Store) Close() error {
	s.mu.Lock()
	s.cancel()
	c := s.conn
	s.conn = nil
	s.mu.Unlock()
	s.dialing.Wait()
	if c != nil && c.client != nil {
		_ = c.client.Close() // of what was underway there is nothing to save
	}
	return nil
}

// item is an entry and the revision of its last change, 0 for no entry.
type item struct {
	value []byte
	mod   int64
}

func itemOf(kvs []*mvccpb.KeyValue) item {
	if len(kvs) == 0 {
		return item{}
	}
	return item{value: present(kvs[0].Value), mod: kvs[0].ModRevision}
}

// present tells an empty value from none, which protobuf does not.
func present(value []byte) []byte {
	if value == nil {
		return []byte{}
	}
	return value
}

// nodeName returns the name that a key is for, if it is one of ours. What lies
// deeper, or is the folder itself, is not.
func (s *Store) nodeName(key []byte) (string, bool) {
	name, ours := strings.CutPrefix(string(key), s.folder)
	return name, ours && name != "" && !strings.Contains(name, "/")
}

// Update implements registry.Store. What a running Watch saw last saves it the
// question what is stored, in which case change may be called once more. An
// entry has room in one request of etcd's (--max-request-bytes, 1.5 MiB by
// default) or the error says so.
func (s *Store) Update(ctx context.Context, name string, change func([]byte) ([]byte, error)) error {
	if _, ours := s.nodeName([]byte(s.folder + name)); !ours {
		return fmt.Errorf("update %q: not a node's name; want one without \"/\"", name)
	}
	stored, remembered := s.recall(name)
	for {
		if !remembered && stored == nil {
			var err error
			if stored, err = s.get(ctx, name); err != nil {
				return fmt.Errorf("update %s: %w", name, err)
			}
		}
		// What is remembered is in the hands of the Watch's reader as well.
		value, err := change(bytes.Clone(stored.value))
		if err != nil || value == nil {
			if !remembered {
				return err
			}
			stored, remembered = nil, false // it may have been decided upon the past
			continue
		}
		if stored, err = s.swap(ctx, name, *stored, value); err != nil {
			return fmt.Errorf("update %s: %w", name, err)
		}
		if stored == nil {
			return nil
		}
		remembered = false
	}
}

// recall returns what a running Watch knows of that name.
func (s *Store) recall(name string) (*item, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.watches {
		if known, ok := w.recall(name); ok {
			return &known, true
		}
	}
	return nil, false
}

func (s *Store) get(ctx context.Context, name string) (*item, error) {
	var found item
	err := s.ask(ctx, func(ctx context.Context, c *clientv3.Client) error {
		resp, err := c.Get(ctx, s.folder+name)
		if err == nil {
			found = itemOf(resp.Kvs)
		}
		return err
	})
	return &found, err
}

// swap stores value if nobody has touched the entry since before was read, else
// it returns what is stored instead.
func (s *Store) swap(ctx context.Context, name string, before item, value []byte) (instead *item, err error) {
	key, tries := s.folder+name, 0
	err = s.ask(ctx, func(ctx context.Context, c *clientv3.Client) error {
		tries++
		resp, err := c.Txn(ctx).
			If(clientv3.Compare(clientv3.ModRevision(key), "=", before.mod)).
			Then(clientv3.OpPut(key, string(value))).
			Else(clientv3.OpGet(key)).
			Commit()
		if overlong(err) {
			return rpctypes.ErrRequestTooLarge
		}
		if err != nil {
			return err
		}
		if instead = nil; !resp.Succeeded {
			found := itemOf(resp.Responses[0].GetResponseRange().Kvs)
			instead = &found
		}
		return nil
	})
	// An attempt whose answer was lost may have taken place.
	if err == nil && instead != nil && tries > 1 && instead.mod != 0 && bytes.Equal(instead.value, value) {
		return nil, nil
	}
	return instead, err
}

// Entries implements registry.Store.
func (s *Store) Entries(ctx context.Context) (registry.Entries, error) {
	l, err := s.list(ctx)
	if err != nil {
		return nil, err
	}
	return entriesOf(l.items), nil
}

func entriesOf(items map[string]item) registry.Entries {
	entries := make(registry.Entries, len(items))
	for name, i := range items {
		entries[name] = i.value
	}
	return entries
}

// listing is all entries at one revision, that of its header.
type listing struct {
	items  map[string]item
	bytes  int // of names and values
	header *etcdserverpb.ResponseHeader
}

// list reads all entries page by page, all of them as of the first page's
// revision. Where that one is compacted meanwhile it begins anew.
func (s *Store) list(ctx context.Context) (listing, error) {
	for {
		l, err := s.listOnce(ctx)
		if !errors.Is(err, rpctypes.ErrCompacted) && !errors.Is(err, rpctypes.ErrFutureRev) {
			return l, err
		}
		// No pause: each round reads a page, and compactions are minutes apart.
		if ctx.Err() != nil {
			return listing{}, s.explain(ctx.Err())
		}
	}
}

func (s *Store) listOnce(ctx context.Context) (listing, error) {
	l := listing{items: map[string]item{}}
	from, end := s.folder, clientv3.GetPrefixRangeEnd(s.folder)
	for {
		var page *clientv3.GetResponse
		err := s.ask(ctx, func(ctx context.Context, c *clientv3.Client) (err error) {
			options := []clientv3.OpOption{clientv3.WithRange(end), clientv3.WithLimit(s.page)}
			if l.header != nil {
				options = append(options, clientv3.WithRev(l.header.Revision))
			}
			if page, err = c.Get(ctx, from, options...); overlong(err) {
				return errOversized
			}
			return err
		})
		if err != nil {
			return listing{}, err
		}
		if l.header == nil {
			l.header = page.Header
		}
		for _, kv := range page.Kvs {
			if name, ours := s.nodeName(kv.Key); ours {
				l.items[name] = item{value: present(kv.Value), mod: kv.ModRevision}
				l.bytes += len(name) + len(kv.Value)
			}
		}
		if l.bytes > s.limit {
			return listing{}, s.explain(errOversized)
		}
		if !page.More || len(page.Kvs) == 0 {
			return l, nil
		}
		from = string(page.Kvs[len(page.Kvs)-1].Key) + "\x00" // the key that follows
	}
}
