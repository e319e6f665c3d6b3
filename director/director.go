// SPDX-License-Identifier: Apache-2.0

// Package director is the order of one request: read it ([Director.Begin]: inspect, schedule, reserve), run what comes
// before decode and make the answer ([Exchange.Run]), and close the books when the response is over
// ([Exchange.ResponseHeaders], [Exchange.Done]). Its one type is the [Director]; it knows nothing of ext_proc above it
// and nothing of wires below it. Floor 4.
package director

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar"
)

// Scheduler is what the director asks for picks; *scheduler.Scheduler is one.
type Scheduler interface {
	Schedule(q *scheduler.Query) (*scheduler.Decision, error)
	Repick(q *scheduler.Query, phase scheduler.Phase, peer *pool.Endpoint) (scheduler.Pick, error)
	Pairs(prefill, decode *pool.Endpoint) bool
	ResponseHeaders(e *pool.Endpoint) []inference.Header
}

// Orchestrator is what the director asks to run the phases before decode; *sidecar.Orchestrator is one.
type Orchestrator interface {
	Mode() string
	Rank() int
	DecodeAfter() bool
	NeedsPrefill(decode *pool.Endpoint) bool
	Encodes() bool
	Pulls() bool
	Run(ctx context.Context, j *sidecar.Job) (*sidecar.Outcome, error)
	Forward(ctx context.Context, j *sidecar.Job, out *sidecar.Outcome, decode *pool.Endpoint) error
	Transferred(ctx context.Context, out *sidecar.Outcome, served *pool.Endpoint, ok bool)
	Abandon(ctx context.Context, j *sidecar.Job, out *sidecar.Outcome, reason string)
	EndsDecode(out *sidecar.Outcome) bool
	Settle(ctx context.Context, j *sidecar.Job, out *sidecar.Outcome) error
	Leave(j *sidecar.Job, out *sidecar.Outcome, unseen bool)
}

// Options are a director's collaborators; all but Record are required.
type Options struct {
	// Scheduler returns the scheduler in force; it is swapped whole on reload.
	Scheduler func() Scheduler
	// Snapshot returns the pool now.
	Snapshot     func() *pool.Snapshot
	Orchestrator Orchestrator
	Logger       *slog.Logger
	Registerer   prometheus.Registerer
	// AllowUninspectedBodies is limits.allowUninspectedBodies.
	AllowUninspectedBodies bool
	// MetricsNames chooses the names of the request metrics: llm-d (default) or gie.
	MetricsNames string
	// Tracer makes a span for each request; nil when nothing is traced.
	Tracer trace.Tracer
	// Record is told every finished request, for /debug/decisions; nil when nobody asks.
	Record func(*Record)
}

// Director takes requests through their phases. Safe for concurrent use.
type Director struct {
	opts    Options
	log     *slog.Logger
	metrics *metrics
	// perToken is learned from responses whose end and usage were seen (seconds, float bits).
	perToken ewma
}

// New checks that every collaborator is there.
func New(o Options) (*Director, error) {
	var errs []error
	for name, missing := range map[string]bool{
		"Scheduler": o.Scheduler == nil, "Snapshot": o.Snapshot == nil, "Orchestrator": o.Orchestrator == nil,
		"Logger": o.Logger == nil, "Registerer": o.Registerer == nil,
	} {
		if missing {
			errs = append(errs, errors.New("director: Options."+name+" is missing"))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return &Director{opts: o, log: o.Logger.With(slog.String("component", "director")), metrics: newMetrics(o.Registerer, o.MetricsNames)}, nil
}

// Incoming is a request as the gateway handed it over.
type Incoming struct {
	Headers inference.Headers
	Body    inference.Body
	HasBody bool
	// Uninspected says that there is a body which the gateway's body mode does not let us see or hold.
	Uninspected bool
	Subset      scheduler.Subset
	Start       time.Time
}

// Answer is what the gateway is to do with the request.
type Answer struct {
	// Destination is "ip:port", or a comma list when the configuration asks for fallbacks and no KV handle travels.
	Destination string
	// Set are headers to set on the request, overwriting.
	Set []inference.Header
	// Body holds the edits of the body; nil when the bytes that came go out as they are.
	Body *inference.Edits
	// ResponseSet are headers to set on the response (session affinity), where the gateway shows response headers.
	ResponseSet []inference.Header
	// Outcome is the value of the response header x-baton-outcome.
	Outcome string
}

// Begin inspects the request, asks the scheduler and reserves load on its picks. The error is one of status.go's; the
// exchange must be ended with Done when there is none.
func (d *Director) Begin(in *Incoming) (*Exchange, error) {
	req, edits, err := d.inspect(in)
	if err != nil {
		return nil, d.refuse(req, in.Start, err)
	}
	x := &Exchange{director: d, req: req, edits: edits, start: in.Start, sched: d.opts.Scheduler(), bodyBytes: in.Body.Len}
	x.query = scheduler.Query{
		Request: req, Snapshot: d.opts.Snapshot(), Subset: in.Subset, Now: in.Start,
		Seed: seed(req.ID, in.Start), Rank: d.opts.Orchestrator.Rank(), Reserve: true,
	}
	x.query.NeedsPrefill, x.query.Encodes, x.query.Pulls = d.opts.Orchestrator.NeedsPrefill, d.opts.Orchestrator.Encodes(), d.opts.Orchestrator.Pulls()
	x.query.OnlyDecode, x.query.OnlyReason = d.onlyDecode(req)
	x.decision, err = x.sched.Schedule(&x.query)
	if err != nil {
		return nil, d.refuse(req, in.Start, err)
	}
	x.scheduled = time.Since(in.Start)
	decode := x.decision.Phase(scheduler.PhaseDecode)
	x.decode, x.decodeLoad = decode.Ranked[0].Endpoint, decode.Reservation
	x.prefillLoad = x.decision.Phase(scheduler.PhasePrefill).Reservation
	d.metrics.began(req)
	return x, nil
}

// refuse counts and records a request that ends before anybody was picked.
func (d *Director) refuse(req *inference.Request, start time.Time, err error) error {
	d.metrics.refused(req, err)
	if d.opts.Record != nil {
		d.opts.Record(newRefusal(req, start, err))
	}
	return err
}

// onlyDecode tells why nothing but decode may run, if so.
func (d *Director) onlyDecode(req *inference.Request) (bool, string) {
	switch {
	case d.opts.Orchestrator.Mode() == "off":
		return true, "mode-off"
	case req.Bars != 0:
		return true, "request-" + req.Bars.String()
	case req.Method != http.MethodPost: // no engine generates for it, so nobody would claim a prefill
		return true, "request-method"
	default:
		return false, ""
	}
}
