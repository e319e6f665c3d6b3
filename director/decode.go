// SPDX-License-Identifier: Apache-2.0

package director

import (
	"context"
	"fmt"
	"time"

	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

// settleDecode makes sure the decode endpoint is still the one that was picked, and finds another where it is gone: the
// next ranked one, then one more run of the decode profile (docs/design.md 3.4). With decodePick: after, a prefill that is
// over, or beside decode under way, always leads to a new run, on the loads of now, unless it was made for one endpoint.
func (x *Exchange) settleDecode(ctx context.Context) error {
	snap := x.director.opts.Snapshot()
	after := x.outcome.Delivered() && !x.outcome.Fixed() && x.director.opts.Orchestrator.DecodeAfter()
	if !after && (len(x.outcome.Attempts) == 0 && snap == x.query.Snapshot || x.fits(snap, x.decode)) {
		return nil
	}
	if !after {
		x.director.metrics.repicked.Inc()
		for _, r := range x.decision.Phase(scheduler.PhaseDecode).Ranked {
			if x.fits(snap, r.Endpoint) {
				x.moveDecode(r.Endpoint, r.ReserveTokens)
				return nil
			}
		}
	}
	x.query.Snapshot, x.query.Now = snap, time.Now()
	pick, err := x.sched.Repick(&x.query, scheduler.PhaseDecode, x.outcome.Prefiller)
	for _, r := range pick.Ranked {
		if x.fits(snap, r.Endpoint) {
			x.moveDecode(r.Endpoint, r.ReserveTokens)
			return nil
		}
	}
	x.director.opts.Orchestrator.Abandon(ctx, &x.job, x.outcome, "no_decode")
	if err == nil {
		err = fmt.Errorf("decode after prefill: %w", scheduler.ErrNoCandidate)
	}
	return err
}

// fits reports whether the very pod picked is still there, answers, and can decode what was prefilled.
func (x *Exchange) fits(snap *pool.Snapshot, e *pool.Endpoint) bool {
	if x.outcome.Delivered() && !x.sched.Pairs(x.outcome.Prefiller, e) {
		return false
	}
	now := snap.ByAddr(e.Addr)
	return now != nil && now.UID == e.UID && now.Health.Standing(time.Now()) != pool.NotReady
}

func (x *Exchange) moveDecode(to *pool.Endpoint, tokens int64) {
	x.decodeLoad.Release()
	x.decode, x.decodeLoad = to, to.Load.Reserve(tokens)
	x.job.Decode = to
}
