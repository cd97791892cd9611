package store

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// Attachment is one interface of one pod, as ADD recorded it.
type Attachment struct {
	Network     string       `json:"network"`
	ContainerID string       `json:"containerID"`
	IfName      string       `json:"ifname"`
	Addresses   []netip.Addr `json:"addresses"`
	// Sandbox is the path of the pod's network namespace, SandboxID its inode
	// (see kernel.SandboxID), by which a reused path is told apart.
	Sandbox   string `json:"sandbox,omitempty"`
	SandboxID uint64 `json:"sandboxID,omitempty"`
	Pod       string `json:"pod,omitempty"` // namespace/name, if the runtime told
	// Since is when the addresses were first attached to this container and
	// interface. Zero in what an older version wrote.
	Since time.Time `json:"since,omitzero"`
	// LinkMTU is the MTU that the pod's link has where the tunnel's is not less, and
	// TunnelMTU the tunnel's that it was set by. In bytes; 0 if we have not set it.
	LinkMTU   int `json:"linkMTU,omitempty"`
	TunnelMTU int `json:"tunnelMTU,omitempty"`
	// Sequence orders attachments; Put sets it.
	Sequence uint64 `json:"sequence"`
}

// Applied describes the last whole plan that was applied since this node booted.
type Applied struct {
	// Settings is the digest of the settings that the plan was made from.
	Settings string         `json:"settings"`
	Prefixes []netip.Prefix `json:"prefixes,omitempty"` // this node's own
	MTU      int            `json:"mtu"`                // of the pods' links, in bytes
	At       time.Time      `json:"at"`
}

var (
	attachmentsBucket = []byte("attachments")
	metaBucket        = []byte("meta")
	appliedKey        = []byte("applied")
	completeKey       = []byte("complete")

	attachmentsLayout = layout{buckets: [][]byte{attachmentsBucket, metaBucket}, check: checkEnds}
)

// Attachments is the open store of this boot. Its holder should be done with it
// within milliseconds: an ADD may be waiting.
type Attachments struct{ *file }

// AttachmentsPath is the file of a run folder.
func AttachmentsPath(runDir string) string { return filepath.Join(runDir, "attachments.db") }

// OpenAttachments locks and opens the store of this boot. The error Is
// ErrLocked if ctx ended before the lock was free.
func OpenAttachments(ctx context.Context, runDir string) (*Attachments, error) {
	f, err := open(ctx, AttachmentsPath(runDir), attachmentsLayout)
	if err != nil {
		return nil, err
	}
	return &Attachments{f}, nil
}

// Close closes the store and lets others in.
func (a *Attachments) Close() error { return a.close() }

// Damaged returns what became of a damaged store when this one took its place,
// or nil. Ask after All, which may be the first to see it.
func (a *Attachments) Damaged() *Damaged { return a.damaged }

func attachmentKey(containerID, ifname string) []byte {
	return []byte(containerID + "\x00" + ifname) // neither may contain a NUL
}

// All returns every attachment, in the order in which they were put. A store
// with a value that is no attachment is damaged too, and replaced.
func (a *Attachments) All() (out []Attachment, err error) {
	err = a.view(func(tx *bolt.Tx) error {
		return tx.Bucket(attachmentsBucket).ForEach(func(k, v []byte) error {
			at, err := decodeAttachment(k, v)
			out = append(out, at)
			return err
		})
	})
	if errors.Is(err, errDamage) && a.damaged == nil {
		return nil, a.replace(err, attachmentsLayout)
	}
	slices.SortFunc(out, func(a, b Attachment) int { return cmp.Compare(a.Sequence, b.Sequence) })
	return out, err
}

func decodeAttachment(k, v []byte) (at Attachment, err error) {
	if err := json.Unmarshal(v, &at); err != nil {
		return at, fmt.Errorf("%w: the value of %q: %w", errDamage, k, err)
	}
	if !bytes.Equal(k, attachmentKey(at.ContainerID, at.IfName)) {
		return at, fmt.Errorf("%w: the value of %q is another attachment's", errDamage, k)
	}
	return at, nil
}

// Get returns one attachment, false if there is none. Its cost does not grow with
// the number of pods.
func (a *Attachments) Get(containerID, ifname string) (at Attachment, ok bool, err error) {
	err = a.view(func(tx *bolt.Tx) (err error) {
		k := attachmentKey(containerID, ifname)
		if v := tx.Bucket(attachmentsBucket).Get(k); v != nil {
			ok = true
			at, err = decodeAttachment(k, v)
		}
		return err
	})
	return at, ok && err == nil, err
}

