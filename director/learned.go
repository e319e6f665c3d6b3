// SPDX-License-Identifier: Apache-2.0

package director

import (
	"log/slog"
	"math"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

// ewma is an exponentially weighted mean that may be read and fed from any goroutine; a lost update is harmless.
type ewma struct{ bits atomic.Uint64 }

// ewmaWeight is the share of a new sample (our choice: about the last 20 requests).
const ewmaWeight = 0.1

func (e *ewma) value() float64 { return math.Float64frombits(e.bits.Load()) }

func (e *ewma) feed(sample float64) {
	old := e.value()
	if old == 0 {
		old = sample
	}
	e.bits.Store(math.Float64bits(old + ewmaWeight*(sample-old)))
}

// learn takes the time per output token from a response whose end and usage were seen.
func (d *Director) learn(x *Exchange, now time.Time) {
	if x.usage.Seen && x.usage.CompletionTokens > 1 && !x.firstByte.IsZero() {
		d.perToken.feed(now.Sub(x.firstByte).Seconds() / float64(x.usage.CompletionTokens))
	}
}

// learnPace takes from the first event of a stream how fast the decode endpoint gets there: by computing the prompt, or by
// fetching its KV blocks. The stream's head says nothing of that, since engines send it before they schedule the request;
// of Responses the first events, too. Nor does an answer that is not streamed, or one that waited for a prefill beside it.
func (x *Exchange) learnPace(served *pool.Endpoint, now time.Time) {
	if x.done || !x.req.Stream || x.req.API == inference.Responses || x.status != http.StatusOK || served == nil ||
		served.State != x.decode.State || x.outcome.Overlaps() {
		return
	}
	took := now.Sub(x.start) - x.decided
	switch {
	case x.outcome.HasHandle:
		tokens := x.outcome.PrefillTokens
		if tokens <= 0 {
			tokens = int64(x.req.PromptTokens())
		}
		x.decode.Pace.Received(tokens, took)
	case x.outcome.Prefiller == nil:
		for _, r := range x.decision.Phase(scheduler.PhaseDecode).Ranked {
			if r.Endpoint.State == x.decode.State {
				x.decode.Pace.Prefilled(r.UncachedTokens, took)
				return
			}
		}
	}
}

// predictedDecode is how long the decode of req may take: its token limit times the learned time per token; 0 when
// either is unknown (the estimate then lives for pool's bound of 60 s).
func (d *Director) predictedDecode(req *inference.Request) time.Duration {
	return time.Duration(float64(req.MaxTokens) * d.perToken.value() * float64(time.Second))
}

// Ejected counts an endpoint that failures ejected: of responses, or of sub-requests, as [sidecar.Options] tell. reason
// is the last failure's.
func (d *Director) Ejected(e *pool.Endpoint, reason string) {
	d.metrics.ejections.Inc()
	d.log.Warn("endpoint ejected after repeated failures", slog.String("endpoint", e.ID()), slog.String("reason", reason), slog.Time("until", e.Health.EjectedUntil()))
}

// seed makes a repeatable number of the request id (FNV-1a): the same request and snapshot give the same pick.
func seed(id string, start time.Time) uint64 {
	if id == "" {
		return uint64(start.UnixNano())
	}
	h := uint64(14695981039346656037)
	for i := range len(id) {
		h = (h ^ uint64(id[i])) * 1099511628211
	}
	return h
}
