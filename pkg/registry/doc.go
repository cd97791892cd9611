// Package registry is where the nodes of a mesh find each other.
//
// Every node publishes one Record about itself: its name, public key,
// endpoints and prefixes, all of it public. A Store keeps the records, as bytes;
// a Registry decides with its Trust which of them count; a Snapshot is those at
// one moment. What a node acts upon is never a registry's Snapshot as it is, but
// its Merge into the one accepted before:
//
//	Store --Entries--> Registry --fresh Snapshot--> Merge(cached, fresh) --> Snapshot, []Stale
//	                   (Trust)
//
// Merge only ever adds and advances, so a registry that is down, emptied, wiped
// or rolled back removes no peer. A peer goes away by its own tombstone, a
// Record with Left set. With a cluster secret a record counts only if it is
// sealed, so that whoever else can write to the store changes nothing.
//
// The stores live below: package file keeps one JSON document that a person can
// read, package etcd uses etcd. Package registrytest holds the tests that every
// store must pass.
package registry
