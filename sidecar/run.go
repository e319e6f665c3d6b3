// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

// run is one call of Orchestrator.Run.
type run struct {
	o    *Orchestrator
	s    *settings
	j    *Job
	out  *Outcome
	load *pool.Reservation // on the prefiller now in use
	wire wire
}

// way settles how the request is served; it is wayAggregated whenever something rules prefill elsewhere out.
func (r *run) way() way {
	pick := r.j.Decision.Phase(scheduler.PhasePrefill)
	switch {
	case !pick.Wanted && len(pick.Ranked) == 0 || r.s.Mode == modeOff,
		r.j.Body == nil || r.j.Request.Bars != 0,
		r.j.Request.HasTransferFields && r.s.AcceptClientTransferFields: // the caller does it
		return wayAggregated
	case r.s.Mode == modeHeaders,
		r.s.Mode == modeAuto && r.j.Decode != nil && r.j.Decode.Sidecar == pool.SidecarPresent:
		r.out.way = wayHeaders
		return wayHeaders
	}
	var ok bool
	if r.wire, ok = r.s.wire(r.engine()); !ok || !r.wire.Serves(r.j.Request.API) || r.wire.NeedsDecode && r.j.Decode == nil {
		return wayAggregated
	}
	r.out.way = wayOrchestrate
	return wayOrchestrate
}

// engine is the decode endpoint's or, while there is none, the first prefiller's: it says which wire is spoken.
func (r *run) engine() string {
	if r.j.Decode != nil {
		return r.j.Decode.Engine
	}
	if ranked := r.j.Decision.Phase(scheduler.PhasePrefill).Ranked; len(ranked) > 0 {
		return ranked[0].Endpoint.Engine
	}
	return ""
}

// nameHost leaves prefill to the decode endpoint's sidecar and tells it where. Nobody tells us when that prefill
// ends, so its reservation becomes an estimate.
func (r *run) nameHost() error {
	now := time.Now()
	ranked := r.j.Decision.Phase(scheduler.PhasePrefill).Ranked
	for i := range ranked {
		e := r.usable(ranked[i].Endpoint, i == 0, now)
		if e == nil || !r.admit(e, i == 0, now) {
			continue
		}
		r.move(i, e, ranked[i].UncachedTokens)
		r.load.Expire(now, 0)
		r.load = nil
		r.out.Name, r.out.Prefiller = outcomeDisaggregated, e
		r.out.Headers = []inference.Header{{Name: HeaderPrefiller, Value: e.Hostport}}
		return nil
	}
	if r.s.OnFailure == "fail" {
		return r.phaseError(&result{reason: reasonNoPrefiller})
	}
	r.fallBack(reasonNoPrefiller)
	return nil
}

// move takes the reservation along to the endpoint ranked i; the first holds the job's own.
func (r *run) move(i int, e *pool.Endpoint, tokens int64) {
	if i > 0 {
		r.load.Release()
		r.load = e.Load.Reserve(tokens)
	}
}

// prefill runs the phase within the budget.
func (r *run) prefill(ctx context.Context) error {
	start := r.j.Start
	if start.IsZero() {
		start = time.Now()
	}
	ctx, cancel := context.WithDeadlineCause(ctx, start.Add(r.s.Budget), ErrBudgetSpent)
	defer cancel()
	ctx, end := startSpan(ctx, scheduler.PhasePrefill)
	defer end()
	began := time.Now()
	defer func() {
		r.o.metrics.phaseSeconds.WithLabelValues(scheduler.PhasePrefill.String()).Observe(time.Since(began).Seconds())
	}()

	r.o.retries.earn()
	return r.walk(ctx)
}

// walk goes down the ranked prefillers until one delivers.
func (r *run) walk(ctx context.Context) error {
	last := result{reason: reasonNoPrefiller}
	ranked := r.j.Decision.Phase(scheduler.PhasePrefill).Ranked
	for i := range ranked {
		if len(r.out.Attempts) == r.s.Prefill.Attempts {
			break
		}
		now := time.Now()
		e := r.usable(ranked[i].Endpoint, i == 0, now)
		if e == nil {
			continue
		}
		if r.j.Decode != nil && keyOf(e) == keyOf(r.j.Decode) {
			if last.reason == reasonNoPrefiller {
				return nil // decode prefills for itself, and cheaper
			}
			break
		}
		if len(r.out.Attempts) > 0 && !r.retry() {
			break
		}
		if !r.admit(e, i == 0, now) {
			continue
		}
		r.move(i, e, ranked[i].UncachedTokens)
		r.o.reach(ctx, r.out, PrefillSelected)
		last = r.attempt(ctx, e)
		r.load.Release()
		if last.reason == reasonOK {
			r.deliver(ctx, e, &last)
			return nil
		}
		if !sequelOf(last.reason).next {
			break
		}
	}
	return r.finish(ctx, &last)
}