// Put adds an attachment, or replaces the one of the same container and interface.
func (a *Attachments) Put(at Attachment) error {
	return a.update(func(tx *bolt.Tx) (err error) {
		b := tx.Bucket(attachmentsBucket)
		if at.Sequence, err = b.NextSequence(); err != nil {
			return err
		}
		v, err := json.Marshal(at)
		if err != nil {
			return err
		}
		return b.Put(attachmentKey(at.ContainerID, at.IfName), v)
	})
}

// SetMTU records LinkMTU and TunnelMTU of attachments that are still those of the
// same sandbox, and leaves all else of them as it is.
func (a *Attachments) SetMTU(changed ...Attachment) error {
	return a.update(func(tx *bolt.Tx) error {
		b := tx.Bucket(attachmentsBucket)
		for _, at := range changed {
			k := attachmentKey(at.ContainerID, at.IfName)
			v := b.Get(k)
			if v == nil {
				continue
			}
			now, err := decodeAttachment(k, v)
			if err != nil {
				return err
			}
			if now.SandboxID != at.SandboxID {
				continue
			}
			now.LinkMTU, now.TunnelMTU = at.LinkMTU, at.TunnelMTU
			if err := putJSON(b, k, now); err != nil {
				return err
			}
		}
		return nil
	})
}

// Delete removes attachments; those that are not there are no error.
func (a *Attachments) Delete(gone ...Attachment) error {
	return a.update(func(tx *bolt.Tx) error {
		b := tx.Bucket(attachmentsBucket)
		for _, at := range gone {
			if err := b.Delete(attachmentKey(at.ContainerID, at.IfName)); err != nil {
				return err
			}
		}
		return nil
	})
}

// Applied returns the last whole plan of this boot, false if there was none or
// if it cannot be read: it is then applied once more.
func (a *Attachments) Applied() (ap Applied, ok bool, err error) {
	err = a.view(func(tx *bolt.Tx) error {
		v := tx.Bucket(metaBucket).Get(appliedKey)
		if v == nil {
			return nil
		}
		ok = json.Unmarshal(v, &ap) == nil
		return nil
	})
	if err != nil || !ok {
		return Applied{}, false, err
	}
	return ap, true, nil
}

// SetApplied records a whole plan that was applied.
func (a *Attachments) SetApplied(ap Applied) error {
	v, err := json.Marshal(ap)
	if err != nil {
		return err
	}
	return a.update(func(tx *bolt.Tx) error { return tx.Bucket(metaBucket).Put(appliedKey, v) })
}

// Complete reports whether the store is known to hold all pods of this node. One
// that is new, after a boot or in the place of a damaged one, is not: only the
// helper can ask the runtime for the others.
func (a *Attachments) Complete() (complete bool, err error) {
	err = a.view(func(tx *bolt.Tx) error {
		complete = tx.Bucket(metaBucket).Get(completeKey) != nil
		return nil
	})
	return complete, err
}

// SetComplete says that all pods of this node are in the store.
func (a *Attachments) SetComplete() error {
	return a.update(func(tx *bolt.Tx) error { return tx.Bucket(metaBucket).Put(completeKey, []byte("true")) })
}

// Addresses are all addresses that some attachment holds, each once. An address
// that two attachments have belongs to the latest; it stays while either does.
func Addresses(all []Attachment) []netip.Addr {
	var out []netip.Addr
	for _, at := range all {
		out = append(out, at.Addresses...)
	}
	return mesh.SortAddrs(out)
}

// Pods are the same addresses with the time of the attachment that each belongs to.
func Pods(all []Attachment) []mesh.Pod {
	var out []mesh.Pod
	latest := map[netip.Addr]int{}
	for _, at := range all { // in the order of their sequence
		for _, a := range at.Addresses {
			i, there := latest[a]
			if !there {
				i, latest[a] = len(out), len(out)
				out = append(out, mesh.Pod{Addr: a})
			}
			out[i].Since = at.Since
		}
	}
	slices.SortFunc(out, func(p, q mesh.Pod) int { return p.Addr.Compare(q.Addr) })
	return out
}

// IsDamage reports whether an error means that the store's content is broken.
func IsDamage(err error) bool { return isDamage(err) || errors.As(err, new(*Damaged)) }
