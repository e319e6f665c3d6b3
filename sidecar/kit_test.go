// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/internal/leaktest"
	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/simulate"
)

// TestMain fails the package when goroutines outlive its tests.
func TestMain(m *testing.M) { os.Exit(leaktest.Run(m)) }

const (
	completionsPath = "/v1/completions"
	// clientBody is long enough for some blocks of a simulated engine.
	clientBody = `{"model":"tiny","prompt":"one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen","max_tokens":4,"seed":9007199254740993}`
	goodHandle = `{"do_remote_prefill":true,"remote_block_ids":[[1]],"remote_engine_id":"e","remote_request_id":"r",` +
		`"remote_host":"127.0.0.1","remote_port":5600,"remote_num_tokens":77,"big":18446744073709551617}`
	goodAnswer = `{"choices":[{"finish_reason":"length"}],"usage":{"prompt_tokens":70},"kv_transfer_params":` + goodHandle + `}`
)

// rig is an orchestrator over a pool of endpoints that tests make.
type rig struct {
	*Orchestrator
	t        testing.TB
	reg      *prometheus.Registry
	snapshot atomic.Pointer[pool.Snapshot]
	all      []*pool.Endpoint
}

func newRig(tb testing.TB, change func(*config.Disaggregation)) *rig {
	tb.Helper()
	r := &rig{t: tb, reg: prometheus.NewRegistry()}
	r.publish()
	c := config.Default().Disaggregation
	if change != nil {
		change(&c)
	}
	o, err := New(Options{Config: c, Registerer: r.reg, Snapshot: r.snapshot.Load})
	if err != nil {
		tb.Fatal(err)
	}
	r.Orchestrator = o
	tb.Cleanup(o.Close)
	return r
}

func (r *rig) publish() {
	gen := uint64(1)
	if s := r.snapshot.Load(); s != nil {
		gen = s.Generation + 1
	}
	r.snapshot.Store(pool.NewSnapshot(gen, true, append([]*pool.Endpoint(nil), r.all...)))
}

// add puts an endpoint into the pool.
func (r *rig) add(name, role, addr string) *pool.Endpoint {
	r.t.Helper()
	e := pooltest.Snapshot(pooltest.E(name).Role(role).Addr(addr)).Endpoints[0]
	r.all = append(r.all, e)
	r.publish()
	return e
}

// drop takes an endpoint out of the pool.
func (r *rig) drop(e *pool.Endpoint) {
	for i, known := range r.all {
		if known == e {
			r.all = append(r.all[:i:i], r.all[i+1:]...)
		}
	}
	r.publish()
}

// engine starts a simulated engine and adds it.
func (r *rig) engine(name, role string, peers *simulate.Registry, change func(*simulate.Options)) (*simulate.Engine, *pool.Endpoint) {
	r.t.Helper()
	o := simulate.Options{Name: name, Role: role, Peers: peers, Scale: 0.1, ScaleOut: true}
	if change != nil {
		change(&o)
	}
	e, err := simulate.New(o)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := e.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = e.Close() })
	return e, r.add(name, role, e.Addr().String())
}

// server starts a prefill endpoint that is a handler.
func (r *rig) server(name string, h http.HandlerFunc) *pool.Endpoint {
	r.t.Helper()
	s := httptest.NewServer(h)
	r.t.Cleanup(s.Close)
	return r.add(name, "prefill", s.Listener.Addr().String())
}

// refusing adds an endpoint where nobody listens: a dead engine's, which keeps its port, so that no stranger answers.
func (r *rig) refusing(name string) *pool.Endpoint {
	r.t.Helper()
	dead, e := r.engine(name, "prefill", simulate.NewRegistry(), nil)
	dead.Kill()
	return e
}

