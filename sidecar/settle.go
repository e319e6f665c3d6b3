// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"runtime/debug"
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar/connectors"
)

const (
	// abortAfter is how long the request that ends a decode waits, so that the gateway, which was told a moment ago, lets go
	// of decode first: SGLang answers what is aborted with 200, which a client could take for the whole answer.
	abortAfter = 200 * time.Millisecond
	// abortTimeout bounds that request.
	abortTimeout = 5 * time.Second
)

// The results of aborts.
const (
	abortOK     = "ok"
	abortFailed = "failed"
)

// Pending is closed when the prefill that runs beside decode is over; nil when there is none.
func (out *Outcome) Pending() <-chan struct{} {
	if out == nil || out.leg == nil || out.joined {
		return nil
	}
	return out.leg.done
}

// EndsDecode reports whether decode waits in vain if the prefill beside it fails (connectors.Traits.EndsDecode).
func (o *Orchestrator) EndsDecode(out *Outcome) bool {
	return out != nil && out.leg != nil && out.leg.wire.EndsDecode
}

// Settle takes over into out what the prefill beside decode came to; called by the stream's goroutine once Pending is
// closed. A *[PhaseError] or [ErrBudgetSpent] means that decode waits in vain: the client is to be answered now, and the
// stream to be ended. Leave then tells the decode endpoint to let go, where its engine needs that.
func (o *Orchestrator) Settle(_ context.Context, j *Job, out *Outcome) error {
	if !out.join() || out.leg.result.served() {
		return nil
	}
	l := out.leg
	if l.panicked != nil {
		out.vain = l.wire.EndsDecode
		panic(l.panicked) //nolint:forbidigo // of a connector: for who guards the stream's goroutine
	}
	out.HasHandle, out.beside = false, false
	switch {
	case !l.wire.EndsDecode:
		o.metrics.fallbacks.WithLabelValues(l.result.reason).Inc()
		if !out.seen {
			out.Name, out.Prefiller = outcomeFallback+l.result.reason, nil
		}
		return nil
	case out.settled && !j.Request.Stream:
		return nil // it has answered, so it had what it waited for
	}
	out.Name, out.vain = "", true
	return l.failure()
}

// Leave is told that the stream is over. What runs beside decode is cancelled, and decode told to let go, unless unseen
// says that the gateway ended the stream before the response: then it runs on, within its limits.
func (o *Orchestrator) Leave(_ *Job, out *Outcome, unseen bool) {
	if out == nil || out.leg == nil {
		return
	}
	l, decode := out.leg, out.decode
	if unseen && !out.joined {
		l.then(func() {
			switch {
			case l.result.served():
			case l.wire.EndsDecode:
				o.abort(l, decode)
			default:
				o.metrics.fallbacks.WithLabelValues(l.result.reason).Inc()
			}
		})
		return
	}
	o.drop(out)
	if out.vain || out.beside && !out.seen && !l.result.served() {
		o.abort(l, decode)
	}
}

// join takes over what the leg came to, once it is over; false when there is nothing to take over.
func (out *Outcome) join() bool {
	if out.leg == nil || out.joined || !out.leg.ended() {
		return false
	}
	l := out.leg
	out.joined = true
	out.Attempts = append(out.Attempts, l.record)
	if l.result.served() {
		out.PrefillTokens, out.CachedTokens = l.result.answer.PromptTokens, cached(&l.result.answer)
		if out.Checkpoint == PrefillSelected || out.Checkpoint == DecodeForwarded {
			out.Checkpoint = PrefillComplete // the leg counted it
		}
	}
	return true
}

// drop cancels the leg if it still runs, and waits for its end, which comes at once.
func (o *Orchestrator) drop(out *Outcome) {
	if l := out.leg; l != nil && !out.joined {
		l.cancel(context.Canceled)
		<-l.done
		out.join()
	}
}

// orphan cancels a leg whose blocks nobody will take, and counts them as leaked if it was too late for that.
func (o *Orchestrator) orphan(out *Outcome, reason string) {
	o.drop(out)
	if out.leg.result.served() && out.HasHandle {
		o.lose(out, reason)
	}
	out.lost = true
}

// failure is the error for the client of a decode that waits in vain.
func (l *leg) failure() error {
	if l.result.reason == reasonBudget {
		return fmt.Errorf("prefill %s attempt %d: %w", l.e.Hostport, l.number, ErrBudgetSpent)
	}
	return &PhaseError{
		Phase: scheduler.PhasePrefill, Endpoint: l.e.Hostport, Attempt: l.number, Status: l.result.status, Reason: l.result.reason, Err: l.result.err,
	}
}

// abort tells the decode endpoint to let go of a request whose prefill failed, where its engine needs that; once, and
// without waiting for the answer.
func (o *Orchestrator) abort(l *leg, decode *pool.Endpoint) {
	aborter, ok := l.wire.Connector.(connectors.Aborter)
	if !ok || decode == nil {
		return
	}
	l.aborted.Do(func() {
		o.background.Go(func() {
			select {
			case <-time.After(abortAfter):
			case <-o.closing.Done():
			}
			result := abortFailed
			defer func() {
				if p := recover(); p != nil { // of a connector: it would end the process
					o.log.Error("panic in an abort", slog.Any("err", p), slog.String("stack", string(debug.Stack())))
				}
				if result != "" {
					o.metrics.aborts.WithLabelValues(result).Inc()
				}
			}()
			result = o.letGo(l, aborter, decode)
		})
	})
}

// letGo sends the request that ends a decode; "" where there is nothing to send.
func (o *Orchestrator) letGo(l *leg, aborter connectors.Aborter, decode *pool.Endpoint) (result string) {
	path, text := aborter.Abort(l.x)
	if path == "" {
		return ""
	}
	var body inference.Body
	body.Append(text)
	// The stream and its context may be over; this call has a limit of its own.
	ctx, cancel := context.WithTimeout(context.Background(), abortTimeout)
	defer cancel()
	if o.told(l.s, o.post(ctx, l.s, &l.job, decode, call{path: path, id: l.job.Request.ID, body: parts{body}, attempt: 1})) {
		return abortOK
	}
	return abortFailed
}

// told sends a request whose answer says nothing but its status.
func (o *Orchestrator) told(s *settings, req *http.Request) bool {
	resp, err := s.transport.RoundTrip(req)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	_, _ = io.CopyN(io.Discard, resp.Body, drainBytes)
	return resp.StatusCode == http.StatusOK
}
