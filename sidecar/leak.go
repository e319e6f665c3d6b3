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

// Abandon is told that out's decode request was not sent: reason is client_gone, no_decode or other. It counts the
// leaked prefill, once, and with reclaim: true sends the decode request itself, cut to one token, so that the blocks
// are pulled and freed; it then waits for the answer, 5 s at most. After Forward it is for a request that could not be
// handed to the gateway; nothing is reclaimed then, since a handle leaves once. A nil out does nothing.
func (o *Orchestrator) Abandon(ctx context.Context, j *Job, out *Outcome, reason string) {
	if out == nil || !out.HasHandle || out.lost || out.settled {
		return
	}
	if !slices.Contains([]string{leakClientGone, leakNoDecode}, reason) {
		reason = leakOther
	}
	o.lose(out, reason)
	s := o.settings.Load()
	if !s.Reclaim || out.decode != nil || j.Decode == nil || !keyOf(j.Decode).alive(o.snapshot()) || time.Now().After(out.HandleUntil) {
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

// lose counts out's prefill as leaked, once.
func (o *Orchestrator) lose(out *Outcome, reason string) {
	if !out.lost {
		out.lost = true
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
