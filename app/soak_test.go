// SPDX-License-Identifier: Apache-2.0

package app

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/baton-epp/baton/director"
	"github.com/baton-epp/baton/internal/gatewaytest"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/simulate"
)

// soakVariable says how long TestSoak runs, all wires together, as a duration; make soak sets it.
const soakVariable = "BATON_SOAK"

const (
	soakBudget  = 3 * time.Second
	soakRetries = "retryBudget: {ratio: 0.2, minPerSecond: 3}"
	soakWorkers = 12
	soakLease   = 3 * time.Second
	// engineTimers is how long a decode engine waits by itself: offloading's 30 s as scaled, a lease elsewhere.
	engineTimers = 3 * time.Second
)

// TestSoak sends thousands of requests through the picker while model servers die, hang, restart and answer wrongly.
// Every request must be answered within its budget and a second, with the right text; afterwards no goroutine,
// reservation or byte may be left, and the leaks that the picker counted are those that the engines saw.
func TestSoak(t *testing.T) {
	// A second beside the budget, where the machine is ours; other tests may run beside a short soak.
	total, margin := 6*time.Second, 15*time.Second
	if v := os.Getenv(soakVariable); v != "" {
		var err error
		if total, err = time.ParseDuration(v); err != nil {
			t.Fatalf("%s: %v", soakVariable, err)
		}
		margin = time.Second
	}
	all := flavours(t)
	for _, f := range all {
		t.Run(f.name, func(t *testing.T) { newSoak(t, f, margin).run(total / time.Duration(len(all))) })
	}
}

// soak is one wire's part of the test.
type soak struct {
	*stack
	flavour  *flavour
	gateways []*gatewaytest.Gateway
	prompts  []prompt
	requests atomic.Int64
	began    time.Time
	margin   time.Duration // beside the budget

	mu    sync.Mutex
	fates map[string]*fate            // guarded by mu; by request id
	kills map[string][]time.Time      // guarded by mu; by engine address
	seen  map[string]*director.Record // guarded by mu; by request id
}

// prompt is a request body and the answer to it.
type prompt struct{ body, text string }

// fate is what became of one request.
type fate struct {
	start, end time.Time
	reply      *gatewaytest.Reply
	err        error
	left       bool // the client left, or was to leave
	broken     bool // the engine ended a stream with an error
}

func newSoak(t *testing.T, f *flavour, margin time.Duration) *soak {
	t.Helper()
	o := fast(3, 4)
	o.Template.Lease = soakLease
	o.Template.RecordBodies = -1
	if f.engine != nil {
		f.engine(&o.Template)
	}
	if scale := o.Template.Scale; scale > 0 {
		o.Template.Lease = time.Duration(float64(o.Template.Lease) / scale)
	}
	settings := []string{
		"kvConnector: " + f.connector, "budget: " + soakBudget.String(), soakRetries,
		"prefill: {timeout: 700ms, connectTimeout: 300ms}", "breaker: {failures: 5, openFor: 300ms}",
	}
	if f.config != "" {
		settings = append(settings, f.config)
	}
	s := &soak{
		margin: margin, flavour: f, fates: map[string]*fate{}, kills: map[string][]time.Time{}, seen: map[string]*director.Record{}, began: time.Now(),
		stack: newStack(t, stackOptions{noEnvoy: true, pool: o, config: "disaggregation: {" + strings.Join(settings, ", ") + "}\n"}),
	}
	for _, mode := range []gatewaytest.Options{
		{Request: gatewaytest.Duplex}, {Request: gatewaytest.Buffered}, {Request: gatewaytest.Duplex, Response: gatewaytest.Duplex},
	} {
		mode.Picker = s.app.Addr().String()
		g, err := gatewaytest.New(mode)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = g.Close() })
		s.gateways = append(s.gateways, g)
	}
	for i := range 12 {
		body := fmt.Sprintf(`{"model":"tiny","max_tokens":%d,"temperature":0,"stream":%v,"messages":[{"role":"user","content":"%s"}]}`,
			2+i%4, i%2 == 0, strings.Repeat(fmt.Sprintf("w%d ", i), 20+i*20))
		s.prompts = append(s.prompts, prompt{body, reference(t, "/v1/chat/completions", body)})
	}
	return s
}

