package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

func keyCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key",
		Short: "See how old the WireGuard keys are, and replace them",
		Long: `A node's WireGuard key is replaced without losing a packet: the new one is ready,
and known to all nodes, before the old one goes. Its tunnels move one by one to a
second interface ("interface" with an x behind it) and a second UDP port
("rotationPort"), which must be open between the nodes as "listenPort" is. When all
have moved, the first interface gets the new key, and they move back.

A node that does not answer there keeps its tunnel, with the old key, and the
rotation waits for it. "keyRotation" has a node do it by itself, for example every
"720h".`,
		Example: "  wgcnid key show\n  wgcnid key rotate",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(keyShowCommand(o), keyRotateCommand(o))
	return cmd
}

func keyShowCommand(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Show this node's public keys, how far a rotation is, and the age of other keys",
		Long: `Show this node's public keys, how far a rotation is and what it waits for, and how
old the keys of the other nodes are, by what this node knows of them; the registry
is not asked. Private keys are never shown.`,
		Example: "  wgcnid key show\n  wgcnid key show --json | jq -r '.nodes[] | select(.since == null) | .name'   # those that cannot rotate",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := o.loadLast()
			if err != nil {
				return err
			}
			s, err := readKeys(cmd.Context(), c, time.Now())
			if err != nil {
				return err
			}
			return printKeys(cmd.OutOrStdout(), s, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// KeyStatus is what `wgcnid key show --json` prints.
type KeyStatus struct {
	Time          time.Time  `json:"time"`
	Node          string     `json:"node"`
	Helper        bool       `json:"helper"` // a `wgcnid run` is alive
	PublicKey     string     `json:"publicKey"`
	Since         time.Time  `json:"since"`                   // when it came into use
	NextPublicKey string     `json:"nextPublicKey,omitempty"` // none while Stage is "back": PublicKey is it
	Interface     string     `json:"spareInterface"`          // the second one
	Port          int        `json:"rotationPort"`
	Stage         mesh.Stage `json:"stage"`             // "": no rotation is going on
	Every         string     `json:"every,omitempty"`   // "keyRotation"
	Due           time.Time  `json:"due,omitzero"`      // the earliest time at which that replaces the key
	Ordered       bool       `json:"ordered,omitempty"` // a rotation that wgcnid has not begun
	// Rotation is the helper's last word about it, and so may be old.
	Rotation *reconcile.RotationReport `json:"rotation,omitempty"`
	Nodes    []KeyOfNode               `json:"nodes"` // the others, by name
}

// KeyOfNode is another node's key.
type KeyOfNode struct {
	Name          string     `json:"name"`
	PublicKey     string     `json:"publicKey"`
	Since         time.Time  `json:"since,omitzero"`          // when it came into use; null: its version rotates no keys
	NextPublicKey string     `json:"nextPublicKey,omitempty"` // the key of its second interface
	Stage         mesh.Stage `json:"stage"`
}

// rotates reports whether a node of that record can replace its key.
func rotates(r registry.Record) bool { return !r.KeySince.IsZero() }

func readKeys(ctx context.Context, c config.Config, now time.Time) (KeyStatus, error) {
	keys, err := identity.LoadKeys(c.StateDir)
	if err != nil {
		return KeyStatus{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, registryTimeout)
	defer cancel()
	known, _, err := store.LoadKnown(ctx, c.StateDir)
	if err != nil {
		return KeyStatus{}, err
	}
	s := KeyStatus{
		Time: now, Node: c.NodeName, Helper: reconcile.HelperAlive(c.RunDir), PublicKey: keys.Current.String(), Since: keys.Since,
		NextPublicKey: keyText(keys.Next), Interface: mesh.SpareInterface(c.Interface), Port: c.SparePort, Stage: keys.Stage, Nodes: []KeyOfNode{},
		Ordered: identity.Ordered(c.StateDir),
	}
	if c.KeyRotation > 0 {
		s.Every, s.Due = c.KeyRotation.String(), keys.Since.Add(c.KeyRotation)
	}
	if r, err := readReport(c.RunDir); err == nil && keys.Stage != mesh.Resting {
		s.Rotation = r.Rotation
	}
	for _, r := range known.Records.Records() {
		if !r.Left && r.Name != c.NodeName && runsWgcnid(c, r) {
			s.Nodes = append(s.Nodes, KeyOfNode{r.Name, r.PublicKey.String(), r.KeySince, keyText(r.Next), r.Stage})
		}
	}
	return s, nil
}

func keyText(k wgtypes.Key) string {
	if k == (wgtypes.Key{}) {
		return ""
	}
	return k.String()
}

func printKeys(w io.Writer, s KeyStatus, asJSON bool) error {
	if asJSON {
		return printJSON(w, s)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "key       %s, in use since %s (%s)\n", s.PublicKey, localTime(s.Since), age(s.Time.Sub(s.Since)))
	if s.NextPublicKey != "" {
		fmt.Fprintf(&b, "next key  %s, to be used by %s on UDP port %d first\n", s.NextPublicKey, s.Interface, s.Port)
	}
	fmt.Fprintf(&b, "rotation  %s\n", s.note())
	if s.Rotation != nil {
		for _, wait := range s.Rotation.Waiting {
			fmt.Fprintf(&b, "          waits for %s: %s\n", wait.Node, oneLine(wait.Why))
		}
	}
	if s.Ordered {
		fmt.Fprintf(&b, "          one is ordered; %s\n", map[bool]string{true: "wgcnid begins within seconds", false: "wgcnid does not run, and begins when it does"}[s.Helper])
	}
	if len(s.Nodes) > 0 {
		fmt.Fprintln(&b)
		t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "NODE\tKEY\tIN USE SINCE\tAGE\tROTATION")
		for _, n := range s.Nodes {
			since, old, stage := "-", "-", cmp.Or(string(n.Stage), "none")
			if n.Since.IsZero() {
				stage = "its version rotates no keys"
			} else {
				since, old = localTime(n.Since), age(s.Time.Sub(n.Since))
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", n.Name, n.PublicKey, since, old, stage)
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	_, err := io.WriteString(w, printable(b.String()))
	return err
}

// note says in one line what becomes of the key.
func (s KeyStatus) note() string {
	switch {
	case s.Stage == mesh.Resting && s.Every != "":
		return fmt.Sprintf("none is going on; \"keyRotation\" begins the next after %s", localTime(s.Due))
	case s.Stage == mesh.Resting:
		return "none is going on"
	}
	r := s.Rotation
	if r == nil {
		r = &reconcile.RotationReport{Stage: s.Stage}
	}
	note := rotationProgress(r)
	if !s.Helper {
		note += " (as wgcnid saw it last: it does not run, and goes on when it does)"
	}
	return note
}

// rotationProgress says how far a rotation is, without whom it waits for.
func rotationProgress(r *reconcile.RotationReport) string {
	what := "moving to the new key"
	if r.Stage == mesh.Back {
		what = "the new key is in use, moving back to the first interface"
	}
	if r.Pairs == 0 {
		return what
	}
	return fmt.Sprintf("%s: %d of %d pairs moved", what, r.Moved, r.Pairs)
}

// rotationNote is one line about a rotation.
func rotationNote(r *reconcile.RotationReport) string {
	const most = 3
	note := rotationProgress(r)
	for i, w := range r.Waiting {
		if i == most {
			note += fmt.Sprintf("; and for %d more, which `wgcnid key show` lists", len(r.Waiting)-most)
			break
		}
		note += fmt.Sprintf("; waits for %s: %s", w.Node, oneLine(w.Why))
	}
	return note
}

// age prints how old something is, by the largest unit that makes sense.
func age(d time.Duration) string {
	const day = 24 * time.Hour
	switch d = max(d, 0); {
	case d >= 2*day:
		return fmt.Sprintf("%d days", d/day)
	case d >= 2*time.Hour:
		return fmt.Sprintf("%d hours", d/time.Hour)
	case d >= 2*time.Minute:
		return fmt.Sprintf("%d minutes", d/time.Minute)
	}
	return fmt.Sprintf("%d seconds", d/time.Second)
}
