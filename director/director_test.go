// SPDX-License-Identifier: Apache-2.0

package director

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/filters"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pickers"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/scorers"
	"github.com/baton-epp/baton/sidecar"
)

// scripted stands for the orchestrator: a prefill that takes place in the test.
type scripted struct {
	outcome   sidecar.Outcome
	err       error
	after     bool
	during    func(j *sidecar.Job)
	forwarded []string
	abandoned []string
	keepsLoad bool
	left      []bool // what Leave was told of the response: unseen
	settled   func(out *sidecar.Outcome) error
	traced    trace.SpanContext
}

func (s *scripted) Mode() string                     { return "orchestrate" }
func (s *scripted) Rank() int                        { return 3 }
func (s *scripted) DecodeAfter() bool                { return s.after }
func (s *scripted) NeedsPrefill(*pool.Endpoint) bool { return false }
func (s *scripted) Encodes() bool                    { return false }
func (s *scripted) Pulls() bool                      { return false }
func (s *scripted) EndsDecode(*sidecar.Outcome) bool { return false }

func (s *scripted) Settle(_ context.Context, _ *sidecar.Job, out *sidecar.Outcome) error {
	return s.settled(out)
}

func (s *scripted) Leave(_ *sidecar.Job, _ *sidecar.Outcome, unseen bool) {
	s.left = append(s.left, unseen)
}

func (s *scripted) Run(ctx context.Context, j *sidecar.Job) (*sidecar.Outcome, error) {
	s.traced = trace.SpanContextFromContext(ctx)
	if !s.keepsLoad {
		j.PrefillLoad.Release()
	}
	if s.during != nil {
		s.during(j)
	}
	return &s.outcome, s.err
}

func (s *scripted) Forward(_ context.Context, _ *sidecar.Job, _ *sidecar.Outcome, decode *pool.Endpoint) error {
	s.forwarded = append(s.forwarded, decode.Name)
	return nil
}
func (s *scripted) Transferred(context.Context, *sidecar.Outcome, *pool.Endpoint, bool) {}
func (s *scripted) Abandon(_ context.Context, _ *sidecar.Job, _ *sidecar.Outcome, reason string) {
	s.abandoned = append(s.abandoned, reason)
}

const pd = `
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: disagg-profile-handler, parameters: {deciders: {prefill: always-disagg-pd-decider}}}
- {type: always-disagg-pd-decider}
- {type: prefill-filter}
- {type: decode-filter}
- {type: active-request-scorer}
- {type: max-score-picker, parameters: {maxNumOfEndpoints: 2}}
schedulingProfiles:
- name: prefill
  plugins: [{pluginRef: prefill-filter}, {pluginRef: active-request-scorer}, {pluginRef: max-score-picker}]
- name: decode
  plugins: [{pluginRef: decode-filter}, {pluginRef: active-request-scorer}, {pluginRef: max-score-picker}]
`

// bench is a director over a pool that the test may change.
type bench struct {
	d        *Director
	snapshot *pool.Snapshot
	o        *scripted
	records  []*Record
}