// job is a request whose decision ranks prefillers.
func (r *rig) job(api inference.API, body string, decode *pool.Endpoint, prefillers ...*pool.Endpoint) *Job {
	r.t.Helper()
	var b inference.Body
	b.Append([]byte(body))
	req, err := inference.Parse(api, b)
	if err != nil {
		r.t.Fatal(err)
	}
	req.Method, req.Path, req.ID = http.MethodPost, enginePath(api), "req-1"
	d := new(scheduler.Decision)
	pick := d.Phase(scheduler.PhasePrefill)
	pick.Run = len(prefillers) > 0
	for _, e := range prefillers {
		pick.Ranked = append(pick.Ranked, scheduler.Ranked{Endpoint: e, UncachedTokens: 100})
	}
	j := &Job{Request: req, Decision: d, Decode: decode, Body: req.Edit(), Start: time.Now()}
	if pick.Run {
		j.PrefillLoad = prefillers[0].Load.Reserve(100)
	}
	return j
}

// run runs a job that must not fail, and checks that no reservation is left.
func (r *rig) run(j *Job) *Outcome {
	r.t.Helper()
	out, err := r.Run(r.t.Context(), j)
	if err != nil {
		r.t.Fatal(err)
	}
	r.idle()
	return out
}

// idle checks that nothing is counted as in flight any more.
func (r *rig) idle() {
	r.t.Helper()
	for _, e := range r.all {
		if n, tokens := e.Load.Requests(), e.Load.Tokens(); n != 0 || tokens != 0 {
			r.t.Errorf("%s: %d requests and %d tokens still reserved", e.Name, n, tokens)
		}
	}
	if n := r.metric("in_flight"); n != 0 {
		r.t.Errorf("in_flight %v", n)
	}
	if n := r.metric("held_bytes"); n != 0 {
		r.t.Errorf("held_bytes %v", n)
	}
}

// metric sums the series of a family that carry these label values.
func (r *rig) metric(name string, values ...string) float64 {
	r.t.Helper()
	families, err := r.reg.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	sum, known := 0.0, false
	for _, f := range families {
		if f.GetName() != "baton_sidecar_"+name {
			continue
		}
		known = true
		for _, m := range f.GetMetric() {
			have := map[string]bool{}
			for _, l := range m.GetLabel() {
				have[l.GetValue()] = true
			}
			all := true
			for _, v := range values {
				all = all && have[v]
			}
			if all {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	if !known {
		r.t.Fatalf("no metric %s", name)
	}
	return sum
}

// want compares a metric.
func (r *rig) want(n float64, name string, values ...string) {
	r.t.Helper()
	if got := r.metric(name, values...); got != n {
		r.t.Errorf("%s%v = %v, want %v", name, values, got, n)
	}
}

// reasons is how a request's attempts ended, joined.
func reasons(out *Outcome) string {
	var s []string
	for i := range out.Attempts {
		s = append(s, out.Attempts[i].Reason)
	}
	return strings.Join(s, " ")
}

// decodeBody is the decode request's body as it would leave.
func decodeBody(j *Job) string { return string(bytes.Join(j.Body.Chunks(), nil)) }

// decode sends the decode request to e and returns status and text.
func decode(t *testing.T, e *pool.Endpoint, j *Job) (status int, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+e.Hostport+j.Request.Path, j.Body.Reader())
	if err != nil {
		t.Fatal(err)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var answer struct{ Choices []struct{ Text string } }
	if err := json.Unmarshal(b, &answer); err != nil {
		t.Fatalf("%s: %v", b, err)
	}
	var sb strings.Builder
	for _, c := range answer.Choices {
		sb.WriteString(c.Text)
	}
	return resp.StatusCode, sb.String()
}

// eventually waits for a condition of another process.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// contextGone returns a context and what ends it, as a client that leaves does.
func contextGone(t *testing.T) (context.Context, context.CancelFunc) {
	t.Helper()
	return context.WithCancel(t.Context())
}

func answer(body string) http.HandlerFunc {
	return func(w http.ResponseWriter, req *http.Request) {
		_, _ = io.Copy(io.Discard, req.Body)
		_, _ = io.WriteString(w, body)
	}
}

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, req *http.Request) {
		_, _ = io.Copy(io.Discard, req.Body)
		w.WriteHeader(code)
		_, _ = io.WriteString(w, `{"error":{}}`)
	}
}
