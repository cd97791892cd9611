// Package explain says what becomes of one packet, and why.
//
//	Directory, two names --Find--> Party, Party
//	Kernel, Party, Party --Observe--> Facts
//	Facts --Explain--> Explanation
//
// What is observed is the kernel's: the routes that it answers with, the rules of
// the routing policy, the sets of our filter, WireGuard's allowed IPs. Explain is
// pure and puts them in the order in which a packet meets them. It never takes
// the plan for what is there; the plan only has the peers' names.
//
// The packet is the first one of a new flow. What other programs' tables do to it,
// be it a NAT or a firewall, is not looked at.
package explain
