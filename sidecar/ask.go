// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"bytes"
	"context"
	"time"

	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// ask puts the question to the decode endpoint whether it holds enough of the prompt, where the wire has one: then no
// prefill is needed. It is an attempt of the decode phase, which ends as cached or not_cached; a failed one is as good as
// a no. An error means that there is no time or no client any more.
func (r *run) ask(ctx context.Context) (enough bool, err error) {
	asker, ok := r.wire.Connector.(connectors.Asker)
	if !ok || r.j.Decode == nil {
		return false, nil
	}
	x, body := r.exchange(nil), r.j.Request.Edit()
	body.StripTransferFields()
	if r.j.Model != "" {
		body.SetModel(r.j.Model)
	}
	r.spliceEncoded(true, body)
	if !asker.Ask(x, body) {
		return false, nil
	}
	r.wire.Withdraw(x, r.j.Body) // whatever the answer, decode is not to ask itself again
	start, e, phase := time.Now(), r.j.Decode, scheduler.PhaseDecode
	res := r.question(ctx, asker, x, call{path: enginePath(r.j.Request.API), id: r.j.Request.ID, body: body, attempt: 1})
	r.o.metrics.attempts.WithLabelValues(phase.String(), res.reason).Inc()
	r.out.Attempts = append(r.out.Attempts, Attempt{
		Phase: phase, Endpoint: e, Number: 1, Status: res.status, Reason: res.reason, Error: res.errorText(), Start: start, Duration: time.Since(start),
	})
	r.o.tell(e, res.reason)
	if res.reason == reasonCanceled || res.reason == reasonBudget {
		return false, r.over(ctx, &res)
	}
	return res.reason == reasonCached, nil
}

// question sends the question and reads the answer.
func (r *run) question(ctx context.Context, asker connectors.Asker, x *connectors.Exchange, c call) result {
	phase := scheduler.PhaseDecode.String()
	r.o.metrics.inFlight.WithLabelValues(phase).Inc()
	defer r.o.metrics.inFlight.WithLabelValues(phase).Dec()
	ctx, cancel := context.WithTimeoutCause(ctx, r.s.Prefill.Timeout, errPhaseTimeout)
	defer cancel()
	slots, err := r.o.peers.slot(ctx, r.j.Decode, r.s.Prefill.MaxConcurrentPerEndpoint)
	if err != nil {
		return result{reason: reasonOfEnd(err, reasonSaturated), err: err}
	}
	defer func() { <-slots }()
	return r.o.send(ctx, r.s, phase, r.o.post(ctx, r.s, r.j, r.j.Decode, c), func(answer []byte, res *result) {
		res.reason = reasonNotCached
		if len(bytes.TrimSpace(answer)) > 0 && asker.Enough(x, answer) {
			res.reason = reasonCached
		}
	})
}
