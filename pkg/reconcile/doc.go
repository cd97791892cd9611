// Package reconcile is the one place that says observe -> diff -> apply.
//
// A Pass does it once, for the plugin's verbs and for `wgcnid sync`; Loop does
// it for ever, whenever something has changed.
//
//	config + key + store.Known + attachments --Facts--> mesh.NewPlan --Diff--> Kernel.Apply
package reconcile
