package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

func podFaults() []fault {
	return []fault{
		{name: "pods come and go", begin: storm},
		{name: "pod gone without DEL", begin: lostDEL},
		{name: "pod's veth deleted", begin: lostVeth},
	}
}

// newPod attaches one more pod: to the bridge, or with an address outside of the
// node's prefix.
func (b *bed) newPod(ctx context.Context, m *member, outside bool) (*cluster.Pod, error) {
	b.named++
	name := fmt.Sprintf("pod%d", b.named)
	if !outside {
		return m.AddPod(ctx, cluster.NetworkName, name, cluster.PodOptions{})
	}
	n := b.named % 250
	return m.AddPod(ctx, staticNetwork, name, cluster.PodOptions{Args: map[string]string{
		"IgnoreUnknown": "1",
		"IP":            fmt.Sprintf("10.244.99.%d/24,fd00:244:99::%x/64", n+2, n+2),
		"GATEWAY":       "10.244.99.1,fd00:244:99::1",
	}})
}

// storm has pods come and go, and kills what is at it. A runtime whose ADD failed
// calls DEL; one whose DEL failed calls it again.
func storm(ctx context.Context, b *bed, m *member, r *rand.Rand) (func(context.Context) error, error) {
	for range 1 + r.IntN(3) {
		if keep := r.IntN(2) == 0; keep && len(m.pods) > 1 {
			p := m.pods[len(m.pods)-1]
			m.pods = m.pods[:len(m.pods)-1]
			killed, cancel := context.WithTimeout(ctx, time.Duration(r.IntN(120))*time.Millisecond)
			_, _ = p.CNI(killed, "del") // as far as it came
			cancel()
			if err := p.Delete(ctx); err != nil {
				return nil, err
			}
			continue
		}
		outside := r.IntN(2) == 0
		killed, cancel := context.WithTimeout(ctx, time.Duration(40+r.IntN(120))*time.Millisecond)
		p, err := b.newPod(killed, m, outside)
		cancel()
		if err != nil { // AddPod has called DEL
			p, err = b.newPod(ctx, m, outside)
		}
		if err != nil {
			return nil, err
		}
		m.pods = append(m.pods, p)
	}
	return nil, nil
}

// take takes a pod out of those that there should be.
func (m *member) take(r *rand.Rand) (*cluster.Pod, error) {
	if len(m.pods) == 0 {
		return nil, errors.New("there is no pod")
	}
	i := r.IntN(len(m.pods))
	p := m.pods[i]
	m.pods = slices.Delete(m.pods, i, i+1)
	return p, nil
}

// lostDEL removes a pod without a word to the plugins.
func lostDEL(ctx context.Context, _ *bed, m *member, r *rand.Rand) (func(context.Context) error, error) {
	p, err := m.take(r)
	if err != nil {
		return nil, err
	}
	_, err = m.Run(ctx, "ip", "netns", "delete", p.Name)
	return nil, err
}

// lostVeth deletes a pod's interface; the pod is replaced.
func lostVeth(ctx context.Context, _ *bed, m *member, r *rand.Rand) (func(context.Context) error, error) {
	p, err := m.take(r)
	if err != nil {
		return nil, err
	}
	_, err = p.Run(ctx, "ip", "link", "delete", p.IfName)
	return p.Delete, err
}

