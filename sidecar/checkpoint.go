// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

// Checkpoint is how far a request got (docs/design.md 3.4).
type Checkpoint uint8

// The checkpoints. Where decode pulls the blocks, DecodeForwarded is reached before TransferComplete; where the legs run
// at the same time, before PrefillComplete.
const (
	None Checkpoint = iota
	EncodeComplete
	PrefillSelected
	PrefillComplete
	TransferComplete
	DecodeForwarded
)

// String is the checkpoint's name in logs, metrics and traces.
func (c Checkpoint) String() string {
	switch c {
	case EncodeComplete:
		return "ENCODE_COMPLETE"
	case PrefillSelected:
		return "PREFILL_SELECTED"
	case PrefillComplete:
		return "PREFILL_COMPLETE"
	case TransferComplete:
		return "TRANSFER_COMPLETE"
	case DecodeForwarded:
		return "DECODE_FORWARDED"
	default:
		return "NONE"
	}
}

// reach notes that out got to c; a checkpoint that was reached before counts once.
func (o *Orchestrator) reach(ctx context.Context, out *Outcome, c Checkpoint) {
	if out.Checkpoint == c {
		return
	}
	out.Checkpoint = c
	o.metrics.checkpoints.WithLabelValues(c.String()).Inc()
	trace.SpanFromContext(ctx).AddEvent(c.String())
}

// Forward is called right before the decode request leaves for decode, which need not be the endpoint that Run was
// told of; afterwards out and the edits in j.Body are final. It keeps the rules of what travels with the request: a handle
// that is too old, that was forwarded before, that decode's engine cannot read or that was made for another endpoint is
// taken out again, counted as leaked, and decode goes on alone. A *[PhaseError] (502) or [ErrBudgetSpent] says that it
// cannot, or must not (onFailure: fail). It waits for nothing but the end of what it cancels.
func (o *Orchestrator) Forward(ctx context.Context, j *Job, out *Outcome, decode *pool.Endpoint) error {
	s := o.settings.Load()
	if reason := o.unfit(s, out, decode); reason != "" {
		if err := o.withdraw(s, j, out, reason); err != nil {
			return err
		}
	}
	o.unpull(s, j, out, decode)
	switch {
	case out.way != wayHeaders:
		out.Headers = s.headers(out, decode)
	case s.Mode == modeAuto && decode.Sidecar != pool.SidecarPresent:
		out.Name, out.Headers, out.Prefiller = outcomeFallback+reasonDecodeChanged, nil, nil
		o.metrics.fallbacks.WithLabelValues(reasonDecodeChanged).Inc()
	}
	out.decode = decode
	if out.way == wayOrchestrate && out.Prefiller != nil && (out.Checkpoint == PrefillComplete || out.Checkpoint == PrefillSelected) {
		o.reach(ctx, out, DecodeForwarded)
	}
	return nil
}

// unfit tells why decode must not get what the prefill gave; "" when it may.
func (o *Orchestrator) unfit(s *settings, out *Outcome, decode *pool.Endpoint) string {
	switch {
	case !out.Bound():
		return ""
	case out.decode != nil:
		return reasonUsed
	case out.beside && out.leg.ended() && !out.leg.result.served():
		return out.leg.result.reason
	case out.HasHandle && time.Now().After(out.HandleUntil):
		return reasonExpired
	case !s.sameWire(decode.Engine, &out.wire):
		return reasonEngineMismatch
	case out.Fixed() && (out.x.Decode == nil || keyOf(out.x.Decode) != keyOf(decode)):
		return reasonDecodeChanged
	default:
		return ""
	}
}

// Transferred is told how the decode endpoint served a forwarded request: with the headers of its answer, ok when
// their status is below 500. A 5xx made by the gateway looks the same and counts the same; an error that only the body
// tells is not known here. served is who answered, nil when unknown. It feeds the breaker of the pair, and cancels a
// prefill beside decode that nobody waits for any more; calls after the first, for requests whose prefill holds nothing
// for decode, and after [Orchestrator.Abandon] do nothing. An answer that shows that the body was not read is for Abandon
// instead.
func (o *Orchestrator) Transferred(ctx context.Context, out *Outcome, served *pool.Endpoint, ok bool) {
	out.seen = true
	if !out.HasHandle && !out.beside || out.decode == nil || out.settled || out.lost {
		return
	}
	out.settled = true
	if served != nil && keyOf(served) != keyOf(out.decode) {
		o.metrics.misrouted.Inc()
		o.drop(out)
		return
	}
	o.peers.notePair(out.Prefiller, out.decode, ok)
	if !ok {
		o.metrics.transferFailed.Inc()
		o.peers.forget(out.Prefiller)
		out.decode.Warm.Forget(out.Prefiller.Slot)
		o.drop(out)
		return
	}
	out.decode.Warm.Add(out.Prefiller.Slot)
	o.reach(ctx, out, TransferComplete)
}

// withdraw takes what the prefill gave out of the decode request: decode goes on alone, if it can, and the prefill is
// lost. It cannot where the engine has no way back, and must not after a prefill that failed under onFailure fail.
func (o *Orchestrator) withdraw(s *settings, j *Job, out *Outcome, reason string) error {
	refused := !out.wire.Aggregates
	phase := &PhaseError{Phase: scheduler.PhasePrefill, Endpoint: out.Prefiller.Hostport, Reason: reason}
	for i := range out.Attempts {
		phase.Attempt = max(phase.Attempt, out.Attempts[i].Number)
	}
	var answer error = phase
	switch {
	case out.beside:
		o.orphan(out, reason)
		l := out.leg
		phase.Attempt, phase.Status, phase.Err = l.number, l.result.status, l.result.err
		if reason == l.result.reason { // it failed, and was not cancelled by us
			refused = refused || s.OnFailure == "fail" && !sequelOf(reason).alone
			answer = l.failure()
		}
	case out.HasHandle:
		o.lose(out, reason)
	}
	out.wire.Withdraw(out.x, j.Body)
	out.spliceEncoded(true, j.Body)
	out.HasHandle, out.beside, out.x = false, false, nil
	out.Name, out.Headers, out.Prefiller = outcomeFallback+reason, nil, nil
	if refused {
		out.Name = ""
		return answer
	}
	o.metrics.fallbacks.WithLabelValues(reason).Inc()
	return nil
}

// headers names who did the work before decode, unless decode has, or may have, a sidecar that would do it again because
// of that.
func (s *settings) headers(out *Outcome, decode *pool.Endpoint) []inference.Header {
	if out.Prefiller == nil && len(out.Encoders) == 0 || decode == nil {
		return nil
	}
	if decode.Sidecar == pool.SidecarPresent || s.Mode == modeAuto && decode.Sidecar != pool.SidecarAbsent {
		return nil
	}
	var headers []inference.Header
	if out.Prefiller != nil {
		headers = append(headers, inference.Header{Name: HeaderPrefiller, Value: out.Prefiller.Hostport})
	}
	if len(out.Encoders) > 0 {
		headers = append(headers, inference.Header{Name: HeaderEncoders, Value: out.encoderHosts()})
	}
	return headers
}
