// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/baton-epp/baton/sidecar/connectors"
)

const (
	// reclaimTimeout bounds the request that claims and drops a lost prefill.
	reclaimTimeout = 5 * time.Second

	reclaimOK     = "ok"
	reclaimFailed = "failed"
)

// Abandon is told that nobody claims out's prefill. Before Forward the decode request was not sent, and reason is
// client_gone, no_decode or other: it counts the leaked prefill, once, and with reclaim: true sends the decode request
// itself, cut to one token, so that the blocks are pulled and freed; it then waits for the answer, 5 s at most. After
// Forward reason is not_sent (the answer to the gateway could not be delivered), not_delivered (the gateway did not reach
// the decode endpoint) or refused (the decode server answered 401, 403, 404, 405 or 3xx, before it read the body): it only
// counts, once, since a handle leaves once and may have left; any other reason does nothing then, for the engines settle
// it. A prefill that still runs beside decode is cancelled instead, which leaks nothing. A nil out does nothing.
func (o *Orchestrator) Abandon(ctx context.Context, j *Job, out *Outcome, reason string) {
	if out == nil || !out.HasHandle && !out.beside || out.lost || out.settled {
		return
	}
	if out.decode != nil {
		if reason == leakNotSent || reason == leakRefused || reason == leakNotDelivered {
			out.seen = out.seen || reason != leakNotSent
			o.giveUp(out, reason)
		}
		return
	}
	if !slices.Contains([]string{leakClientGone, leakNoDecode}, reason) {
		reason = leakOther
	}
	o.giveUp(out, reason)
	s := o.settings.Load()
	if !s.Reclaim || out.leg != nil || j.Decode == nil || !keyOf(j.Decode).alive(o.snapshot()) || time.Now().After(out.HandleUntil) {
		return
	}
	out.decode = j.Decode // the handle leaves now, and never again
	// The client is gone and its context with it; this call has a limit of its own.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reclaimTimeout)
	defer cancel()
	result := reclaimFailed
	if o.reclaim(ctx, s, j) {
		result = reclaimOK
	}
	o.metrics.reclaimed.WithLabelValues(result).Inc()
}

// giveUp settles that nobody takes the blocks.
func (o *Orchestrator) giveUp(out *Outcome, reason string) {
	if out.beside {
		o.orphan(out, reason)
		return
	}
	o.lose(out, reason)
}

// lose counts out's prefill as leaked, once.
func (o *Orchestrator) lose(out *Outcome, reason string) {
	if !out.lost {
		out.lost, out.Leaked = true, reason
		o.metrics.leak(reason, out.PrefillTokens)
	}
}

// reclaim sends the decode request for one token and throws the answer away.
func (o *Orchestrator) reclaim(ctx context.Context, s *settings, j *Job) bool {
	connectors.OneToken(j.Request, j.Body)
	load := j.Decode.Load.Reserve(0)
	defer load.Release()
	resp, err := s.transport.RoundTrip(o.request(ctx, s, j, j.Decode, j.Body, 1))
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, s.Prefill.MaxResponseBytes))
	return err == nil && resp.StatusCode == http.StatusOK
}
