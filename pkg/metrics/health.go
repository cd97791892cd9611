package metrics

import (
	"errors"
	"time"

	"github.com/wgcni/wgcni/pkg/reconcile"
)

// stuck is after how long without a pass the loop is taken for dead: passes come
// every ten seconds, or every second where they fail.
const stuck = 30 * time.Second

// Alive says why the loop is taken for dead; nil while it comes round. Started is
// when it began.
func Alive(last *reconcile.Passed, started, now time.Time) error {
	at := started
	if last != nil && last.Report.At.After(at) {
		at = last.Report.At
	}
	if d := now.Sub(at); d > stuck {
		return errors.New("the loop has not come round for " + d.Round(time.Second).String())
	}
	return nil
}

// Ready says why the kernel is not as planned, or why that helps nobody; nil if
// it is.
func Ready(r reconcile.Report) error {
	switch {
	case r.Error != "":
		return errors.New("the last pass failed: " + r.Error)
	case r.Forgotten:
		return errors.New("the mesh has forgotten this node and revoked its key")
	}
	return nil
}