func newBench(t *testing.T, o *scripted) *bench {
	t.Helper()
	b := &bench{o: o, snapshot: pooltest.Snapshot(
		pooltest.E("p0").Role("prefill"), pooltest.E("d0").Role("decode"), pooltest.E("d1").Role("decode").InFlight(1), pooltest.E("d2").Role("decode").InFlight(1, 1),
	)}
	c, err := config.Load("test.yaml", []byte(pd))
	if err != nil {
		t.Fatal(err)
	}
	s, err := scheduler.New(scheduler.Options{
		Config: c, Metrics: prometheus.NewRegistry(), Plugins: []scheduler.Registry{scorers.Registry(), filters.Registry(), pickers.Registry()},
	})
	if err != nil {
		t.Fatal(err)
	}
	b.d, err = New(Options{
		Scheduler: func() Scheduler { return s }, Snapshot: func() *pool.Snapshot { return b.snapshot }, Orchestrator: o,
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(), Record: func(r *Record) { b.records = append(b.records, r) },
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// without is the pool less some endpoints.
func (b *bench) without(names ...string) {
	var kept []*pool.Endpoint
	for _, e := range b.snapshot.Endpoints {
		if !strings.Contains(strings.Join(names, " "), e.Name) {
			kept = append(kept, e)
		}
	}
	b.snapshot = pool.NewSnapshot(b.snapshot.Generation+1, true, kept)
}

func (b *bench) run(t *testing.T) (*Exchange, *Answer, error) {
	t.Helper()
	var body inference.Body
	body.Append([]byte(`{"model":"m","messages":[{"role":"user","content":"hello"}]}`))
	x, err := b.d.Begin(&Incoming{
		Headers: inference.Headers{{Name: ":path", Value: "/v1/chat/completions"}, {Name: ":method", Value: "POST"}, {Name: "x-request-id", Value: "r"}},
		Body:    body, HasBody: true, Start: time.Now(),
	})
	if err != nil {
		return nil, nil, err
	}
	a, err := x.Run(t.Context())
	return x, a, err
}

func prefilled(b *bench) sidecar.Outcome {
	return sidecar.Outcome{Name: "disaggregated", HasHandle: true, Prefiller: b.snapshot.Endpoints[0], Checkpoint: sidecar.PrefillComplete}
}

func TestDecodeThatVanishedIsReplaced(t *testing.T) { // docs/design.md 3.4, 3.5
	for _, c := range []struct {
		name    string
		gone    []string
		after   bool
		want    string // "" = no endpoint
		abandon bool
	}{
		{"stays", nil, false, "d0", false},
		{"next ranked", []string{"d0"}, false, "d1", false},
		{"last ranked", []string{"d0", "d1"}, false, "d2", false},
		{"none left", []string{"d0", "d1", "d2"}, false, "", true},
		{"picked after prefill", nil, true, "d0", false},
		{"picked after prefill, one gone", []string{"d0"}, true, "d1", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := &scripted{after: c.after}
			b := newBench(t, o)
			o.outcome = prefilled(b)
			o.during = func(*sidecar.Job) { b.without(c.gone...) }
			before := loads(b.snapshot)
			x, a, err := b.run(t)
			if c.want == "" {
				if !errors.Is(err, scheduler.ErrNoCandidate) || len(o.forwarded) != 0 {
					t.Errorf("error %v, forwarded %v", err, o.forwarded)
				}
			} else if err != nil || o.forwarded[0] != c.want || !strings.HasPrefix(a.Destination, x.decode.Hostport) {
				t.Fatalf("error %v, forwarded %v, want %s", err, o.forwarded, c.want)
			}
			if (len(o.abandoned) > 0) != c.abandon {
				t.Errorf("abandoned %v", o.abandoned)
			}
			x.Done(EndSeen)
			x.Done(EndSeen)
			if after := loads(b.snapshot); c.gone == nil && after != before {
				t.Errorf("load before %s, after %s", before, after)
			}
		})
	}
}

func loads(s *pool.Snapshot) string {
	var out strings.Builder
	for _, e := range s.Endpoints {
		fmt.Fprintf(&out, "%s:%d/%d ", e.Name, e.Load.Requests(), e.Load.Tokens())
	}
	return out.String()
}

func TestHandleNamesOneDestination(t *testing.T) { // docs/design.md 3.3
	o := &scripted{}
	b := newBench(t, o)
	o.outcome = sidecar.Outcome{Name: "aggregated"}
	_, a, err := b.run(t)
	if err != nil || strings.Count(a.Destination, ",") != 1 {
		t.Fatalf("without a handle maxNumOfEndpoints counts: %v, %+v", err, a)
	}
	o.outcome = prefilled(b)
	if _, a, err = b.run(t); err != nil || strings.Contains(a.Destination, ",") {
		t.Errorf("a handle with a fallback list: %v, %+v", err, a)
	}
}

func TestHandleNeverGoesToItsOwnPrefiller(t *testing.T) {
	o := &scripted{}
	b := newBench(t, o)
	o.outcome = prefilled(b)
	o.outcome.Prefiller = b.snapshot.Endpoints[1] // d0, which is ranked first for decode
	o.during = func(*sidecar.Job) { b.without("p0") }
	if _, _, err := b.run(t); err != nil || o.forwarded[0] != "d1" {
		t.Errorf("error %v, forwarded %v", err, o.forwarded)
	}
}

func TestDecodeThatStoppedAnsweringIsReplaced(t *testing.T) { // readiness changes no snapshot
	o := &scripted{}
	b := newBench(t, o)
	o.outcome = prefilled(b)
	o.outcome.Attempts = make([]sidecar.Attempt, 1)
	o.during = func(j *sidecar.Job) { j.Decode.Health.SetReady(false) }
	if _, _, err := b.run(t); err != nil || o.forwarded[0] != "d1" {
		t.Errorf("error %v, forwarded %v", err, o.forwarded)
	}
}

func TestAnswerThatCouldNotBeSentIsALeak(t *testing.T) {
	o := &scripted{}
	b := newBench(t, o)
	o.outcome = prefilled(b)
	x, _, err := b.run(t)
	if err != nil {
		t.Fatal(err)
	}
	x.Done(EndUnanswered)
	if len(o.abandoned) != 1 || o.abandoned[0] != "not_sent" {
		t.Errorf("abandoned %v", o.abandoned)
	}
}

func TestClientGoneAfterPrefillIsAbandoned(t *testing.T) {
	o := &scripted{}
	b := newBench(t, o)
	o.outcome = prefilled(b)
	var body inference.Body
	body.Append([]byte(`{"model":"m","prompt":"x"}`))
	x, err := b.d.Begin(&Incoming{Headers: inference.Headers{{Name: ":path", Value: "/v1/completions"}, {Name: ":method", Value: "POST"}}, Body: body, HasBody: true, Start: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	o.during = func(*sidecar.Job) { cancel() }
	if _, err := x.Run(ctx); !errors.Is(err, context.Canceled) || len(o.abandoned) != 1 || len(o.forwarded) != 0 {
		t.Errorf("error %v, abandoned %v, forwarded %v", err, o.abandoned, o.forwarded)
	}
}

func TestRefusalsAreRecorded(t *testing.T) {
	b := newBench(t, &scripted{})
	b.without("d0", "d1", "d2")
	if _, _, err := b.run(t); !errors.Is(err, scheduler.ErrNoCandidate) {
		t.Fatalf("got %v", err)
	}
	if len(b.records) != 1 || !strings.Contains(b.records[0].Error, "decode-filter") || b.records[0].RequestID != "r" {
		t.Errorf("records %+v", b.records)
	}
	if n := testutil.CollectAndCount(b.d.metrics.errors); n != 1 {
		t.Errorf("%d error series", n)
	}
}

func TestModelLabelsAreBounded(t *testing.T) {
	m := newMetrics(prometheus.NewRegistry(), "")
	for i := range maxModels + 50 {
		m.began(&inference.Request{Model: fmt.Sprint("model-", i)})
	}
	if n := testutil.CollectAndCount(m.requests); n > maxModels+1 {
		t.Errorf("%d series for client-chosen names, want at most %d", n, maxModels+1)
	}
	for _, c := range []struct{ in, want string }{
		{"tiny", "tiny"}, {"a\nb\x00", "a_b_"}, {"bad\xff", "bad_"}, {strings.Repeat("x", 200), strings.Repeat("x", 128)},
	} {
		if got := printable(c.in); got != c.want {
			t.Errorf("printable(%q) = %q", c.in, got)
		}
	}
}

func TestPredictedDecode(t *testing.T) {
	d := &Director{}
	if got := d.predictedDecode(&inference.Request{MaxTokens: 100}); got != 0 {
		t.Errorf("before anything was learned: %v", got)
	}
	now := time.Now()
	d.learn(&Exchange{firstByte: now.Add(-time.Second), usage: inference.Usage{Seen: true, CompletionTokens: 100}}, now)
	if got := d.predictedDecode(&inference.Request{MaxTokens: 300}).Round(time.Millisecond); got != 3*time.Second {
		t.Errorf("300 tokens at 10 ms: %v", got)
	}
}

func TestRequestSpan(t *testing.T) {
	recorder := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder))
	o := &scripted{}
	b := newBench(t, o)
	b.d.opts.Tracer = provider.Tracer("test")
	o.outcome = prefilled(b)
	var body inference.Body
	body.Append([]byte(`{"model":"m","prompt":"x"}`))
	x, err := b.d.Begin(&Incoming{Headers: inference.Headers{
		{Name: ":path", Value: "/v1/completions"},
		{Name: ":method", Value: "POST"},
		{Name: "traceparent", Value: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
	}, Body: body, HasBody: true, Start: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := x.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	x.Done(EndSeen)
	spans := recorder.Ended()
	if len(spans) != 1 || spans[0].Name() != spanName || spans[0].Parent().SpanID().String() != "b7ad6b7169203331" {
		t.Errorf("spans %+v", spans)
	}
	if o.traced.TraceID().String() != "0af7651916cd43dd8448eb211c80319c" {
		t.Errorf("the orchestrator ran in trace %s", o.traced.TraceID())
	}
}

func TestMissingCollaborators(t *testing.T) {
	_, err := New(Options{})
	for _, want := range []string{"Scheduler", "Snapshot", "Orchestrator", "Logger", "Registerer"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error lacks %s: %v", want, err)
		}
	}
}
