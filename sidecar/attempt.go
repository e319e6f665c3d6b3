// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"time"

	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar/connectors"
)

const (
	// drainBytes is how much of an answer that nobody wants is read so that its connection can be kept.
	drainBytes = 64 << 10
	// keptBuffer is the largest buffer kept for the next answer.
	keptBuffer = 64 << 10
)

// result is what one attempt came to.
type result struct {
	reason   string
	status   int
	answered time.Time // when the answer's headers arrived
	answer   connectors.Answer
	err      error
}

// pinned reports whether the prefill endpoint may hold blocks that this result gives nobody a claim to.
func (r *result) pinned() (reason string, pinned bool) {
	switch r.reason {
	case reasonIncomplete, reasonTooLarge, reasonExpired:
		return r.reason, true
	case reasonReset, reasonTimeout, reasonCanceled, reasonBudget:
		return leakAnswerLost, r.status == http.StatusOK
	default:
		return "", false
	}
}

// exchange describes a prefill at e to its connector.
func exchange(j *Job, e *pool.Endpoint) connectors.Exchange {
	return connectors.Exchange{Request: j.Request, Prefiller: e, Decode: j.Decode}
}

// attempt prefills at e, once. When it returns nothing of it runs any more. ctx ends with the budget or the client.
func (r *run) attempt(ctx context.Context, e *pool.Endpoint) result {
	start, number := time.Now(), len(r.out.Attempts)+1
	phase := scheduler.PhasePrefill.String()
	r.o.metrics.inFlight.WithLabelValues(phase).Inc()
	own, cancel := context.WithTimeoutCause(ctx, r.s.Prefill.Timeout, errPhaseTimeout)
	res := r.exchange(own, e, number)
	cancel()
	r.o.metrics.inFlight.WithLabelValues(phase).Dec()
	r.o.metrics.attempts.WithLabelValues(phase, res.reason).Inc()
	if reason, pinned := res.pinned(); pinned {
		tokens := res.answer.PromptTokens
		if tokens == 0 {
			tokens = int64(r.j.Request.PromptTokens())
		}
		r.o.metrics.leak(reason, tokens)
	}
	r.out.Attempts = append(r.out.Attempts, Attempt{
		Phase: scheduler.PhasePrefill, Endpoint: e, Number: number, Status: res.status, Reason: res.reason,
		Start: start, Duration: time.Since(start),
	})
	r.tell(e, res.reason)
	return res
}

// exchange waits for a slot, sends the prefill leg and reads its answer.
func (r *run) exchange(ctx context.Context, e *pool.Endpoint, number int) result {
	slots, err := r.o.peers.slot(ctx, e, r.s.Prefill.MaxConcurrentPerEndpoint)
	if err != nil {
		return result{reason: reasonOfEnd(err, reasonSaturated), err: err}
	}
	defer func() { <-slots }()

	x := exchange(r.j, e)
	x.RewriteHost = r.s.RewriteRemoteHost == "auto"
	body := r.j.Request.Edit()
	body.StripTransferFields()
	if r.j.Model != "" {
		body.SetModel(r.j.Model)
	}
	r.wire.Prefill(&x, body)
	inserted := float64(max(0, body.Len()-r.j.Request.Body.Len))
	r.o.metrics.heldBytes.Add(inserted)
	defer r.o.metrics.heldBytes.Sub(inserted)
	r.o.metrics.sentBytes.WithLabelValues(scheduler.PhasePrefill.String()).Add(float64(body.Len()))

	resp, err := r.s.transport.RoundTrip(r.o.request(ctx, r.s, r.j, e, body, number))
	if err != nil {
		return result{reason: reasonOfFailure(ctx, err), err: err}
	}
	defer resp.Body.Close()
	res := result{status: resp.StatusCode, answered: time.Now(), reason: reasonOfStatus(resp.StatusCode)}
	if res.reason != reasonOK {
		_, _ = io.CopyN(io.Discard, resp.Body, drainBytes)
		return res
	}
	r.read(ctx, resp, &x, &res)
	return res
}

// read reads the body of a 200.
func (r *run) read(ctx context.Context, resp *http.Response, x *connectors.Exchange, res *result) {
	buf, ok := r.o.buffers.Get().(*bytes.Buffer)
	if !ok {
		buf = new(bytes.Buffer)
	}
	defer func() {
		r.o.metrics.heldBytes.Sub(float64(buf.Len()))
		if buf.Cap() <= keptBuffer {
			buf.Reset()
			r.o.buffers.Put(buf)
		}
	}()
	limit := r.s.Prefill.MaxResponseBytes
	n, err := buf.ReadFrom(io.LimitReader(resp.Body, limit+1))
	r.o.metrics.heldBytes.Add(float64(buf.Len()))
	r.o.metrics.receivedBytes.WithLabelValues(scheduler.PhasePrefill.String()).Add(float64(n))
	switch {
	case err != nil:
		res.reason, res.err = reasonOfFailure(ctx, err), err
		return
	case n > limit:
		res.reason = reasonTooLarge
		return
	}
	res.answer = r.wire.Answer(x, buf.Bytes())
	res.reason = reasonOfVerdict(res.answer.Verdict)
	if res.reason == reasonOK && time.Since(res.answered) > r.s.HandleMaxAge {
		res.reason = reasonExpired
	}
}

// tell lets the endpoint's breaker and health know how an attempt ended.
func (r *run) tell(e *pool.Endpoint, reason string) {
	switch {
	case sequelOf(reason).blame:
		r.o.peers.note(e, false)
		if e.Health.Fail(time.Now()) {
			r.o.log.Info("endpoint ejected", slog.String("endpoint", e.Hostport), slog.String("reason", reason))
		}
	case reason == reasonOK, reason == reasonComplete, reason == reasonRejected:
		r.o.peers.note(e, true)
		e.Health.Succeed()
	}
}

// reasonOfFailure tells why an exchange broke: its context comes first, since the transport's errors follow from it.
func reasonOfFailure(ctx context.Context, err error) string {
	if ctx.Err() != nil {
		return reasonOfEnd(context.Cause(ctx), reasonTimeout)
	}
	return reasonOfError(err)
}

// reasonOfEnd tells which limit ended a context; timeout is what the phase's own limit is called here.
func reasonOfEnd(cause error, timeout string) string {
	switch {
	case errors.Is(cause, errPhaseTimeout):
		return timeout
	case errors.Is(cause, ErrBudgetSpent):
		return reasonBudget
	default:
		return reasonCanceled
	}
}
