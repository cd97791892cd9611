package reconcile

import (
	"context"
	"fmt"
	"log/slog"
	"strings"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// manyRefused is how many records that are refused at once are logged: whoever
// can write to the registry is not to fill the node's disk.
const manyRefused = 20

// manyOps is from how many ops on a pass is logged as a summary.
const manyOps = 40

func (l *Loop) logOps(ops []mesh.Op) {
	level := slog.LevelInfo
	if len(ops) > manyOps {
		level = slog.LevelDebug
		kinds := map[string]int{}
		for _, op := range ops {
			kinds[strings.TrimPrefix(fmt.Sprintf("%T", op), "mesh.")]++
		}
		l.Log.Info("apply", "ops", len(ops), "kinds", kinds)
	}
	if !l.Log.Enabled(context.Background(), level) {
		return // a text for each of thousands of routes takes longer than half of them do
	}
	for _, op := range ops {
		l.Log.Log(context.Background(), level, "apply", "op", op.String())
	}
}

// logLinks says once which pods' links have changed, and which could not be.
func (l *Loop) logLinks(o Outcome) {
	if len(o.Fitted) > 0 {
		l.Log.Info("links of pods follow the tunnel's MTU", "mtu", mtuOf(l.config, l.known), "pods", len(o.Fitted))
	}
	unfit := ""
	if o.LinksError != nil {
		if unfit = o.LinksError.Error(); unfit != l.unfit {
			l.Log.Warn("links of pods do not follow the tunnel's MTU; trying again at every pass", "error", unfit)
		}
	}
	l.unfit = unfit
}

// warnOfFragments says once that packets of full size do not fit into the underlay's.
func (l *Loop) warnOfFragments() {
	note := fragmentsNote(l.config, l.underlay, mtuOf(l.config, l.known), l.wide())
	if note != "" && note != l.fragments {
		l.Log.Warn(note)
	}
	l.fragments = note
}
