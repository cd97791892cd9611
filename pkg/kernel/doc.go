// Package kernel carries a mesh.Plan into the Linux kernel: netlink, wgctrl and
// nftables behind two methods, Observe and Apply.
//
// Everything it makes carries a mark by which it finds it again and by which it
// leaves all else alone: RouteProtocol on routes and rules, the table name on
// nftables, LinkAlias on the WireGuard interface.
package kernel
