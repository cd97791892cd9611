package main

import (
	"cmp"
	"fmt"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// Answer says whether this machine's traffic is encrypted.
type Answer string

// The answers.
const (
	AnswerYes     Answer = "Yes"
	AnswerNo      Answer = "No"     // it is held back, or flows in the clear; the verdict says which
	AnswerPartly  Answer = "Partly" // with some nodes only
	AnswerNothing Answer = "Nothing to encrypt"
)

// rejoin is how a forgotten node gets in again.
const rejoin = "To join again, stop wgcnid, run `wgcnid leave --purge` and start it."

// verdict answers the one question that people have.
func verdict(s Status, c config.Config, forgotten bool) (ok bool, answer Answer, sentence string) {
	traffic, to := "Pod traffic", "Pod traffic to"
	if c.Bare {
		traffic, to = "Traffic with pods", "Traffic with the pods of"
	}
	no := func(format string, args ...any) (bool, Answer, string) {
		return false, AnswerNo, fmt.Sprintf(format, args...)
	}
	switch {
	case forgotten && c.Encryption == mesh.Preferred:
		return no("%s is NOT encrypted: the mesh has forgotten this node and revoked its key. %s", traffic, rejoin)
	case forgotten:
		return no("%s other nodes is dropped: the mesh has forgotten this node and revoked its key. %s", to, rejoin)
	case s.PublicKey == "" && c.Bare:
		return no("This machine has not joined yet, and holds nothing back. Start wgcnid.")
	case s.PublicKey == "" && c.Encryption == mesh.Preferred:
		return no("%s is NOT encrypted: this node has not joined yet. Start wgcnid.", traffic)
	case s.PublicKey == "":
		return no("%s other nodes is dropped: this node has not joined yet. Start wgcnid.", to)
	case s.Interface == nil && c.Encryption == mesh.Required:
		return no("%s other nodes is dropped: interface %s is missing. Is wgcnid running?", to, c.Interface)
	case s.Interface == nil:
		return no("%s is NOT encrypted: interface %s is missing. Is wgcnid running?", traffic, c.Interface)
	case len(s.Pending) > 0:
		return false, AnswerPartly, "The kernel differs from the plan; wgcnid mends it within seconds, if it runs."
	}
	answer, sentence = reach(s, c, to)
	return true, answer, sentence
}

// reach says with whom this machine talks, where its kernel holds the plan.
func reach(s Status, c config.Config, to string) (Answer, string) {
	nodes := 0
	var silent []string
	for _, p := range s.Peers {
		if p.Plain {
			continue
		}
		nodes++
		if p.State == stateWaiting && p.TransmitBytes > 0 {
			silent = append(silent, p.Name)
		}
	}
	rest := "; nothing leaves in the clear"
	if c.Encryption == mesh.Preferred {
		rest = "; to nodes that have not joined it flows in the clear (encryption is \"preferred\")"
	}
	others := fmt.Sprintf("all %d other nodes", nodes)
	if nodes == 1 {
		others = "the other node"
	}
	switch {
	case nodes == 0 && c.Encryption == mesh.Required:
		return AnswerNothing, "No other node has joined yet; pod traffic to other nodes is dropped, nothing leaves in the clear."
	case nodes == 0:
		return AnswerNothing, "No other node has joined yet; pod traffic to other nodes flows in the clear (encryption is \"preferred\")."
	case len(silent) == nodes:
		return AnswerNo, fmt.Sprintf("%s %s is held back: there is no handshake with %s%s.", to, others, few(silent, ""), rest)
	case len(silent) > 0:
		return AnswerPartly, fmt.Sprintf("%s %d of %d other nodes is encrypted, and held back to %s, with which there is no handshake%s.",
			to, nodes-len(silent), nodes, few(silent, ""), rest)
	case c.Encryption == mesh.Preferred:
		return AnswerPartly, fmt.Sprintf("%s %s of the mesh is encrypted%s.", to, others, rest)
	}
	return AnswerYes, fmt.Sprintf("%s %s is encrypted%s.", to, others, rest)
}

// peerReason says why a peer is not connected, and what to do about it. published
// are the endpoints of its record.
func peerReason(p PeerStatus, published []string, helper bool) string {
	switch {
	case p.State == stateConnected:
		return ""
	case p.State == stateMissing && !helper:
		return "wgcnid does not run here, so that nobody adds it: start wgcnid"
	case p.State == stateMissing:
		return "wgcnid is about to add it; if it stays, its log says why"
	case p.State == stateIdle:
		return "nothing was sent lately; the next packet starts a handshake"
	case p.Plain:
		return "it calls when it has something to send: see that its WireGuard is up, with the file of `wgcnid peer config`"
	case p.State == stateNoEndpoint && len(published) > 0:
		return fmt.Sprintf("its endpoint %s has no address: see that this machine's name server knows it", published[0])
	case p.State == stateNoEndpoint:
		return "it is behind NAT and has not called yet: see that wgcnid runs there"
	case p.TransmitBytes == 0 && p.ReceiveBytes == 0:
		return "nothing was sent yet; the first packet starts a handshake"
	case p.ReceiveBytes == 0:
		return fmt.Sprintf("nothing comes back from %s: see that wgcnid runs there, and that UDP port %d is open on the way; run `wgcnid doctor %s`",
			p.Endpoint, p.Endpoint.Port(), p.Name)
	}
	return fmt.Sprintf("it sends, but the handshake fails: the two differ in a key; run `wgcnid doctor %s` on both", cmp.Or(p.Name, p.PublicKey))
}
