// Package store keeps what a node must remember, in two bbolt files:
//
//	runDir/attachments.db   the pods of this boot, and whether a plan was applied in it
//	stateDir/peers.db       the last registry snapshot that was accepted; survives reboots
//
// bbolt locks a whole file for one process and polls every 50 ms when it is
// contended. So each access takes a lock of our own first, which blocks in the
// kernel and has a deadline, then opens, does one short transaction, and closes.
package store
