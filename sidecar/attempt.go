// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// maxErrorText bounds the text of an error that is kept with its attempt.
const maxErrorText = 200

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

// errorText is what broke, for the record of the attempt.
func (r *result) errorText() string {
	if r.err == nil {
		return ""
	}
	text := r.err.Error()
	if len(text) > maxErrorText {
		text = strings.ToValidUTF8(text[:maxErrorText], "")
	}
	return text
}

// attempt is one prefill at one endpoint.
type attempt struct {
	o         *Orchestrator
	s         *settings
	wire      wire
	x         *connectors.Exchange
	e         *pool.Endpoint
	number    int   // from 1
	bodyBytes int64 // of the client's body
	uncached  int64 // prompt tokens that e has to compute, as ranked
	prompt    int64 // estimated prompt tokens
	beside    bool  // it runs while decode does
	start     time.Time
	sentAt    time.Time // when the request began to be sent
}

func (r *run) newAttempt(e *pool.Endpoint, uncached int64) *attempt {
	r.tries++
	return &attempt{
		o: r.o, s: r.s, wire: r.wire, x: r.exchange(e), e: e, number: r.tries, start: time.Now(),
		bodyBytes: int64(r.j.Request.Body.Len), uncached: uncached, prompt: int64(r.j.Request.PromptTokens()),
	}
}

// exchange describes a prefill at e to its connector.
func (r *run) exchange(e *pool.Endpoint) *connectors.Exchange {
	return &connectors.Exchange{
		Request: r.j.Request, Prefiller: e, Decode: r.j.Decode, Source: r.source(scheduler.PhasePrefill, e),
		RewriteHost: r.s.RewriteRemoteHost == "auto", Ports: r.s.Ports, Rank: -1,
	}
}

// prefillAt prefills at e, once. When it returns nothing of it runs any more. ctx ends with the budget or the client.
func (r *run) prefillAt(ctx context.Context, e *pool.Endpoint, uncached int64) (*attempt, result) {
	a := r.newAttempt(e, uncached)
	own, cancel := context.WithTimeoutCause(ctx, r.s.Prefill.Timeout, errPhaseTimeout)
	defer cancel()
	res := a.do(own, func(ctx context.Context) *http.Request {
		return r.o.request(ctx, r.s, r.j, e, r.prefillBody(a.x), a.number)
	})
	r.out.Attempts = append(r.out.Attempts, a.close(&res))
	if reason, lost := a.leaks(&res); lost {
		r.out.Leaked = reason
	}
	return a, res
}

// prefillBody is the client's body as the prefill leg needs it.
func (r *run) prefillBody(x *connectors.Exchange) *inference.Edits {
	body := x.Request.Edit()
	body.StripTransferFields()
	if r.j.Model != "" {
		body.SetModel(r.j.Model)
	}
	r.spliceEncoded(true, body)
	r.wire.Prefill(x, body)
	return body
}

// do waits for a slot, has the endpoint introduce itself where the wire needs that, sends what request makes, and reads
// the answer.
func (a *attempt) do(ctx context.Context, request func(context.Context) *http.Request) result {
	phase := scheduler.PhasePrefill.String()
	a.o.metrics.inFlight.WithLabelValues(phase).Inc()
	defer a.o.metrics.inFlight.WithLabelValues(phase).Dec()
	slots, err := a.o.peers.slot(ctx, a.e, a.s.Prefill.MaxConcurrentPerEndpoint)
	if err != nil {
		return result{reason: reasonOfEnd(err, reasonSaturated), err: err}
	}
	defer func() { <-slots }()
	if failed := a.introduce(ctx); failed != nil {
		return *failed
	}

	req := request(ctx)
	if a.x.Rank >= 0 {
		req.Header["X-Data-Parallel-Rank"] = []string{strconv.Itoa(a.x.Rank)}
	}
	inserted := float64(max(0, req.ContentLength-a.bodyBytes))
	a.o.metrics.heldBytes.Add(inserted)
	defer a.o.metrics.heldBytes.Sub(inserted)
	a.sentAt = time.Now()
	return a.o.send(ctx, a.s, phase, req, a.read)
}

// read reads the body of a 200.
func (a *attempt) read(answer []byte, res *result) {
	res.answer = a.wire.Answer(a.x, answer)
	res.reason = reasonOfVerdict(res.answer.Verdict)
	if res.reason == reasonOK && !a.beside && time.Since(res.answered) > a.s.HandleMaxAge {
		res.reason = reasonExpired
	}
}

// leaks reports whether the attempt left blocks behind. What runs beside decode is not known to: its engines settle that.
func (a *attempt) leaks(res *result) (reason string, lost bool) {
	reason, lost = res.pinned()
	return reason, lost && a.wire.Claims && !a.beside
}

// close counts an attempt that is over, tells whoever learns from it, and returns its record.
func (a *attempt) close(res *result) Attempt {
	a.o.metrics.attempts.WithLabelValues(scheduler.PhasePrefill.String(), res.reason).Inc()
	if reason, lost := a.leaks(res); lost {
		tokens := res.answer.PromptTokens
		if tokens == 0 {
			tokens = a.prompt
		}
		a.o.metrics.leak(reason, tokens)
	}
	if res.reason == reasonOK && !a.beside {
		a.e.Pace.Prefilled(a.uncached, res.answered.Sub(a.sentAt))
	}
	a.o.tell(a.e, res.reason)
	return Attempt{
		Phase: scheduler.PhasePrefill, Endpoint: a.e, Number: a.number, Status: res.status, Reason: res.reason, Error: res.errorText(),
		Start: a.start, Duration: time.Since(a.start),
	}
}

// tell lets the endpoint's breaker and health know how an attempt ended; after a failure it has to introduce itself anew.
func (o *Orchestrator) tell(e *pool.Endpoint, reason string) {
	switch {
	case sequelOf(reason).blame:
		o.peers.note(e, false)
		if e.Health.Fail(time.Now()) {
			o.ejected(e, reason)
		}
	case reason == reasonOK, reason == reasonComplete, reason == reasonRejected:
		o.peers.note(e, true)
		e.Health.Succeed()
	}
	switch reason {
	case reasonOK, reasonComplete, reasonCanceled, reasonBudget, reasonSaturated:
	default:
		o.peers.forget(e)
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
