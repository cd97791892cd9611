package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// subject is a plugin that is timed on a pod of its own.
type subject struct {
	name   string
	host   *host
	plugin string         // the binary's name
	stanza map[string]any // without what libcni adds
	// network is the primary's. fresh makes a new pod for every round, for
	// plugins whose DEL leaves it to the end of the pod to undo their ADD.
	network string
	fresh   bool

	pod      *cluster.Pod
	result   string        // of the last ADD: the prevResult of DEL
	ended    time.Duration // when the last verb had; see monotonic
	add, del verb
	helper   samples // CPU time of wgcnid during and after each verb, in seconds
}

// wgcni is a subject with wgcni on a pod of one of the host's networks.
func (h *host) wgcni(network string) *subject {
	return &subject{name: "wgcni", host: h, plugin: "wgcni", stanza: h.stanza, network: network}
}

// tuning is the reference plugin that the budgets refer to.
func (h *host) tuning() *subject {
	return &subject{name: baseline, host: h, plugin: "tuning", stanza: map[string]any{"mtu": 1400}, network: insideNetwork}
}

// makePods makes the pods of the subjects by the primary plugin alone.
func makePods(ctx context.Context, subjects []*subject) error {
	for i, s := range subjects {
		var err error
		if s.pod, err = s.host.AddPod(ctx, s.network, fmt.Sprintf("timed-%d", i), cluster.PodOptions{}); err != nil {
			return err
		}
	}
	return nil
}

// verb is one call of the subject's plugin, as libcni makes it.
func (s *subject) verb(command, prevResult string) (execution, error) {
	stanza := map[string]any{
		"cniVersion": "1.0.0", "name": cluster.NetworkName, "type": s.plugin,
		"prevResult": json.RawMessage(prevResult),
	}
	for k, v := range s.stanza {
		stanza[k] = v
	}
	stdin, err := json.Marshal(stanza)
	if err != nil {
		return execution{}, fmt.Errorf("%s %s: make its configuration: %w", s.name, command, err)
	}
	return execution{
		Path: filepath.Join(s.host.bin, s.plugin),
		Env: []string{
			"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + s.pod.ContainerID(), "CNI_NETNS=" + s.pod.Netns,
			"CNI_IFNAME=" + s.pod.IfName, "CNI_PATH=" + s.host.bin,
			"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + s.pod.Name,
		},
		Stdin: stdin,
	}, nil
}

// prepare brings the pod into the state that ADD expects.
func (s *subject) prepare(ctx context.Context) error {
	if !s.fresh {
		return resetMTU(s.pod)
	}
	if err := s.pod.Delete(ctx); err != nil {
		return err
	}
	var err error
	s.pod, err = s.host.AddPod(ctx, s.network, s.pod.Name, cluster.PodOptions{})
	return err
}

func (s *subject) timeADD() error {
	t, err := s.time("ADD", s.pod.Raw)
	if err != nil {
		return err
	}
	if !json.Valid([]byte(t.Stdout)) {
		return fmt.Errorf("%s ADD: printed no result but %q", s.name, t.Stdout)
	}
	s.result = t.Stdout
	s.add.take(t)
	return nil
}

func (s *subject) timeDEL() error {
	t, err := s.time("DEL", s.result)
	if err != nil {
		return err
	}
	s.del.take(t)
	return nil
}

func (s *subject) time(command, prevResult string) (timing, error) {
	e, err := s.verb(command, prevResult)
	if err != nil {
		return timing{}, err
	}
	t, err := s.host.timer.time(e)
	if err != nil {
		return t, fmt.Errorf("%s %s: %w", s.name, command, err)
	}
	s.ended = t.Ended
	return t, nil
}

// round times one ADD and one DEL of every subject, each time in another order,
// so that none always runs behind the same other one.
func round(ctx context.Context, subjects []*subject) error {
	for _, s := range subjects {
		if err := s.prepare(ctx); err != nil {
			return err
		}
	}
	hosts := hostsOf(subjects)
	if err := settle(ctx, hosts); err != nil {
		return err
	}
	for _, verb := range []func(*subject) error{(*subject).timeADD, (*subject).timeDEL} {
		for _, i := range rand.Perm(len(subjects)) {
			s := subjects[i]
			before, err := s.host.helperCPU()
			if err != nil {
				return err
			}
			if err := errors.Join(verb(s), settle(ctx, hosts)); err != nil {
				return err
			}
			after, err := s.host.helperCPU()
			if err != nil {
				return err
			}
			s.helper = append(s.helper, (after - before).Seconds())
		}
	}
	return nil
}

func hostsOf(subjects []*subject) []*host {
	var hosts []*host
	for _, s := range subjects {
		if !slices.Contains(hosts, s.host) {
			hosts = append(hosts, s.host)
		}
	}
	return hosts
}

// warmUp is one round that does not count: files come into the cache, plugins
// make the chains and folders that they keep.
func warmUp(ctx context.Context, subjects []*subject) error {
	if err := round(ctx, subjects); err != nil {
		return err
	}
	for _, s := range subjects {
		s.add, s.del, s.helper = verb{}, verb{}, nil
	}
	return nil
}

// row shows one verb of a subject against another's.
func (v verb) row(what string, to verb, toName string, b budget) row {
	return row{
		what:   what,
		median: milliseconds(v.elapsed.median()),
		p90:    milliseconds(v.elapsed.quantile(0.9)),
		cpu:    milliseconds(v.cpu.median()),
		ratio:  v.elapsed.paired(to.elapsed),
		to:     toName,
		budget: b,
	}
}
