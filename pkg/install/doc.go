// Package install puts wgcni onto a node and takes it away again: the plugin's
// binary, the entry in the node's network configuration, and a record of both.
//
//	folder, record, options --Prepare--> Plan (ordered changes, printable) --> files
//
// Two ways lead to an entry in the chain. In the mode copy the primary plugin's
// file stays as it is: a copy of it, with the entry as its last plugin, has a name
// that sorts first, and so is the one that the runtime takes. Whatever the
// primary's agent does to its own file at boot, no pod starts without wgcni. In
// the mode in place the entry is inserted into the file itself, and [Keep] puts
// it back when the agent has rewritten it.
//
// Every file is written aside, synced and renamed, and everything is done in an
// order in which a node that stops between any two steps starts pods: on the way
// in the binary comes before the entry that names it, on the way out the entry
// goes first.
package install
