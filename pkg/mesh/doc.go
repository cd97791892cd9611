// Package mesh decides what a node's kernel should hold, and how to get there.
//
// It is pure: no I/O, no clock, no log. The path through it is
//
//	Facts --NewPlan--> Plan (a State plus the claims it refused)
//	observed State, planned State --Diff--> []Op
//
// Facts are what the node knows: its settings, itself, the other nodes'
// records and the addresses of its own pods. State is what a kernel holds, and
// it is one type for the wish and for the observation, so that one Diff serves
// ADD, CHECK, the helper's loop, status and leave. An Op is one small, printable,
// idempotent change.
//
// Everything that comes out is sorted: equal facts give byte-equal plans.
package mesh