// run works for d, then checks what is left.
func (s *soak) run(d time.Duration) {
	s.follow()
	eventually(s.t, "every endpoint scraped", func() bool { // over connections that stay, as do their goroutines
		return !slices.ContainsFunc(s.app.Snapshot().Endpoints, func(e *pool.Endpoint) bool { return !e.Metrics().Fresh(time.Now()) })
	})
	before := s.quiet()
	ctx, stop := context.WithTimeout(s.t.Context(), d)
	defer stop()
	var clients, chaos sync.WaitGroup
	for i := range soakWorkers {
		clients.Go(func() { s.client(ctx, rand.New(rand.NewPCG(uint64(i), 1))) })
	}
	chaos.Go(func() { s.chaos(ctx, rand.New(rand.NewPCG(99, 1))) })
	clients.Wait()
	chaos.Wait()
	s.heal()
	s.left(before)
	s.fatesHold()
	s.t.Logf("%s: %d requests, %v attempts, %v retries, %v fallbacks, %v leaked", s.flavour.name, s.requests.Load(),
		s.sum("baton_sidecar_attempts_total", "prefill"), s.sum("baton_sidecar_retries_total"),
		s.sum("baton_sidecar_fallbacks_total"), s.sum("baton_sidecar_leaked_prefill_total"))
}

// follow collects the record of every request.
func (s *soak) follow() {
	records, stop, ok := s.app.decisions.follow()
	if !ok {
		s.t.Fatal("no place for a follower")
	}
	done := make(chan struct{})
	var reading sync.WaitGroup
	reading.Go(func() {
		for {
			select {
			case r := <-records:
				s.mu.Lock()
				s.seen[r.RequestID] = r
				s.mu.Unlock()
			case <-done:
				return
			}
		}
	})
	s.t.Cleanup(func() {
		stop()
		close(done)
		reading.Wait()
	})
}

// client sends requests one after the other.
func (s *soak) client(ctx context.Context, rng *rand.Rand) {
	for ctx.Err() == nil {
		n := s.requests.Add(1)
		id := fmt.Sprintf("%s-%d", s.flavour.name, n)
		p := s.prompts[rng.IntN(len(s.prompts))]
		f := &fate{start: time.Now(), left: rng.IntN(50) == 0}
		alone := context.WithoutCancel(ctx) // the end of the soak cuts no request
		own, cancel := context.WithTimeout(alone, 20*time.Second)
		if f.left {
			cancel()
			own, cancel = context.WithTimeout(alone, time.Duration(rng.IntN(25))*time.Millisecond)
		}
		f.reply, f.err = s.gateways[rng.IntN(len(s.gateways))].Do(own, "/v1/chat/completions", []byte(p.body), "x-request-id", id)
		cancel()
		f.end = time.Now()
		s.judge(id, p, f)
		s.mu.Lock()
		s.fates[id] = f
		s.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(rng.IntN(20)) * time.Millisecond):
		}
	}
}

// judge checks one answer.
func (s *soak) judge(id string, p prompt, f *fate) {
	// The budget is for what is held here, which the records tell exactly (see fatesHold). Decode engines whose blocks
	// never come, since the prefill engine died with them, wait for a timer of their own.
	limit := soakBudget + s.margin
	if s.flavour.Claims && !s.flavour.EndsDecode {
		limit += engineTimers
	}
	if took := f.end.Sub(f.start); took > limit {
		s.t.Errorf("%s: answered after %v, the limit is %v", id, took, limit)
	}
	if f.err != nil {
		if !f.left || !errors.Is(f.err, context.DeadlineExceeded) && !errors.Is(f.err, context.Canceled) {
			s.t.Errorf("%s: not answered: %v", id, f.err)
		}
		return
	}
	switch {
	case f.reply.Cut:
	case f.reply.Status == 200:
		if strings.Contains(string(f.reply.Body), `"error"`) {
			f.broken = true // the engine says so in a stream that had begun: its pull failed
			return
		}
		if text := answerText(s.t, f.reply.Body); text != p.text {
			s.t.Errorf("%s: answer %q from %s, want %q", id, text, f.reply.Destination, p.text)
		}
	case f.reply.Status < 500 && f.reply.Status != 429:
		s.t.Errorf("%s: status %d: %.200s", id, f.reply.Status, f.reply.Body)
	}
}

