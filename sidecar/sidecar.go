// SPDX-License-Identifier: Apache-2.0

// Package sidecar is the in-process replacement of the decode-side sidecar: it runs the phases that come before
// decode, as bounded HTTP sub-requests inside the decision. [Orchestrator.Run] brings one request to the point where
// its decode request can be forwarded; [Orchestrator.Forward], [Orchestrator.Transferred] and [Orchestrator.Abandon]
// are told what became of it. Attempts walk down the ranked list of the decision; the scheduler is never called again.
// Only addresses of the present pool snapshot are ever dialled, and what differs between engines is in package
// connectors. Floor 3.
//
// Checkpoints: an orchestrated request reaches PREFILL_SELECTED, PREFILL_COMPLETE, then, since decode engines pull
// the blocks after they got the request, DECODE_FORWARDED before TRANSFER_COMPLETE. On a wire whose engines meet while
// both work, decode is forwarded as soon as the prefill's request is on its way: DECODE_FORWARDED comes before
// PREFILL_COMPLETE there, and nothing is retried after it. Each is counted once per request.
// A retry before PREFILL_COMPLETE selects another prefiller; after it only decode is chosen anew. Engines do not read
// the attempt header: what protects from doing work twice is that an attempt is over, its connection closed or its
// answer read, before the next one starts.
package sidecar

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/pool"
)

// Headers of sub-requests and of the decode request, in lower case. Client copies of them must not be forwarded.
const (
	// HeaderPrefiller names who prefilled, host:port (llm-d's name).
	HeaderPrefiller = "x-prefiller-host-port"
	// HeaderEncoders names who encoded, host:port with commas (llm-d's name).
	HeaderEncoders = "x-encoder-hosts-ports"
	// HeaderAttempt is the number of the attempt within its phase, from 1.
	HeaderAttempt = "x-processor-attempt"
	// HeaderDepth marks sub-requests: one that comes back through the gateway is refused with [ErrLooped].
	HeaderDepth = "x-baton-depth"
)

// Orchestrator runs the phases before decode. Safe for concurrent use.
type Orchestrator struct {
	// Immutable after New.
	log      *slog.Logger
	snapshot func() *pool.Snapshot
	ejected  func(e *pool.Endpoint, reason string)
	metrics  *metrics
	peers    *peers
	retries  *retryBudget

	buffers sync.Pool // of *bytes.Buffer, for answers

	settings atomic.Pointer[settings]
	reload   sync.Mutex // held while settings are swapped

	background sync.WaitGroup  // what runs beside the streams' goroutines; each has a time limit
	closing    context.Context //nolint:containedctx // ends with Close: prefills beside decode end, aborts are still sent
	closed     context.CancelFunc

	loopbackSeen atomic.Bool // the misconfiguration was logged
}

// Options are the collaborators of an [Orchestrator].
type Options struct {
	Config     config.Disaggregation
	Logger     *slog.Logger          // nil discards
	Registerer prometheus.Registerer // nil registers nowhere
	// Snapshot is the pool now: only addresses in it are ever dialled. Required.
	Snapshot func() *pool.Snapshot
	// Ejected is told each endpoint that a failed sub-request ejected, and how that ended; nil when nobody asks.
	Ejected func(e *pool.Endpoint, reason string)
}

// New checks the configuration and starts nothing. [Orchestrator.Close] ends what Run leaves open.
func New(o Options) (*Orchestrator, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Ejected == nil {
		o.Ejected = func(*pool.Endpoint, string) {}
	}
	var missing error
	if o.Snapshot == nil {
		missing = errors.New("sidecar options: Snapshot is required")
	}
	or := &Orchestrator{
		log:      o.Logger.With(slog.String("component", "sidecar")),
		snapshot: o.Snapshot,
		ejected:  o.Ejected,
		retries:  newRetryBudget(o.Config.RetryBudget, time.Now()),
	}
	or.closing, or.closed = context.WithCancel(context.Background())
	s, err := newSettings(&o.Config, or.permitted, nil)
	if err = errors.Join(missing, err); err != nil {
		return nil, err
	}
	or.metrics = newMetrics(o.Registerer)
	or.peers = newPeers(o.Config.Breaker, or.metrics, or.log)
	or.settings.Store(s)
	if o.Registerer != nil {
		if err := o.Registerer.Register(newBreakerCollector(or.peers)); err != nil {
			return nil, fmt.Errorf("metrics: %w", err)
		}
	}
	return or, nil
}

