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
	"github.com/baton-epp/baton/sidecar/connectors"
)

// run is one call of Orchestrator.Run.
type run struct {
	o        *Orchestrator
	s        *settings
	j        *Job
	out      *Outcome
	load     *pool.Reservation // on the prefiller now in use
	wire     wire
	deadline time.Time // the end of the budget
	tries    int       // prefills attempted
	ended    func()    // closes the books of the prefill phase; nil when the leg does

	skipped    *pool.Endpoint // the first one ranked that was not asked
	skippedWhy string
}

// phases runs what comes before decode.
func (r *run) phases(ctx context.Context) error {
	var err error
	if r.out.way, err = r.way(); err != nil {
		return err
	}
	if err = r.encode(ctx); err != nil {
		return err
	}
	switch r.out.way {
	case wayHeaders:
		err = r.nameHost()
	case wayOrchestrate:
		r.o.peers.sweep(r.o.snapshot())
		err = r.prefill(ctx)
	case wayAggregated:
	}
	if err != nil {
		return err
	}
	if r.out.Prefiller == nil {
		r.spliceEncoded(true, r.j.Body)
		r.pull()
	}
	if r.delegates() && len(r.out.Encoders) > 0 {
		r.out.way = wayHeaders
		r.out.Headers = append(r.out.Headers, inference.Header{Name: HeaderEncoders, Value: r.out.encoderHosts()})
	}
	if r.out.way != wayHeaders {
		r.out.Headers = r.s.headers(r.out, r.j.Decode)
	}
	return nil
}

