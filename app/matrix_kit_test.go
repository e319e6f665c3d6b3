// SPDX-License-Identifier: Apache-2.0

package app

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	procv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"

	"github.com/baton-epp/baton/internal/gatewaytest"
	"github.com/baton-epp/baton/sidecar/connectors"
	"github.com/baton-epp/baton/simulate"
)

// flavour is a column of the failure matrix: one wire between simulated engines.
type flavour struct {
	name      string
	connector string // disaggregation.kvConnector
	config    string // further settings of disaggregation
	engine    func(o *simulate.Options)
	connectors.Traits
}

// atOnce reports whether decode is sent while prefill runs.
func (f *flavour) atOnce() bool {
	return f.Shape == connectors.Rendezvous || strings.Contains(f.config, "parallelLegs: true")
}

// blind reports whether nothing travels from prefill to decode through us.
func (f *flavour) blind() bool { return !f.Claims && !f.NeedsDecode }

func flavours(t *testing.T) []*flavour {
	t.Helper()
	vllm := func(connector string) func(*simulate.Options) {
		return func(o *simulate.Options) { o.Connector = connector }
	}
	engine := func(name string) func(*simulate.Options) {
		return func(o *simulate.Options) { o.Engine = name }
	}
	offloading := func(o *simulate.Options) {
		o.Connector, o.LoadFailurePolicy = "offloading", "recompute"
		o.Scale = .1 // decode waits 30 s for blocks that never come
	}
	all := []*flavour{
		{name: "nixlv2", connector: "nixlv2"},
		{name: "nixlv2-push", connector: "nixlv2", engine: vllm("nixl-push")},
		{name: "shared-storage", connector: "shared-storage", engine: vllm("shared-storage")},
		{name: "lmcache-pd", connector: "lmcache-pd", engine: vllm("lmcache-pd")},
		{name: "offloading", connector: "offloading", engine: offloading},
		{name: "offloading-parallel", connector: "offloading", config: "parallelLegs: true", engine: offloading},
		{name: "mooncake", connector: "mooncake", engine: vllm("mooncake")},
		{name: "sglang", connector: "sglang", engine: engine("sglang")},
		{name: "trtllm", connector: "trtllm", engine: engine("trtllm")},
		{name: "moriio", connector: "moriio", engine: vllm("moriio")},
	}
	for _, f := range all {
		var err error
		if _, f.Traits, err = connectors.Lookup(f.connector); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// scenario is one cell of the matrix while it runs.
type scenario struct {
	*stack
	flavour  *flavour
	gateway  *gatewaytest.Gateway
	mode     procv3.ProcessingMode_BodySendMode
	streamed bool
	id       string // x-request-id of the request
	path     string
	body     string
	want     string // the answer's text when nothing is broken
	last     *gatewaytest.Reply
	calls    atomic.Int64       // of the spy
	leave    context.CancelFunc // of the client that the row's spy makes leave
	left     chan struct{}      // closed when it has
}

// want is what a row expects.
type want struct {
	status  int
	outcome string // x-baton-outcome; "" where the picker answers by itself
	// orOutcome is what the header says where it went out, with the head of a stream, before the prefill failed.
	orOutcome string
	served    bool     // the prefill had done its work when it failed: orOutcome may stand over a whole answer, too
	reasons   []string // of the attempts before decode, in order; nil where nobody was to be asked
	// or holds further possibilities: with both legs at once, an early failure may come before or after decode was sent.
	or      []want
	dropped string // x-llm-d-request-dropped-reason
	leaks   int    // prefills that the picker counts as leaked
	expired int    // of the engines: prefills that nobody came for; -1 = as leaks, -2 = 0 or 1
	cut     bool
}

const matrixTimeout = 20 * time.Second

// newScenario starts two prefill and two decode engines of a flavour, the picker, and a gateway.
func newScenario(t *testing.T, f *flavour, r *row, mode procv3.ProcessingMode_BodySendMode, streamed bool) *scenario {
	t.Helper()
	o := fast(2, 2)
	// Long enough for a slow machine where a decode leg comes, short where none does.
	o.Template.Lease = 20 * time.Second
	if r.leaky {
		o.Template.Lease = time.Second
	}
	if f.engine != nil {
		f.engine(&o.Template)
	}
	if r.engine != nil {
		r.engine(&o.Template)
	}
	if scale := o.Template.Scale; scale > 0 { // leases and delays are meant as they are written
		o.Template.Lease = time.Duration(float64(o.Template.Lease) / scale)
		for i := range r.faults {
			r.faults[i].DelayMS = int(float64(r.faults[i].DelayMS) / scale)
		}
	}
	settings := []string{"kvConnector: " + f.connector, "prefill: {timeout: " + cmp.Or(r.timeout, "10s") + "}", "holdResponse: 4s"}
	for _, more := range []string{f.config, r.config} {
		if more != "" {
			settings = append(settings, more)
		}
	}
	sc := &scenario{flavour: f, mode: mode, streamed: streamed, id: "r", path: "/v1/chat/completions"}
	var spied func()
	if r.spy != nil {
		spied = func() {
			if sc.calls.Add(1) == int64(r.spyAt) {
				r.spy(sc)
			}
		}
	}
	sc.stack = newStack(t, stackOptions{
		noEnvoy: true, pool: o, spy: spied,
		config: "disaggregation: {" + strings.Join(settings, ", ") + "}\n" + r.sections,
	})
	sc.body = chatBody(100, fmt.Sprintf(`,"temperature":0,"stream":%v`, streamed))
	sc.want = reference(t, sc.path, sc.body)
	var err error
	sc.gateway, err = gatewaytest.New(gatewaytest.Options{
		Picker: sc.app.Addr().String(), Request: mode, Response: gatewaytest.None,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sc.gateway.Close() })
	return sc
}

// do sends the scenario's request.
func (s *scenario) do(ctx context.Context) (*gatewaytest.Reply, error) {
	ctx, cancel := context.WithTimeout(ctx, matrixTimeout)
	defer cancel()
	return s.gateway.Do(ctx, s.path, []byte(s.body), "x-request-id", s.id)
}

// reference is what an engine that nobody disturbs answers: the simulated engines answer by the prompt alone.
func reference(t *testing.T, path, body string) string {
	t.Helper()
	e, err := simulate.New(simulate.Options{PrefillFixed: -1, PrefillPerToken: -1, InterToken: -1})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = e.Close() }()
	resp, err := http.Post(e.URL()+path, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	status := resp.StatusCode
	if err != nil || status != 200 {
		t.Fatalf("reference engine: %d %s", status, text)
	}
	return answerText(t, text)
}

// answerText is what an answer says, streamed or not.
func answerText(t *testing.T, body []byte) string {
	t.Helper()
	type choice struct {
		Text    string
		Message struct{ Content string }
		Delta   struct{ Content string }
	}
	type object struct {
		Text    string
		Choices []choice
	}
	var out strings.Builder
	add := func(raw []byte) {
		var o object
		if err := json.Unmarshal(raw, &o); err != nil {
			t.Fatalf("answer %q: %v", raw, err)
		}
		out.WriteString(o.Text)
		for _, c := range o.Choices {
			out.WriteString(c.Text + c.Message.Content + c.Delta.Content)
		}
	}
	if !bytes.HasPrefix(body, []byte("data:")) {
		add(body)
		return out.String()
	}
	for line := range bytes.SplitSeq(body, []byte("\n")) {
		if raw, ok := bytes.CutPrefix(line, []byte("data: ")); ok && !bytes.Equal(raw, []byte("[DONE]")) {
			add(raw)
		}
	}
	return out.String()
}

// check compares what came with what the row wants, and asserts that nothing is left.
func (s *scenario) check(r *gatewaytest.Reply, err error, w want) {
	s.t.Helper()
	if err != nil {
		s.t.Fatalf("the request was not answered: %v", err)
	}
	var reasons []string
	if w.reasons != nil || w.or != nil {
		reasons = s.reasons()
	}
	if n := len(reasons); s.flavour.atOnce() && r.Status == 200 && n > 0 && reasons[n-1] == "canceled" {
		reasons[n-1] = "ok" // either may be over first; a prefill that decode does not wait for any more is cancelled
	}
	for _, other := range w.or {
		if other.status == r.Status && slices.Equal(other.reasons, reasons) {
			w = other
		}
	}
	outcome := r.Header.Get("x-baton-outcome")
	if r.Status != w.status || outcome != w.outcome && (w.orOutcome == "" || outcome != w.orOutcome || !s.streamed && !w.served) || !slices.Equal(reasons, w.reasons) {
		s.t.Errorf("status %d, outcome %q, attempts %v: want %d, %q, %v; body %.300s", r.Status, outcome, reasons, w.status, w.outcome, w.reasons, r.Body)
	}
	if got := r.Header.Get("x-llm-d-request-dropped-reason"); got != w.dropped {
		s.t.Errorf("dropped reason %q, want %q", got, w.dropped)
	}
	switch {
	case r.Status == 200 && !w.cut:
		if text := answerText(s.t, r.Body); text != s.want {
			s.t.Errorf("answer %q, want %q", text, s.want)
		}
	case r.Immediate && !json.Valid(r.Body):
		s.t.Errorf("error body is no JSON: %q", r.Body)
	}
	if r.Cut != w.cut {
		s.t.Errorf("answer cut off: %v, want %v", r.Cut, w.cut)
	}
	s.leftWith(w)
	if s.t.Failed() {
		record, _ := json.Marshal(s.decision(s.id))
		s.t.Logf("decision: %s", record)
	}
}

// reasons are how the attempts before decode ended, in order.
func (s *scenario) reasons() []string {
	var out []string
	for _, a := range s.decision(s.id).Attempts {
		if a.Phase == "prefill" {
			out = append(out, a.Reason)
		}
	}
	return out
}

// leftWith asserts that nothing is left but w's leaks.
func (s *scenario) leftWith(w want) {
	s.t.Helper()
	expired := w.expired
	if expired == -1 {
		expired = w.leaks
	}
	eventually(s.t, "no stream left", func() bool { return s.app.server.Streams() == 0 })
	eventually(s.t, "no load left", func() bool { return s.load("") == 0 })
	if n := s.sum("baton_admission_held_bytes") + s.sum("baton_sidecar_held_bytes"); n != 0 {
		s.t.Errorf("%v bytes still held", n)
	}
	eventually(s.t, "no sub-request in flight", func() bool { return s.sum("baton_sidecar_in_flight") == 0 })
	eventually(s.t, "no KV block held", func() bool {
		for _, e := range s.pool.Engines() {
			if len(e.Held()) > 0 {
				return false
			}
		}
		return true
	})
	lost := 0
	var left []simulate.Leak
	for _, e := range s.pool.Engines() {
		lost += len(e.Leaked())
		left = append(left, e.Leaked()...)
		for _, d := range e.Deaths() {
			if d.Reason != "fault" {
				s.t.Errorf("engine %s died: %+v", e.Name(), d)
			}
		}
	}
	if expired == -2 {
		expired = min(lost, 1)
	}
	if counted := s.sum("baton_sidecar_leaked_prefill_total"); lost != expired || int(counted) != w.leaks {
		s.t.Errorf("engines lost %d prefills, want %d; the picker counted %v, want %d; lost: %+v", lost, expired, counted, w.leaks, left)
	}
}
