// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// TestDieAtEachCheckpoint ends the process at every checkpoint of a prefill or decode leg and lets it come back.
func TestDieAtEachCheckpoint(t *testing.T) {
	tests := []struct {
		at     string
		phase  string
		stream bool
		begun  bool // the client has seen headers
		events bool // or some of the body
	}{
		{at: atArrival, phase: phasePrefill},
		{at: atPrefill, phase: phasePrefill},
		{at: atDone, phase: phasePrefill},
		{at: atFirstByte, phase: phasePrefill, begun: true},
		{at: atStreaming, phase: phasePrefill, begun: true, events: true},
		{at: atArrival, phase: phaseTransfer},
		{at: atPull, phase: phaseTransfer},
		{at: atDone, phase: phaseTransfer},
		{at: atFirstByte, phase: phaseTransfer, begun: true},
		{at: atFirstByte, phase: phaseTransfer, stream: true, begun: true},
		{at: atStreaming, phase: phaseTransfer, stream: true, begun: true, events: true},
	}
	for _, tt := range tests {
		t.Run(tt.phase+" "+tt.at, func(t *testing.T) {
			t.Parallel()
			prefill, decode := newPair(t, Options{Lease: 20 * time.Second})
			victim, extra := prefill, askHandle
			if tt.phase == phaseTransfer {
				victim, extra = decode, withHandle(prefillLeg(t, prefill, prompt(100, 1), ""))
			}
			if tt.stream {
				extra += `,"stream":true`
			}
			id := victim.ID()
			setFaults(t, victim, Faults{Rules: []Fault{{Kind: faultDie, At: tt.at, Phase: tt.phase, Next: 1, RestartMS: 1}}})
			r, err := send(t.Context(), t, http.MethodPost, victim.URL()+"/v1/completions", complete(prompt(100, 1), 9, extra))
			if cut := errors.Join(err, r.err); cut == nil || tt.begun != (err == nil) || tt.events != (len(r.body) > 0) {
				t.Errorf("headers %v, body %.100q, errors %v, %v", err == nil, r.body, err, r.err)
			}
			eventually(t, "restarted", func() bool { return victim.Alive() && victim.ID() != id })
			if r := post(t, victim, "/v1/completions", complete(prompt(20, 1), 2, "")); r.status != http.StatusOK {
				t.Errorf("after the restart: %d", r.status)
			}
			if d := victim.Deaths(); len(d) != 1 || d[0].Reason != "fault" {
				t.Errorf("deaths: %+v", d)
			}
		})
	}
}

func TestCheckpointsAreChecked(t *testing.T) {
	e := newEngine(t, Options{})
	for _, f := range []Fault{{Kind: faultDie, At: "x"}, {Kind: faultHang, At: atPull}} {
		if e.SetFaults(Faults{Rules: []Fault{f}}) == nil {
			t.Errorf("accepted %+v", f)
		}
	}
	f, err := ParseFault("kind=die,at=streaming,restart_ms=5,after=3")
	if want := (Fault{Kind: faultDie, At: atStreaming, RestartMS: 5, After: 3}); err != nil || f != want {
		t.Errorf("%+v, %v", f, err)
	}
}

// TestSplitStreamInsideCharacters cuts a stream of multi-byte text into pieces and wants every byte of it.
func TestSplitStreamInsideCharacters(t *testing.T) {
	e := newEngine(t, Options{Model: "modèle-😀", Seed: 1})
	ask := `{"prompt":"日本語","echo":true,"max_tokens":6,"temperature":0,"stream":true}`
	for _, n := range []int{0, 1, 3, 7, 1000} {
		setFaults(t, e, Faults{Rules: []Fault{{Kind: faultSplitSSE, Bytes: n}}})
		var w pieces
		x := &exchange{w: &w}
		s := &sse{x: x, rc: http.NewResponseController(&w)}
		text := "data: {\"text\":\"日本語😀\"}\n\n"
		for range 3 {
			if err := s.breakEvent(&Fault{Kind: faultSplitSSE, Bytes: n}, text); err != nil {
				t.Fatal(err)
			}
		}
		s.drain()
		inside := false
		for _, p := range w.written {
			inside = inside || !utf8.ValidString(p)
			if len(p) > max(n, 1) {
				t.Errorf("%d: a write of %d bytes", n, len(p))
			}
		}
		if strings.Join(w.written, "") != strings.Repeat(text, 3) || (!inside && n < 1000) {
			t.Errorf("%d: %q", n, w.written)
		}
		body := string(post(t, e, "/v1/completions", ask).body)
		if !strings.HasSuffix(body, "data: [DONE]\n\n") || !strings.Contains(body, "日本語") || strings.Count(body, "modèle-😀") < 6 {
			t.Errorf("%d: %s", n, body)
		}
	}
}

// pieces is a response writer that keeps each write.
type pieces struct{ written []string }

func (p *pieces) Header() http.Header { return http.Header{} }
func (p *pieces) WriteHeader(int)     {}
func (p *pieces) Flush()              {}

func (p *pieces) Write(b []byte) (int, error) {
	p.written = append(p.written, string(b))
	return len(b), nil
}

func TestRetryAfter(t *testing.T) {
	e := newEngine(t, Options{})
	for given, want := range map[string]string{"": "1", "9": "9", "-": ""} {
		setFaults(t, e, Faults{Rules: []Fault{{Kind: faultStatus, Status: http.StatusTooManyRequests, RetryAfter: given}}})
		r := post(t, e, "/v1/completions", complete(prompt(20, 1), 2, ""))
		if r.status != http.StatusTooManyRequests || r.header.Get("Retry-After") != want {
			t.Errorf("%q: %d %q", given, r.status, r.header.Get("Retry-After"))
		}
	}
}

func TestMetricsFaultsThroughTheNameFilter(t *testing.T) {
	e := newEngine(t, Options{})
	const query = "/metrics/?name[]=vllm:num_requests_running&name[]=vllm:kv_cache_usage_perc&name[]=vllm:prompt_tokens_total"
	page := func() string { return string(get(t, e, query).body) }
	setFaults(t, e, Faults{Metrics: metricsFrozen})
	before := page()
	post(t, e, "/v1/completions", complete(prompt(40, 1), 3, ""))
	if page() != before {
		t.Error("frozen page changed")
	}
	if err := e.Restart(); err != nil {
		t.Fatal(err)
	}
	if page() != before {
		t.Error("frozen page changed with a restart")
	}
	setFaults(t, e, Faults{Metrics: metricsContradictory})
	if v := metric(t, e, "vllm:num_requests_running"); v != "-1.0" {
		t.Errorf("running %s", v)
	}
	if v := metric(t, e, "vllm:kv_cache_usage_perc"); v != "1.7" {
		t.Errorf("usage %s", v)
	}
	if v := metric(t, e, `vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"}`); v != "1000.0" {
		t.Errorf("waiting for capacity %s", v)
	}
}
