// SPDX-License-Identifier: Apache-2.0

// Package scheduler decides which endpoints serve a request. [Scheduler.Schedule] turns one [Query] (request and pool
// snapshot) into one [Decision] (endpoints per phase, best first, with reasons): it builds one [Candidate] row per
// endpoint, looks the prompt's prefix up once, then runs the profile of each phase: filters compact the rows, scorers
// fill a slice of numbers, the picker orders.
//
// Plugins are made from a [config.Config] by the constructors of a [Registry]; this package brings profile handlers,
// deciders and data producers, scorers, filters and pickers live one floor up. Floor 2.
//
// What it promises: no lock, no allocation per endpoint and no map look-up on the pick path; the same query gives the
// same answer; a burst of requests does not herd, whether they come one after the other or at once.
package scheduler

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
)

// Options are what a Scheduler is made of.
type Options struct {
	// Config is required. A configuration that comes from no file ([config.Default]) also keeps plain traffic off
	// endpoints whose role label does not allow decode.
	Config *config.Config
	// File is the configuration's name in error messages.
	File string
	// Plugins are the registries of the floors above: scorers, filters, pickers. Types in two of them are an error.
	Plugins []Registry
	// Metrics gets the scheduler's metrics; required, and unused when Previous is set (they go on).
	Metrics prometheus.Registerer
	// MetricNames chooses the names: "llm-d" (default) or "gie" (llm-d-router v0.10).
	MetricNames string
	// MaxIndexBytes bounds each prefix index; default prefix.DefaultMaxBytes.
	MaxIndexBytes int64
	// Trace fills Decision.Trace, which costs allocations on every decision.
	Trace bool
	// Previous is the scheduler that this one replaces after a change of the configuration: prefix indexes whose block
	// size did not change go on, and so do the metrics.
	Previous *Scheduler
}

// Scheduler runs profiles. Immutable after New but for what its plugins learn, safe for concurrent use.
type Scheduler struct {
	phases   phases
	matchers []Matcher // by column
	learners []Learner
	plugins  []built
	answers  []answer
	inflight *inflightLoad
	warnings []string
	trace    bool
	metrics  *metrics

	claims  *claims
	nextID  atomic.Uint64 // for requests without a seed
	pool    sync.Pool     // of *Decision
	nothing inference.Request
}

// answer makes a response header for the endpoint that served.
type answer func(e *pool.Endpoint) inference.Header

// New builds a scheduler; the error joins every problem of the configuration with file, line and path. It starts
// nothing.
func New(o Options) (*Scheduler, error) {
	var problems []error
	if o.Config == nil {
		problems = append(problems, errors.New("scheduler options: Config is required"))
	}
	if o.Metrics == nil && o.Previous == nil {
		problems = append(problems, errors.New("scheduler options: Metrics is required"))
	}
	registry, err := Merge(append([]Registry{Builtin()}, o.Plugins...)...)
	if err = errors.Join(append(problems, err)...); err != nil {
		return nil, err
	}
	a := newAssembly(&o, registry)
	s := &Scheduler{trace: o.Trace, claims: new(claims)}
	if o.Previous != nil {
		s.metrics, s.claims = o.Previous.metrics, o.Previous.claims
	} else if s.metrics, err = newMetrics(o.Metrics, o.MetricNames); err != nil {
		return nil, err
	}
	if err := a.assemble(s); err != nil {
		return nil, err
	}
	s.metrics = s.metrics.forScheduler(s)
	s.pool.New = func() any { return &Decision{work: new(work)} }
	return s, nil
}

// Schedule makes the decision. The error wraps ErrNoCandidate (a *NoCandidateError with what each filter removed) when
// decode finds no endpoint; a prefill or encode phase without endpoints only does not run. It does not block.
func (s *Scheduler) Schedule(q *Query) (*Decision, error) {
	start := time.Now()
	d := s.newDecision(q)
	ended := false
	defer func() {
		if !ended { // a plugin panicked: nobody else knows of the reservations of the phases before it
			d.releaseReservations()
		}
	}()
	err := s.all(d, q)
	s.metrics.observe(d, err, time.Since(start))
	ended = true
	if err != nil {
		d.releaseReservations()
		d.release(s)
		return nil, err
	}
	return d, nil
}

// Repick runs one phase's profile again on q's snapshot, with peer as the endpoint of the phase before it (decode after
// a prefill). It never reserves, whatever q says: the caller has a reservation to move. The Pick's slices are the
// caller's.
func (s *Scheduler) Repick(q *Query, phase Phase, peer *pool.Endpoint) (Pick, error) {
	p := s.phases.profile(phase)
	if p == nil {
		return Pick{Reason: reasonNoProfile}, nil
	}
	again := *q
	again.Reserve = false
	d := s.newDecision(&again)
	defer d.release(s)
	if err := s.phase(d, &again, phase, p, peer, nil); err != nil {
		return Pick{}, err
	}
	pick := d.Picks[phase]
	pick.Ranked = append([]Ranked(nil), pick.Ranked...)
	return pick, nil
}

