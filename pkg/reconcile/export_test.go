package reconcile

// ApplyLocal is the second half of Run: what lies between it and Compare has no
// other way to be reached.
var ApplyLocal = Pass.applyLocal
