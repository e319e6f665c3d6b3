// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
)

// Checkpoint is how far a request got (docs/design.md 3.4).
type Checkpoint uint8

// The checkpoints. Where decode pulls the blocks, DecodeForwarded is reached before TransferComplete.
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
// told of; afterwards out and the edits in j.Body are final. It keeps the handle's rules: one that is too old, that
// was forwarded before or that decode's engine cannot read is taken out again, counted as leaked, and decode goes on
// alone. It never waits.
func (o *Orchestrator) Forward(ctx context.Context, j *Job, out *Outcome, decode *pool.Endpoint) error {
	s := o.settings.Load()
	switch {
	case out.HasHandle && out.decode != nil:
		o.withdraw(j, out, reasonUsed)
	case out.HasHandle && time.Now().After(out.HandleUntil):
		o.withdraw(j, out, reasonExpired)
	case out.HasHandle && !s.sameWire(decode.Engine, &out.wire):
		o.withdraw(j, out, reasonEngineMismatch)
	case out.way == wayHeaders && s.Mode == modeAuto && decode.Sidecar != pool.SidecarPresent:
		out.Name, out.Headers, out.Prefiller = outcomeFallback+reasonDecodeChanged, nil, nil
		o.metrics.fallbacks.WithLabelValues(reasonDecodeChanged).Inc()
	}
	if out.way == wayOrchestrate {
		out.Headers = s.headers(out, decode)
	}
	out.decode = decode
	if out.Checkpoint == PrefillComplete && out.Prefiller != nil {
		o.reach(ctx, out, DecodeForwarded)
	}
	return nil
}

// Transferred is told how the decode endpoint served a forwarded request: with the headers of its answer, ok when
// their status is below 500. A 5xx made by the gateway looks the same and counts the same; an error that only the body
// tells is not known here. served is who answered, nil when unknown. It feeds the breaker of the pair; calls after the
// first, for requests without a handle, and after [Orchestrator.Abandon] do nothing. An answer that shows that the body
// was not read is for Abandon instead.
func (o *Orchestrator) Transferred(ctx context.Context, out *Outcome, served *pool.Endpoint, ok bool) {
	if !out.HasHandle || out.decode == nil || out.settled || out.lost {
		return
	}
	out.settled = true
	if served != nil && keyOf(served) != keyOf(out.decode) {
		o.metrics.misrouted.Inc()
		return
	}
	o.peers.notePair(out.Prefiller, out.decode, ok)
	if !ok {
		o.metrics.transferFailed.Inc()
		return
	}
	o.reach(ctx, out, TransferComplete)
}

// withdraw takes the handle out of the decode request: decode goes on alone, and the prefill is lost.
func (o *Orchestrator) withdraw(j *Job, out *Outcome, reason string) {
	x := exchange(j, out.Prefiller)
	out.wire.Withdraw(&x, j.Body)
	out.HasHandle = false
	o.lose(out, reason)
	out.Name, out.Headers, out.Prefiller = outcomeFallback+reason, nil, nil
	o.metrics.fallbacks.WithLabelValues(reason).Inc()
}

// headers names who prefilled, unless decode has, or may have, a sidecar that would prefill again because of it.
func (s *settings) headers(out *Outcome, decode *pool.Endpoint) []inference.Header {
	if out.Prefiller == nil || decode == nil {
		return nil
	}
	if decode.Sidecar == pool.SidecarPresent || s.Mode == modeAuto && decode.Sidecar != pool.SidecarAbsent {
		return nil
	}
	return []inference.Header{{Name: HeaderPrefiller, Value: out.Prefiller.Hostport}}
}
