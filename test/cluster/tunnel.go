package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
)

// Interface is WireGuard's on the nodes, unless their stanza names another one.
const Interface = "wgcni0"

// tunnelProcess is the command line of a userspace [Interface].
const tunnelProcess = "wgcnid tunnel " + Interface

// Tunnel tells a node's WireGuard interface from the next one of that name: by
// its process where WireGuard is a process, and by the interface's number.
type Tunnel struct {
	PID   int // 0 if WireGuard is the kernel's
	Index int
}

// String says how to find it.
func (t Tunnel) String() string {
	if t.PID != 0 {
		return fmt.Sprintf("tunnel process %d", t.PID)
	}
	return fmt.Sprintf("interface %d", t.Index)
}

// Kind says where WireGuard runs.
func (t Tunnel) Kind() string {
	if t.PID != 0 {
		return "WireGuard in userspace"
	}
	return "the kernel's WireGuard"
}

// Tunnel returns the node's tunnel, and an error if there is none.
func (n *Node) Tunnel() (t Tunnel, err error) {
	found, err := n.FindProcesses(tunnelProcess)
	switch {
	case err != nil:
		return t, err
	case len(found) > 1:
		return t, fmt.Errorf("%d tunnel processes on %s: %v", len(found), n.Name, found)
	case len(found) == 1:
		t.PID = found[0].PID
	}
	err = n.Do(func() error {
		link, err := net.InterfaceByName(Interface)
		if err == nil {
			t.Index = link.Index
		}
		return err
	})
	if err != nil {
		return t, fmt.Errorf("find %s of %s: %w", Interface, n.Name, err)
	}
	return t, nil
}

// LoseTunnel takes the tunnel away as faults do: its process is killed where
// WireGuard is a process, else the kernel's interface is deleted. It says how.
// When it returns the tunnel is gone; a helper that runs makes another at once.
func (n *Node) LoseTunnel(ctx context.Context) (how string, err error) {
	killed, err := n.Kill9(ctx, tunnelProcess)
	switch {
	case err != nil:
		return "", err
	case killed > 1:
		return "", errors.New("there was more than one tunnel process on " + n.Name)
	case killed == 1:
		return "SIGKILL", nil
	}
	_, err = n.Run(ctx, "ip", "link", "delete", Interface)
	return "link deleted", err
}