// nameHost leaves prefill to the decode endpoint's sidecar and tells it where. Nobody tells us when that prefill
// ends, so its reservation becomes an estimate.
func (r *run) nameHost() error {
	now := time.Now()
	ranked := r.j.Decision.Phase(scheduler.PhasePrefill).Ranked
	for i := range ranked {
		e := r.candidate(ranked[i].Endpoint, i == 0, now)
		if e == nil || !r.admit(e, i == 0, now) {
			continue
		}
		r.move(i, e, ranked[i].UncachedTokens)
		r.load.Expire(now, 0)
		r.load = nil
		r.out.Name, r.out.Prefiller = outcomeDisaggregated, e
		r.out.Headers = append(r.out.Headers, inference.Header{Name: HeaderPrefiller, Value: e.Hostport})
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

// prefill runs the phase within the budget. A leg that runs on beside decode closes the phase's books itself.
func (r *run) prefill(ctx context.Context) error {
	ctx, cancel := context.WithDeadlineCause(ctx, r.deadline, ErrBudgetSpent)
	defer cancel()
	if enough, err := r.ask(ctx); enough || err != nil {
		return err
	}
	ctx, end := startSpan(ctx, scheduler.PhasePrefill)
	began := time.Now()
	r.ended = func() {
		end()
		r.o.metrics.phaseSeconds.WithLabelValues(scheduler.PhasePrefill.String()).Observe(time.Since(began).Seconds())
	}
	defer func() {
		if r.ended != nil {
			r.ended()
		}
	}()

	r.o.retries.earn()
	return r.walk(ctx)
}

// walk goes down the ranked prefillers until one delivers.
func (r *run) walk(ctx context.Context) error {
	last := result{reason: reasonNoPrefiller}
	ranked := r.j.Decision.Phase(scheduler.PhasePrefill).Ranked
	for i := range ranked {
		if r.tries == r.s.Prefill.Attempts {
			break
		}
		now := time.Now()
		e := r.candidate(ranked[i].Endpoint, i == 0, now)
		if e == nil {
			continue
		}
		if r.j.Decode != nil && keyOf(e) == keyOf(r.j.Decode) {
			if last.reason == reasonNoPrefiller {
				return nil // decode prefills for itself, and cheaper
			}
			break
		}
		if r.tries > 0 && !r.retry() {
			break
		}
		if !r.admit(e, i == 0, now) {
			continue
		}
		r.move(i, e, ranked[i].UncachedTokens)
		r.o.reach(ctx, r.out, PrefillSelected)
		if last = r.prefillBy(ctx, e, ranked[i].UncachedTokens); last.reason == reasonOK {
			return nil
		}
		if !sequelOf(last.reason).next {
			break
		}
	}
	return r.finish(ctx, &last)
}

// prefillBy prefills at e, or starts to, and puts what it gave into the decode request.
func (r *run) prefillBy(ctx context.Context, e *pool.Endpoint, uncached int64) result {
	if r.beside() {
		l, failed := r.launch(ctx, e, uncached)
		if l == nil {
			return failed
		}
		r.accompany(l)
		return result{reason: reasonOK}
	}
	a, res := r.prefillAt(ctx, e, uncached)
	r.load.Release()
	if res.reason == reasonOK {
		r.deliver(ctx, a, &res)
	}
	return res
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
func (r *run) deliver(ctx context.Context, a *attempt, res *result) {
	r.take(a.e, a.x, res.answer.Handle)
	out := r.out
	out.HasHandle = a.wire.Claims
	out.HandleUntil = res.answered.Add(r.s.HandleMaxAge)
	out.PrefillTokens, out.CachedTokens = res.answer.PromptTokens, cached(&res.answer)
	r.o.reach(ctx, out, PrefillComplete)
	if res.answer.Rewritten {
		r.o.metrics.hostRewritten.Inc()
		if r.o.loopbackSeen.CompareAndSwap(false, true) {
			r.o.log.Warn("prefill endpoints name a loopback address in their handles: set VLLM_NIXL_SIDE_CHANNEL_HOST to the pod's address",
				slog.String("endpoint", a.e.Hostport))
		}
	}
}

// accompany lets decode go on beside the leg, which is on its way.
func (r *run) accompany(l *leg) {
	defer func() {
		if r.out.leg == nil { // a connector panicked, and nobody else knows of the leg
			l.cancel(context.Canceled)
		}
	}()
	r.take(l.e, &l.given, nil)
	r.out.HasHandle, r.out.beside, r.out.leg = l.wire.Claims, true, l
	r.out.HandleUntil = l.sentAt.Add(r.s.HandleMaxAge)
	l.then(r.ended)
	r.ended = nil
}

// take makes the decode request one that e prefilled for.
func (r *run) take(e *pool.Endpoint, x *connectors.Exchange, handle []byte) {
	r.wire.Decode(x, handle, r.j.Body)
	r.spliceEncoded(false, r.j.Body)
	r.out.Name, r.out.Prefiller, r.out.wire, r.out.x = outcomeDisaggregated, e, r.wire, x
}

// cached is how much of the prompt the prefiller found in its cache, -1 when it did not say.
func cached(a *connectors.Answer) int64 {
	if a.CachedTokens <= 0 && a.PromptTokens == 0 {
		return -1
	}
	return a.CachedTokens
}

// finish ends a walk on which no prefiller delivered.
func (r *run) finish(ctx context.Context, last *result) error {
	if err := r.over(ctx, last); err != nil {
		return err
	}
	if !r.wire.Aggregates || r.s.OnFailure == "fail" && !sequelOf(last.reason).alone {
		return r.phaseError(last)
	}
	r.fallBack(last.reason)
	return nil
}

// over is the error when the client left or the budget is spent.
func (r *run) over(ctx context.Context, last *result) error {
	var err error
	switch {
	case last.reason == reasonCanceled:
		err = context.Canceled
	case last.reason == reasonBudget, context.Cause(ctx) == ErrBudgetSpent: //nolint:errorlint // our own cause, never wrapped
		err = ErrBudgetSpent
	default:
		return nil
	}
	if n := len(r.out.Attempts); n > 0 {
		a := &r.out.Attempts[n-1]
		return fmt.Errorf("%s %s attempt %d: %w", a.Phase, a.Endpoint.Hostport, a.Number, err)
	}
	return fmt.Errorf("prefill: %w", err)
}

func (r *run) phaseError(last *result) error {
	r.explain(last.reason)
	e := &PhaseError{Phase: scheduler.PhasePrefill, Attempt: r.tries, Status: last.status, Reason: last.reason, Err: last.err}
	if n := len(r.out.Attempts); n > 0 && r.tries > 0 {
		e.Endpoint = r.out.Attempts[n-1].Endpoint.Hostport
	}
	return e
}

// fallBack lets decode go on alone.
func (r *run) fallBack(reason string) {
	r.explain(reason)
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
