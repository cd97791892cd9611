// Package registry is where the nodes of a mesh find each other.
//
// Every node publishes one Record about itself: its name, public key,
// endpoints and prefixes, all of it public. A Registry keeps the records; a
// Snapshot is all of them at one moment. What a node acts upon is never a
// registry's Snapshot as it is, but its Merge into the one accepted before:
//
//	Registry --Watch--> fresh Snapshot --Merge(cached, fresh)--> Snapshot, []Stale
//
// Merge only ever adds and advances, so a registry that is down, emptied, wiped
// or rolled back removes no peer. A peer goes away by its own tombstone, a
// Record with Left set.
//
// The backends live below: package file keeps one JSON document that a person
// can read. Package registrytest holds the tests that every backend must pass.
package registry