// soakFaults are what goes wrong at prefill endpoints, some of the time.
func soakFaults() []simulate.Fault {
	return []simulate.Fault{
		{Phase: "prefill", Kind: "status", Status: 503, Probability: .01},
		{Phase: "prefill", Kind: "hang", Probability: .005},
		{Phase: "prefill", Kind: "reset_before_headers", Probability: .01},
		{Phase: "prefill", Kind: "reset_mid_stream", Probability: .005},
		{Phase: "prefill", Kind: "status", Status: 429, Probability: .01},
		{Phase: "prefill", Kind: "status", Status: 400, Probability: .005},
		{Phase: "prefill", Kind: "status", Status: 200, Body: "<html>", Probability: .005},
		{Phase: "prefill", Kind: "delay", DelayMS: 50, Probability: .02},
		{Phase: "prefill", Kind: "delay", DelayMS: 900, Probability: .003},
		{Phase: "prefill", Kind: "odd_handle", Probability: .02},
		{Phase: "prefill", Kind: "slow_body", BytesPerSecond: 4000, Probability: .005},
	}
}

// chaos breaks one engine of a role after the other; another of the role stays whole.
func (s *soak) chaos(ctx context.Context, rng *rand.Rand) {
	for _, e := range s.engines("prefill") {
		if err := e.SetFaults(simulate.Faults{Rules: soakFaults()}); err != nil { //nolint:contextcheck // binding a loopback port waits for nothing
			s.t.Error(err)
		}
	}
	for ctx.Err() == nil {
		role := []string{"prefill", "decode"}[rng.IntN(2)]
		engines := s.engines(role)
		e := engines[rng.IntN(len(engines))]
		s.note(e)
		e.Kill()
		down := time.Duration(rng.IntN(200)) * time.Millisecond
		select {
		case <-ctx.Done():
		case <-time.After(down):
		}
		if err := e.Restart(); err != nil { //nolint:contextcheck // as above
			s.t.Errorf("%s: %v", e.Name(), err)
		}
		s.note(e)
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(300+rng.IntN(1200)) * time.Millisecond):
		}
	}
}

func (s *soak) note(e *simulate.Engine) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kills[e.Addr().String()] = append(s.kills[e.Addr().String()], time.Now())
	s.kills[e.Name()] = s.kills[e.Addr().String()]
}

func (s *soak) heal() {
	for _, e := range s.pool.Engines() {
		if err := e.SetFaults(simulate.Faults{}); err != nil {
			s.t.Error(err)
		}
	}
}

// quiet waits until nothing happens and counts goroutines.
func (s *soak) quiet() int {
	n := runtime.NumGoroutine()
	for calm := 0; calm < 5; {
		time.Sleep(20 * time.Millisecond)
		if now := runtime.NumGoroutine(); now == n {
			calm++
		} else {
			n, calm = now, 0
		}
	}
	return n
}

// left asserts that nothing is left of the requests.
func (s *soak) left(goroutines int) {
	eventually(s.t, "no stream left", func() bool { return s.app.server.Streams() == 0 })
	eventually(s.t, "no sub-request in flight", func() bool { return s.sum("baton_sidecar_in_flight") == 0 })
	eventually(s.t, "no load left", func() bool { return s.load("") == 0 })
	eventually(s.t, "no byte held", func() bool {
		return s.sum("baton_admission_held_bytes")+s.sum("baton_sidecar_held_bytes") == 0
	})
	eventually(s.t, "no KV block held", func() bool {
		return !slices.ContainsFunc(s.pool.Engines(), func(e *simulate.Engine) bool { return len(e.Held()) > 0 })
	})
	for _, g := range s.gateways {
		_ = g.Close()
	}
	// Connections that wait for their next request have goroutines on either side for some seconds.
	for end := time.Now().Add(30 * time.Second); runtime.NumGoroutine() > goroutines; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			var dump strings.Builder
			_ = pprof.Lookup("goroutine").WriteTo(&dump, 1) // a builder never fails
			s.t.Fatalf("%d goroutines, %d before: %.8000s", runtime.NumGoroutine(), goroutines, dump.String())
		}
	}
	for _, e := range s.pool.Engines() {
		for _, d := range e.Deaths() {
			if d.Reason != "fault" {
				s.t.Errorf("engine %s died: %+v", e.Name(), d)
			}
		}
	}
	// docs/design.md 3.4: what requests earn, what comes with time, and what was there at first.
	bound := .2*float64(s.requests.Load()) + 3*time.Since(s.began).Seconds() + 30
	if n := s.sum("baton_sidecar_retries_total"); n > bound {
		s.t.Errorf("%v retries of %d requests, the budget allows %.0f", n, s.requests.Load(), bound)
	}
}

