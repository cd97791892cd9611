// Package cluster builds small clusters out of namespaces: machines that have
// their own processes, mounts, network, host name and /run, nodes that are
// linked by one underlay network, pods that the real cnitool attaches, or a real
// containerd, and machines that are no nodes.
// It also makes the traffic and looks at the packets.
//
// A program that uses it calls [Init] first, since a machine's init is the
// program itself, executed again:
//
//	func main() {
//		cluster.Init()
//		c, err := cluster.New(ctx, cluster.Options{Nodes: 2})
//		...
//		defer c.Close()
//	}
//
// Everything made here is inside namespaces held by these inits. An init ends
// when the pipe to the harness closes, so a harness that dies in any way, by
// SIGKILL too, leaves no process, namespace, mount or file behind.
//
// The machine that runs the harness is not touched: /etc, /var/lib and /run of
// a machine are its own (overlays and a tmpfs), the rest of the file system is
// shared with the host. It needs root and overlayfs.
package cluster