// Reload swaps the configuration; jobs in flight finish on what they started with. Breakers survive unless their own
// settings changed. On an error the old configuration stays.
func (o *Orchestrator) Reload(c config.Disaggregation) error {
	o.reload.Lock()
	defer o.reload.Unlock()
	old := o.settings.Load()
	s, err := newSettings(&c, o.permitted, old)
	if err != nil {
		return err
	}
	if c.Breaker != old.Breaker {
		o.peers.reset(c.Breaker)
	}
	o.retries.set(c.RetryBudget)
	o.settings.Store(s)
	if s.transport != old.transport {
		old.transport.CloseIdleConnections()
	}
	return nil
}

// Shutdown waits until nothing runs beside the streams' goroutines any more, as long as ctx permits, and closes.
func (o *Orchestrator) Shutdown(ctx context.Context) {
	over := make(chan struct{})
	go func() {
		defer close(over)
		o.background.Wait()
	}()
	select {
	case <-over:
	case <-ctx.Done():
	}
	o.Close()
}

// Close ends prefills that run beside decode, waits for what runs beside the streams' goroutines (seconds at most) and
// closes idle connections. Jobs in flight are ended by their contexts, and no new ones may come.
func (o *Orchestrator) Close() {
	o.closed()
	o.background.Wait()
	o.settings.Load().transport.CloseIdleConnections()
}

// Mode reports the mode in force (kill switch): auto, orchestrate, headers or off.
func (o *Orchestrator) Mode() string { return o.settings.Load().Mode }

// Rank is how many endpoints a phase should rank: attempts + 1.
func (o *Orchestrator) Rank() int { return o.settings.Load().Prefill.Attempts + 1 }

// DecodeAfter reports whether decode endpoints are to be picked when the prefill is done (disaggregation.decodePick).
func (o *Orchestrator) DecodeAfter() bool { return o.settings.Load().DecodePick == "after" }

// HoldResponse is how long a response's head waits for a prefill beside decode (disaggregation.holdResponse).
func (o *Orchestrator) HoldResponse() time.Duration { return o.settings.Load().HoldResponse }

// Budget is the time that all phases before decode may take together (disaggregation.budget).
func (o *Orchestrator) Budget() time.Duration { return o.settings.Load().Budget }

// Run brings the job to the point where decode can be forwarded, blocking until then. ctx is the stream's: when it
// ends, what runs is cancelled at once. Where the legs run at the same time, Run returns as soon as the prefill's request
// is on its way, and [Outcome.Pending] tells when it is over. Errors: *[PhaseError] (502), [ErrBudgetSpent] (504),
// [ErrNotCarried] (400), [ErrLooped], [context.Canceled] when the client left. The Outcome is never nil: beside an error it only tells how far
// the request got (Attempts, Checkpoint), its Name is empty, and nothing may be forwarded.
func (o *Orchestrator) Run(ctx context.Context, j *Job) (*Outcome, error) {
	r := run{o: o, s: o.settings.Load(), j: j, out: &Outcome{Name: outcomeAggregated, CachedTokens: -1}, load: j.PrefillLoad}
	defer func() { r.load.Release() }()
	if j.Request.Headers.Has(HeaderDepth) {
		o.metrics.looped.Inc()
		r.out.Name = ""
		return r.out, ErrLooped
	}
	if j.Body != nil && j.Request.HasTransferFields && !r.s.AcceptClientTransferFields {
		j.Body.StripTransferFields()
	}
	r.deadline = j.Start.Add(r.s.Budget)
	if j.Start.IsZero() {
		r.deadline = time.Now().Add(r.s.Budget)
	}
	err := r.phases(ctx)
	if err != nil {
		r.out.Name = ""
	}
	return r.out, err
}