// fatesHold asserts, request by request, that a leak was counted if and only if it happened. What nobody outside of the
// engines can know is left open: whether a decode engine that died, or whose client left, had the request and read the
// blocks; what a prefill engine that died had held; and whether a prefill was finished whose answer never came or did not
// say.
func (s *soak) fatesHold() {
	s.mu.Lock()
	for id, rec := range s.seen {
		if held := time.Duration(rec.Seconds.Decision * float64(time.Second)); held > soakBudget+s.margin {
			s.t.Errorf("%s: held for %v, the budget is %v", id, held, soakBudget)
		}
	}
	s.mu.Unlock()
	if s.flavour.NeedsDecode {
		return // a receiver's buffer that decode did not need, having the prompt in its own cache, waits for its timer
	}
	leaked, what := map[string]bool{}, map[string]simulate.Leak{}
	for _, e := range s.pool.Engines() {
		for _, l := range e.Leaked() {
			leaked[clientID(l.RequestID)], what[clientID(l.RequestID)] = true, l
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.seen) < len(s.fates)*9/10 {
		s.t.Errorf("%d records of %d requests", len(s.seen), len(s.fates))
	}
	for id, f := range s.fates {
		rec := s.seen[id]
		if rec == nil {
			continue // a follower that did not keep up
		}
		counted := rec.Leaked != ""
		switch {
		case counted == leaked[id]:
		case leaked[id] && (f.err != nil || s.killed(f.destination(), f, 100*time.Millisecond) || f.reply != nil && f.reply.Status >= 500 || f.cut() || f.broken || unsaid(rec)):
		case counted && s.killedAny(rec, f):
		default:
			s.t.Errorf("%s: leaked %v, counted %q; outcome %q, status %d, attempts %+v, error %v, leak %+v", id, leaked[id], rec.Leaked, rec.Outcome, rec.Status, rec.Attempts, f.err, what[id])
		}
	}
}

// clientID takes the engine's prefix off a request id.
func clientID(id string) string {
	_, rest, ok := strings.Cut(id, "cmpl-")
	if ok {
		return rest
	}
	return id
}

func (f *fate) cut() bool { return f.reply != nil && f.reply.Cut }

func (f *fate) destination() string {
	if f.reply == nil {
		return ""
	}
	return f.reply.Destination
}

// killed reports whether the engine died while the request was there, or some time after its end.
func (s *soak) killed(engine string, f *fate, after time.Duration) bool {
	return slices.ContainsFunc(s.kills[engine], func(at time.Time) bool {
		return at.After(f.start.Add(-50*time.Millisecond)) && at.Before(f.end.Add(after))
	})
}

// killedAny reports whether an engine that prefilled for the request died, or the decode one where the client left.
func (s *soak) killedAny(rec *director.Record, f *fate) bool {
	for _, a := range rec.Attempts {
		_, name, _ := strings.Cut(a.Endpoint, "/")
		if s.killed(name, f, soakLease+time.Second) { // its leases with it
			return true
		}
	}
	return false
}

// unsaid reports whether an attempt ended without an answer, or with one from which nobody can tell what is held.
func unsaid(rec *director.Record) bool {
	return slices.ContainsFunc(rec.Attempts, func(a director.AttemptRecord) bool {
		return slices.Contains([]string{"malformed", "handle_missing", "engine_error", "reset", "timeout", "canceled", "budget"}, a.Reason)
	})
}