// usable returns the endpoint as the snapshot has it now, or nil when it must not be asked: it left the pool, changed
// its role, speaks another wire, or is known to be sick. The first choice is the scheduler's, which has weighed its
// health. It takes no permit of breakers and no probe: admit does, when nothing else can stand in the way any more.
func (r *run) usable(ranked *pool.Endpoint, first bool, now time.Time) *pool.Endpoint {
	e := r.o.snapshot().ByAddr(ranked.Addr)
	if e == nil || e.UID != ranked.UID || e.Role != 0 && !e.Role.Has(pool.RolePrefill) {
		return nil
	}
	if r.out.way == wayOrchestrate && !r.s.sameWire(e.Engine, &r.wire) {
		return nil
	}
	switch e.Health.Standing(now) {
	case pool.NotReady:
		return nil
	case pool.Ejected:
		if !first {
			return nil
		}
	case pool.Probation, pool.Healthy:
	}
	if !r.o.peers.ready(e, r.j.Decode, now) {
		return nil
	}
	return e
}

// admit takes the permits that e's breakers and its probation demand, right before it is asked; false when another
// request took one since usable looked.
func (r *run) admit(e *pool.Endpoint, first bool, now time.Time) bool {
	return r.o.peers.allow(e, r.j.Decode, now) &&
		(first || e.Health.Standing(now) != pool.Probation || e.Health.TryProbe(now))
}

// sameWire reports whether a prefiller speaks the wire that was chosen for the request.
func (s *settings) sameWire(engine string, w *wire) bool {
	other, ok := s.wire(engine)
	return ok && other.Name == w.Name
}

func (r *run) retry() bool {
	if !r.o.retries.take(time.Now()) {
		r.o.metrics.retriesRefused.Inc()
		return false
	}
	r.o.metrics.retries.Inc()
	return true
}

// deliver puts what the prefill gave into the decode request.
func (r *run) deliver(ctx context.Context, e *pool.Endpoint, res *result) {
	x := exchange(r.j, e)
	r.wire.Decode(&x, res.answer.Handle, r.j.Body)
	out := r.out
	out.Name, out.Prefiller, out.wire = outcomeDisaggregated, e, r.wire
	out.HasHandle = res.answer.Handle != nil
	out.HandleUntil = res.answered.Add(r.s.HandleMaxAge)
	out.PrefillTokens = res.answer.PromptTokens
	out.Headers = r.s.headers(out, r.j.Decode)
	r.o.reach(ctx, out, PrefillComplete)
	if res.answer.Rewritten {
		r.o.metrics.hostRewritten.Inc()
		if r.o.loopbackSeen.CompareAndSwap(false, true) {
			r.o.log.Warn("prefill endpoints name a loopback address in their handles: set VLLM_NIXL_SIDE_CHANNEL_HOST to the pod's address",
				slog.String("endpoint", e.Hostport))
		}
	}
}

// finish ends a walk on which no prefiller delivered.
func (r *run) finish(ctx context.Context, last *result) error {
	where := func(err error) error {
		if n := len(r.out.Attempts); n > 0 {
			return fmt.Errorf("prefill %s attempt %d: %w", r.out.Attempts[n-1].Endpoint.Hostport, n, err)
		}
		return fmt.Errorf("prefill: %w", err)
	}
	switch {
	case last.reason == reasonCanceled:
		return where(context.Canceled)
	case last.reason == reasonBudget, context.Cause(ctx) == ErrBudgetSpent: //nolint:errorlint // our own cause, never wrapped
		return where(ErrBudgetSpent)
	case !r.wire.Aggregates, r.s.OnFailure == "fail" && !sequelOf(last.reason).alone:
		return r.phaseError(last)
	}
	r.fallBack(last.reason)
	return nil
}

func (r *run) phaseError(last *result) error {
	e := &PhaseError{Phase: scheduler.PhasePrefill, Status: last.status, Reason: last.reason, Err: last.err}
	if n := len(r.out.Attempts); n > 0 {
		e.Endpoint, e.Attempt = r.out.Attempts[n-1].Endpoint.Hostport, n
	}
	return e
}

// fallBack lets decode go on alone.
func (r *run) fallBack(reason string) {
	r.out.Name = outcomeFallback + reason
	r.o.metrics.fallbacks.WithLabelValues(reason).Inc()
}

// startSpan starts a span for a phase where the stream is traced.
func startSpan(ctx context.Context, phase scheduler.Phase) (context.Context, func()) {
	parent := trace.SpanFromContext(ctx)
	if !parent.SpanContext().IsValid() {
		return ctx, func() {}
	}
	ctx, span := parent.TracerProvider().Tracer("github.com/baton-epp/baton/sidecar").Start(ctx, phase.String(),
		trace.WithSpanKind(trace.SpanKindClient))
	return ctx, func() { span.End() }
}