func nodeFaults() []fault {
	four := func(n int) string { return fmt.Sprintf("192.0.2.%d/24", n) }
	back := `ip route replace default via 192.0.2.1; ip -6 route replace default via 2001:db8:1::1`
	return []fault{
		{name: "underlay down", begin: func(ctx context.Context, _ *bed, m *member, r *rand.Rand) (func(context.Context) error, error) {
			return func(ctx context.Context) error {
				return m.sh(ctx, r, `ip link set $U up; ip address replace `+m.IPv4.String()+`/24 dev $U; ip address replace `+m.IPv6.String()+`/64 dev $U nodad; `+back)
			}, m.sh(ctx, r, `ip link set $U down`)
		}},
		{name: "underlay MTU changed", begin: scripts(`ip link set $U mtu 1400`, `ip link set $U mtu 1500`)},
		// Of a link that is down they come back with the link.
		{name: "default routes lost", begin: scripts(`ip route delete default; ip -6 route delete default`, `[ -z "$(ip link show $U up)" ] || { `+back+`; }`)},
		{name: "node's address changed", alone: true, begin: func(ctx context.Context, _ *bed, m *member, r *rand.Rand) (func(context.Context) error, error) {
			n := 100 + r.IntN(50)
			old, other := m.IPv4.String()+"/24", four(n)
			old6, other6 := m.IPv6.String()+"/64", fmt.Sprintf("2001:db8:1::%d/64", n)
			move := func(ctx context.Context, from, to, from6, to6 string) error {
				return m.sh(ctx, r, `echo 1 >/proc/sys/net/ipv4/conf/$U/promote_secondaries
ip address replace `+to+` dev $U; ip address delete `+from+` dev $U
ip address replace `+to6+` dev $U nodad; ip address delete `+from6+` dev $U; `+back)
			}
			return func(ctx context.Context) error { return move(ctx, other, old, other6, old6) }, move(ctx, old, other, old6, other6)
		}},
		{name: "node rebooted", alone: true, begin: reboot},
		{name: "node forgotten", alone: true, begin: forget},
		{name: "configuration changed", begin: configured(map[string]any{"keepalive": 7})},
		{name: "listen port changed", begin: configured(map[string]any{"listenPort": 51900})},
		{name: "configuration gone", begin: misconfigured(`rm /etc/cni/net.d/` + cluster.ConflistFile)},
		{name: "configuration garbage", begin: misconfigured(`echo "{" >/etc/cni/net.d/` + cluster.ConflistFile)},
		{name: "key rotated", alone: true, begin: rotate},
	}
}

// misconfigured has a script take the configuration away for a while. What comes back
// is the right one, whatever other faults have made of it meanwhile.
func misconfigured(text string) begin {
	return func(ctx context.Context, b *bed, m *member, r *rand.Rand) (func(context.Context) error, error) {
		return func(context.Context) error { return m.Configure(b.options) }, m.sh(ctx, r, text)
	}
}

// configured changes the stanza for a while.
func configured(keys map[string]any) begin {
	return func(_ context.Context, b *bed, m *member, _ *rand.Rand) (func(context.Context) error, error) {
		o := b.options
		o.Stanza = mapsJoined(o.Stanza, keys)
		return func(context.Context) error { return m.Configure(b.options) }, m.Configure(o)
	}
}

// reboot cuts the power. Pods end with it, and the runtime makes others.
func reboot(ctx context.Context, b *bed, m *member, r *rand.Rand) (func(context.Context) error, error) {
	helperFirst := r.IntN(2) == 0
	m.pods = nil
	if err := m.Reboot(ctx); err != nil {
		return nil, err
	}
	_ = m.helper.Wait(ctx) // it went with the machine
	if helperFirst {
		if err := m.startHelper(ctx); err != nil {
			return nil, err
		}
	}
	p, err := b.newPod(ctx, m, false)
	if err != nil {
		return m.startHelper, err
	}
	m.pods = append(m.pods, p)
	return m.startHelper, nil
}

// forget has another node put this one out of the mesh; it joins again, as a new one.
func forget(ctx context.Context, b *bed, m *member, r *rand.Rand) (func(context.Context) error, error) {
	other := b.members[(slices.Index(b.members, m)+1+r.IntN(len(b.members)-1))%len(b.members)]
	_, err := other.Wgcnid(ctx, "forget", m.Name)
	return func(ctx context.Context) error {
		if err := m.signal(ctx, unix.SIGTERM); err != nil {
			return err
		}
		if _, err := m.Wgcnid(ctx, "leave", "--purge"); err != nil {
			return err
		}
		return m.startHelper(ctx)
	}, err
}

// rotate gives the node a new key while it works, where wgcnid knows how to.
func rotate(ctx context.Context, b *bed, m *member, _ *rand.Rand) (func(context.Context) error, error) {
	before, err := b.records(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := m.Wgcnid(ctx, "key", "rotate", "--no-wait"); err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		return cluster.Poll(ctx, "the key of "+m.Name+" to be rotated", func() error {
			now, err := b.records(ctx)
			if err != nil {
				return err
			}
			if now[m.Name].PublicKey == before[m.Name].PublicKey {
				return errors.New("it has the key of before")
			}
			out, err := m.Run(ctx, "ip", "-o", "link")
			if err == nil && strings.Contains(out, ": "+cluster.Interface+"x:") {
				err = errors.New("the spare interface is still there")
			}
			return err
		})
	}, nil
}