// newDecision begins a cycle: rows, and what every prefix producer knows of the prompt.
func (s *Scheduler) newDecision(q *Query) *Decision {
	d, _ := s.pool.Get().(*Decision)
	d.scheduler = s
	w := d.work
	req := q.Request
	if req == nil {
		req = &s.nothing
	}
	seed := q.Seed
	if seed == 0 {
		seed = mix(s.nextID.Add(1))
	}
	w.cycle = Cycle{Request: req, Now: q.Now}
	w.seed = seed
	w.timed = mix(seed)%timedOneIn == 0
	s.gather(w, q)
	w.cycle.Prompts[0] = Prompt{Tokens: req.PromptTokens()}
	for i, m := range s.matchers {
		w.cycle.Prompts[i] = m.Match(req, &w.memories[i], w.rows, i)
	}
	d.Prompt = w.cycle.Prompts[0]
	return d
}

// Learn tells prefix indexes and learners where the prompt really went; decode or prefill may be nil. It hashes the
// prompt once more: with the decision at hand, [Decision.Learn] does the same without.
func (s *Scheduler) Learn(req *inference.Request, decode, prefill *pool.Endpoint) {
	d := s.newDecision(&Query{Request: req})
	d.Learn(decode, prefill)
	d.release(s)
}

// Learn tells prefix indexes and learners where the prompt of this decision really went; decode or prefill may be nil.
// Only before Release.
func (d *Decision) Learn(decode, prefill *pool.Endpoint) {
	for i, m := range d.scheduler.matchers {
		for _, e := range [...]*pool.Endpoint{prefill, decode} {
			if e != nil {
				m.Learn(&d.work.memories[i], e.State)
			}
		}
	}
	for _, l := range d.scheduler.learners {
		l.Learn(d.work.cycle.Request, decode, prefill)
	}
}

// Forget drops what is known of the endpoint in slot before it returns; the source of endpoints calls it before it
// gives the slot to another one.
func (s *Scheduler) Forget(slot uint32) {
	for _, m := range s.matchers {
		m.Forget(slot)
	}
}

// Disaggregates reports whether a handler with a prefill or encode profile is configured.
func (s *Scheduler) Disaggregates() bool { return s.phases.prefill != nil || s.phases.encode != nil }

// Guards reports whether the configuration is the built-in default, which keeps plain traffic off endpoints whose role
// label does not allow decode: to be said in the start-up line.
func (s *Scheduler) Guards() bool { return s.phases.guardRoles }

// Warnings are things an operator should know about a configuration that loads: deprecated types, ignored parameters.
func (s *Scheduler) Warnings() []string { return s.warnings }

// ResponseHeaders lists the headers that plugins want on the answer of a request served by e (session affinity). Nil
// when no plugin wants any.
func (s *Scheduler) ResponseHeaders(e *pool.Endpoint) []inference.Header {
	if len(s.answers) == 0 {
		return nil
	}
	out := make([]inference.Header, 0, len(s.answers))
	for _, f := range s.answers {
		out = append(out, f(e))
	}
	return out
}

// Plugins returns the configured plugins that are a T, by name: what the contract kit runs.
func Plugins[T any](s *Scheduler) map[string]T {
	out := map[string]T{}
	for _, b := range s.plugins {
		if v, ok := b.value.(T); ok {
			out[b.name] = v
		}
	}
	return out
}

// Release returns the decision's memory; neither d nor the slices of its picks may be used afterwards. Reservations
// are not released: they belong to the caller.
func (d *Decision) Release() {
	if d != nil && d.scheduler != nil {
		d.release(d.scheduler)
	}
}

func (d *Decision) release(s *Scheduler) {
	w := d.work
	clear(w.rows[:cap(w.rows)])
	clear(w.cands[:cap(w.cands)])
	w.cycle, w.decode = Cycle{}, Candidate{}
	for i := range d.Picks {
		ranked := d.Picks[i].Ranked
		clear(ranked)
		d.Picks[i] = Pick{Ranked: ranked[:0]}
	}
	d.Prompt, d.Trace, d.scheduler = Prompt{}, Trace{}, nil
	s.pool.Put(d)
}

func (d *Decision) releaseReservations() {
	for i := range d.Picks {
		d.Picks[i].Reservation.Release()
		d.Picks[i].Reservation = nil
	}
}
