// SPDX-License-Identifier: Apache-2.0

package director

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar"
)

// End says how the gateway let us see the end of a request (docs/design.md 5.1).
type End uint8

// The values of [End].
const (
	// EndSeen: the response's end, or the client's leaving, was visible.
	EndSeen End = iota
	// EndUnseen: the stream ended before the response did; the reservation becomes an estimate.
	EndUnseen
	// EndUnanswered: the stream ended before our answer: the client left, or we refused.
	EndUnanswered
)

// Exchange is one request from its first byte to the response's end. It belongs to the stream's goroutine.
type Exchange struct {
	director *Director
	sched    Scheduler
	req      *inference.Request
	edits    *inference.Edits
	query    scheduler.Query
	decision *scheduler.Decision

	decode      *pool.Endpoint
	decodeLoad  *pool.Reservation
	prefillLoad *pool.Reservation
	job         sidecar.Job
	outcome     *sidecar.Outcome
	sent        *Answer
	err         error

	start, firstByte     time.Time
	scheduled, decided   time.Duration
	bodyBytes, respBytes int
	status               int
	served               string
	usage                inference.Usage
	answered, done       bool
	span                 trace.Span // nil without a tracer
}

// Orchestrates reports whether sub-requests may run before the answer, so that the gateway must be asked for time.
func (x *Exchange) Orchestrates() bool {
	return x.decision.Phase(scheduler.PhasePrefill).Run || x.decision.Phase(scheduler.PhaseEncode).Run
}

// Run runs the phases before decode and makes the answer. It blocks until then; ctx is the stream's.
func (x *Exchange) Run(ctx context.Context) (*Answer, error) {
	ctx = x.startSpan(ctx)
	x.job = sidecar.Job{
		Request: x.req, Decision: x.decision, Decode: x.decode, Body: x.edits, PrefillLoad: x.prefillLoad, Start: x.start,
	}
	x.outcome, x.err = x.director.opts.Orchestrator.Run(ctx, &x.job)
	x.prefillLoad = nil // released by Run, or by the prefill that runs beside decode
	if x.err != nil {
		return nil, x.fail()
	}
	if err := x.settleDecode(ctx); err != nil {
		x.err = err
		return nil, x.fail()
	}
	if err := ctx.Err(); err != nil {
		x.err = fmt.Errorf("client left: %w", context.Cause(ctx))
		x.director.opts.Orchestrator.Abandon(ctx, &x.job, x.outcome, "client_gone")
		return nil, x.err
	}
	if x.err = x.director.opts.Orchestrator.Forward(ctx, &x.job, x.outcome, x.decode); x.err != nil {
		return nil, x.fail()
	}
	x.decision.Learn(x.decode, x.outcome.Prefiller)
	x.decided = time.Since(x.start)
	x.answered = true
	x.sent = x.answer()
	return x.sent, nil
}

// Pending is closed when the prefill that runs beside decode is over; nil when there is none. Then call Settle.
func (x *Exchange) Pending() <-chan struct{} {
	if x == nil {
		return nil
	}
	return x.outcome.Pending()
}

// EndsWithPrefill reports whether a response that began must not go on if the prefill beside decode fails: such a prefill
// runs, decode would wait for it in vain, and the response is a stream, whose head says nothing yet.
func (x *Exchange) EndsWithPrefill() bool {
	return x.req.Stream && x.director.opts.Orchestrator.EndsDecode(x.outcome) && x.Pending() != nil
}

// Settle takes over what the prefill beside decode came to, once Pending is closed. An error (*sidecar.PhaseError) means
// that decode waits in vain: the client must be answered now. An outcome that changed is in the Answer, too.
func (x *Exchange) Settle(ctx context.Context) error {
	if err := x.director.opts.Orchestrator.Settle(ctx, &x.job, x.outcome); err != nil {
		x.err = err
		return x.fail()
	}
	if x.sent != nil {
		x.sent.Outcome = x.outcome.Name
	}
	return nil
}

func (x *Exchange) fail() error {
	x.director.metrics.failed(x.req, x.err)
	return x.err
}

// answer is what the gateway is told. A request that was prefilled for its destination names that one only.
func (x *Exchange) answer() *Answer {
	a := &Answer{
		Destination: x.decode.Hostport, Set: x.outcome.Headers, Outcome: x.outcome.Name,
		ResponseSet: x.sched.ResponseHeaders(x.decode),
	}
	if send := x.decision.Phase(scheduler.PhaseDecode).Send; send > 1 && !x.outcome.Bound() {
		a.Destination = x.fallbackList(send)
	}
	if x.edits != nil && !x.edits.Empty() {
		a.Body = x.edits
	}
	if !x.req.Headers.Has("x-request-id") {
		a.Set = append(a.Set, inference.Header{Name: "x-request-id", Value: x.req.ID})
	}
	return a
}

func (x *Exchange) fallbackList(send int) string {
	list := make([]string, 1, send)
	list[0] = x.decode.Hostport
	for _, r := range x.decision.Phase(scheduler.PhaseDecode).Ranked {
		if r.Endpoint != x.decode && len(list) < send {
			list = append(list, r.Endpoint.Hostport)
		}
	}
	return strings.Join(list, ",")
}

