package reconcile

import "time"

// ApplyLocal is the second half of Run: what lies between it and Compare has no
// other way to be reached.
var ApplyLocal = Pass.applyLocal

type UnreachedNodes = unreached

func (u *unreached) Hear(found []Unreached, now time.Time) (standing, news []Unreached) {
	return u.hear(found, now)
}
