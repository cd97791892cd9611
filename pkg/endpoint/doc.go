// Package endpoint forwards TCP connections and UDP datagrams from the mesh to
// services that the node can reach: those of the cluster, and those of the cloud.
//
//	peer --(tunnel)--> 10.244.1.0:5432 --dial--> db.prod.svc.cluster.local:5432
//
// The target's name is resolved anew for every connection, so that a pod that
// moves, and a range that both ends use, does not matter to the peer: it only
// ever speaks to the one address.
//
// The way of a connection:
//
//	accept -> by which interface? -> allowed? -> a free place? -> resolve -> dial -> relay
//	              RST                  RST         wait           RST       RST
//
// A relay is two directions, each of which waits for bytes first and borrows the
// memory to move them then: a connection that is silent costs its two sockets and
// two goroutines, and nothing else. Little data goes through a small buffer; once
// that is full at one reading, splice(2) moves the rest within the kernel. A reader
// that is slow holds what one reading brought, at most; then nothing more is read
// from the other side, whose window closes.
//
// The proxies there are were looked at first. The one of inetaf/tcpproxy forwards
// half-closes, but knows no idle timeout, no limit, no end of its connections by
// order, no UDP, and io.Copy, which it uses, keeps a pipe of two descriptors for
// each direction of every connection, silent ones too (poll.Splice in the standard
// library): 60,000 descriptors for 10,000 connections instead of 20,000.
package endpoint