// ResponseHeaders notes the first sign of the response: status, and who served ("" when the gateway does not say).
// undelivered says that the gateway made the response itself because the request reached no endpoint.
func (x *Exchange) ResponseHeaders(ctx context.Context, now time.Time, status int, served string, undelivered bool) {
	x.firstByte, x.status, x.served = now, status, served
	x.decodeLoad.ReleaseTokens()
	e := x.servedEndpoint()
	switch {
	case undelivered:
		x.director.opts.Orchestrator.Abandon(ctx, &x.job, x.outcome, "not_delivered")
	case unread(status):
		x.director.opts.Orchestrator.Abandon(ctx, &x.job, x.outcome, "refused")
	default:
		x.director.opts.Orchestrator.Transferred(ctx, x.outcome, e, status < 500)
	}
	if status >= 400 && x.Pending() != nil {
		x.director.opts.Orchestrator.Leave(&x.job, x.outcome, false) // decode takes no blocks any more
	}
	switch {
	case e == nil:
	case status >= 500:
		if e.Health.Fail(now) {
			x.director.Ejected(e, "response status "+strconv.Itoa(status))
		}
	default:
		e.Health.Succeed()
	}
}

// BodyBegins notes the first bytes of the response's body, where the gateway shows them as they come.
func (x *Exchange) BodyBegins(now time.Time) { x.learnPace(x.servedEndpoint(), now) }

// unread reports whether a status comes from before the body is looked at, so that nobody claims a KV handle in it:
// redirects, no such route or method, no permission.
func unread(status int) bool {
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed:
		return true
	default:
		return status >= 300 && status < 400
	}
}

// servedEndpoint is whoever really served; nil when the pool does not know the address.
func (x *Exchange) servedEndpoint() *pool.Endpoint {
	if x.served == "" || x.served == x.decode.Hostport {
		return x.decode
	}
	for _, e := range x.director.opts.Snapshot().Endpoints {
		if e.Hostport == x.served {
			return e
		}
	}
	return nil
}

// ForgetBody drops the request's bytes: once it was sent on, only ids and counters are kept while the response runs.
func (x *Exchange) ForgetBody() {
	x.req.Body, x.edits, x.job.Body = inference.Body{}, nil, nil
	x.outcome.ForgetBody()
}

// CachedTokens is how many of the prompt's tokens the prefill found in its cache, for the client to be told instead of what
// decode says, which with some engines counts every transferred token; below 0 where decode's word stands.
func (x *Exchange) CachedTokens() int64 {
	if x == nil || x.outcome == nil || !x.outcome.HasHandle || x.outcome.Name != "disaggregated" {
		return -1
	}
	return x.outcome.CachedTokens
}

// Usage notes what the response body said, where the gateway shows bodies.
func (x *Exchange) Usage(u inference.Usage, responseBytes int) {
	x.usage, x.respBytes = u, responseBytes
}

// Done closes the exchange; every call after the first does nothing.
func (x *Exchange) Done(end End) {
	if x == nil || x.done {
		return
	}
	x.done = true
	now := time.Now()
	x.prefillLoad.Release()
	x.decision.Phase(scheduler.PhaseEncode).Reservation.Release()
	if end == EndUnanswered {
		x.decodeLoad.Release() // before Abandon, which may wait for what it reclaims
	}
	switch {
	case end == EndUnanswered && x.answered:
		x.answered = false // the answer was made and could not be sent
		x.director.opts.Orchestrator.Abandon(context.Background(), &x.job, x.outcome, "not_sent")
	case end == EndUnanswered && x.err == nil: // a panic before the answer was made
		x.director.opts.Orchestrator.Abandon(context.Background(), &x.job, x.outcome, "other")
	}
	x.director.opts.Orchestrator.Leave(&x.job, x.outcome, end == EndUnseen)
	if end == EndUnseen && x.answered {
		x.decodeLoad.ReleaseTokens()
		x.decodeLoad.Expire(now, x.director.predictedDecode(x.req))
	} else {
		x.decodeLoad.Release()
	}
	if end == EndSeen {
		x.director.learn(x, now)
	}
	x.director.metrics.ended(x, now)
	x.endSpan()
	if x.director.opts.Record != nil {
		x.director.opts.Record(newRecord(x, now))
	}
	if log := x.director.log; log.Enabled(context.Background(), slog.LevelDebug) {
		log.LogAttrs(context.Background(), slog.LevelDebug, "request ended", x.attrs(now)...)
	}
	x.decision.Release()
}

// attrs are the request in one log line.
func (x *Exchange) attrs(now time.Time) []slog.Attr {
	attrs := []slog.Attr{
		slog.String("request_id", x.req.ID), slog.String("model", x.req.Model), slog.String("endpoint", x.decode.ID()),
		slog.Int("status", x.status), slog.Float64("seconds", now.Sub(x.start).Seconds()),
		slog.String("reason", x.decision.Phase(scheduler.PhasePrefill).Reason),
	}
	if x.outcome != nil {
		attrs = append(attrs, slog.String("outcome", x.outcome.Name), slog.String("checkpoint", x.outcome.Checkpoint.String()), slog.Int("attempt", len(x.outcome.Attempts)))
	}
	if x.err != nil {
		attrs = append(attrs, slog.Any("err", x.err))
	}
	return attrs
}
